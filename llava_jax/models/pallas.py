"""Runs attention in Pallas kernels on TPUs: JAX's splash kernel for the decoder, and a kernel for the vision tower."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llava_jax.models.dot_product import attention
from llava_jax.parallel.sharding import row_axes

NUM_LANES = 128
"""Width of a TPU's vector registers. Splash's blocks are multiples of it, and sequences are padded to a multiple."""

SPLASH_BLOCK_SIZES = {"TPU v6": 2048, "TPU7": 2048}
"""Longest splash block whose backward kernel compiles, by prefix of `device_kind`; 1024 for other devices."""


def fills_lanes(size: int, num_heads: int) -> bool:
    """Returns whether the heads of a vision tower fill a TPU's vectors, as the tower's own kernel requires."""
    return NUM_LANES % (size // num_heads) == 0 and size % NUM_LANES == 0


def supports_tower(size: int, num_heads: int) -> bool:
    """Returns whether a vision tower has a kernel: its own, or splash for heads at least half as wide as a vector."""
    return fills_lanes(size, num_heads) or size // num_heads >= NUM_LANES // 2


def splash_attention(query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool = True,
                     interpret: bool = False) -> Array:
    """Runs JAX's splash attention kernel with the longest blocks that compile on the device.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H], [B, T, K, H]; N is a multiple of K.
      segment_ids: int32 [B, T]; None means one segment.
      causal: whether a token attends to itself and earlier tokens only.
      interpret: whether Pallas interprets the kernel, for tests without a TPU.

    Returns [B, T, N, H].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = query.shape
    padded = -(-T // NUM_LANES) * NUM_LANES
    # At least two blocks in a causal sequence, because the kernel skips blocks that the mask hides completely.
    block = _largest_block(padded, min(_longest_block(), max(padded // (1 + causal), NUM_LANES)))
    half = _largest_block(block, max(block // 2, NUM_LANES))
    sizes = kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=half, block_q_dkv=block,
                              block_kv_dkv=block, block_kv_dkv_compute=half, use_fused_bwd_kernel=True)

    def batch(query, key, value, segments):
        one_head = masks.CausalMask if causal else masks.FullMask
        mask = masks.MultiHeadMask([one_head((padded, padded))] * query.shape[2])
        splash = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
                                        residual_checkpoint_name="attention")

        def sequence(query, key, value, segments):
            heads_first = (x.swapaxes(0, 1) for x in (query, key, value))
            return splash(*heads_first, kernel.SegmentIds(segments, segments)).swapaxes(0, 1)

        return jax.vmap(sequence)(query, key, value, segments)

    def pad(x, value=0):
        return jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    run = _each_device(batch, B, P(None, "tensor", None), P(None, "tensor", None), P(None, "tensor", None), P(None))
    return run(pad(query * H**-0.5), pad(key), pad(value), pad(segments, -1))[:, :T]


def split_qkv(qkv: Float[Array, "B T 3NH"], num_heads: int) -> list[Float[Array, "B T N H"]]:
    """Splits concatenated queries, keys and values."""
    qkv = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1)
    return [qkv[:, :, part] for part in range(3)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bidirectional_attention(qkv: Array, num_heads: int, interpret: bool = False) -> Array:
    """Computes attention `[B, T, 3 N H] -> [B, T, N, H]` in a kernel that keeps all scores of a head in VMEM.

    The heads stay adjacent on the last axis, as the matmuls before and after write and read them.
    """
    from jax.experimental import pallas as pl

    B, T, size = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3

    def batch(qkv):
        def block(part: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, T, NUM_LANES), lambda row, lanes: (row, 0, part * (size // NUM_LANES) + lanes))

        return pl.pallas_call(
            functools.partial(_bidirectional_kernel, head_dim=size // num_heads),
            grid=(qkv.shape[0], size // NUM_LANES),
            in_specs=[block(0), block(1), block(2)], out_specs=block(0),
            out_shape=jax.ShapeDtypeStruct((qkv.shape[0], T, size), qkv.dtype),
            interpret=interpret, name="bidirectional_attention")(qkv, qkv, qkv)

    return _each_device(batch, B, P(None, None))(qkv).reshape(B, T, num_heads, -1)


def _bidirectional_kernel(query, key, value, out, *, head_dim: int):
    """Computes one image's heads within NUM_LANES lanes. Lanes of other heads are zeroed, at no further cost."""
    query, key, value = query[0], key[0], value[0]
    head_of = jax.lax.broadcasted_iota(jnp.int32, key.shape, 1) // head_dim
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(NUM_LANES // head_dim):
        scores = jax.lax.dot_general(query, jnp.where(head_of == head, key, 0), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        weighted = jax.lax.dot_general(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())),
                                       preferred_element_type=jnp.float32)
        result = jnp.where(head_of == head, weighted / weights.sum(axis=1, keepdims=True), result)
    out[0] = result.astype(out.dtype)


# The backward pass recomputes the scores by XLA, because a vision tower is seldom trained.
bidirectional_attention.defvjp(
    lambda qkv, *options: (bidirectional_attention(qkv, *options), qkv),
    lambda heads, _, qkv, g: jax.vjp(lambda qkv: attention(*split_qkv(qkv, heads)), qkv)[1](g))


def _each_device(function: Callable, count: int, *specs: P) -> Callable:
    """Runs `function` on each device's shard of arrays with a batch of `count`, because XLA does not partition kernels.

    `specs` are the layouts of the axes after the batch axis. The result has the layout of the first argument.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    axes = row_axes(count)
    layouts = tuple(P(axes, *spec) for spec in specs)
    return jax.shard_map(function, in_specs=layouts, out_specs=layouts[0], check_vma=False)


def _longest_block() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return next((size for prefix, size in SPLASH_BLOCK_SIZES.items() if kind.startswith(prefix)), 1024)


def _largest_block(length: int, limit: int) -> int:
    """Returns the largest multiple of NUM_LANES that divides `length` and is at most `limit`."""
    return max(size for size in range(NUM_LANES, limit + 1, NUM_LANES) if length % size == 0)
