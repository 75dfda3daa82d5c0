"""Runs attention in Pallas kernels on TPUs: those of splash.py for the decoder, and one for the vision tower."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.dot_product import apply_rope, attention
from llava_jax.parallel.sharding import row_axes

NUM_LANES = 128
"""Width of a TPU's vector registers. Splash's blocks are multiples of it, and sequences are padded to a multiple."""

SPLASH_BLOCK = 512
"""Maximum number of queries or keys in a block of splash attention."""


def fills_lanes(size: int, num_heads: int) -> bool:
    """Returns whether the heads of a vision tower fill a TPU's vectors, as the tower's own kernel requires."""
    return NUM_LANES % (size // num_heads) == 0 and size % NUM_LANES == 0


def supports_tower(size: int, num_heads: int) -> bool:
    """Returns whether a vision tower has a kernel: its own, or splash for heads at least half as wide as a vector."""
    return fills_lanes(size, num_heads) or size // num_heads >= NUM_LANES // 2


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of the first token of each token's segment, whose tokens are adjacent."""
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, jnp.arange(segment_ids.shape[1]), 0), axis=1)


def splash_attention(query: Array, key: Array, value: Array, starts: Array | None = None,
                     rope: tuple[Array, Array] | None = None, causal: bool = True, interpret: bool = False) -> Array:
    """Runs the kernels of splash.py.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H], [B, T, K, H]; N is a multiple of K.
      starts: int32 [B, T], position of the first token of each token's segment; None means one segment.
      rope: cosine and sine [B, T, 1, H] of the angles that rotate queries and keys, if they are not rotated yet.
      causal: whether a token attends to itself and earlier tokens only.
      interpret: whether Pallas interprets the kernel, for tests without a TPU.

    Returns [B, T, N, H].
    """
    from llava_jax.models import splash

    B, T, N, H = query.shape
    padded = -(-T // NUM_LANES) * NUM_LANES
    block = _largest_block(padded, SPLASH_BLOCK)
    flat = H % NUM_LANES == 0
    if rope is not None and not flat:
        query, key, rope = apply_rope(query, *rope), apply_rope(key, *rope), None

    def batch(query, key, value, starts, table=None):
        def join(x):
            return x.reshape(len(x), padded, -1) if flat else x.swapaxes(1, 2).reshape(-1, padded, H)

        options = splash.Options(query.shape[2], key.shape[2], H, T, block, causal, interpret)
        out = splash.splash_attention(join(query), join(key), join(value), table, starts, options)
        return out.reshape(query.shape) if flat else out.reshape(len(query), -1, padded, H).swapaxes(1, 2)

    def pad(x):
        if padded == T:  # a padding of zero tokens would still slow the matmuls of the gradients
            return x
        # Padded tokens continue the last segment, because starts must not decrease.
        return jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2), mode="edge")

    arrays = [query, key, value, jnp.zeros((B, T), jnp.int32) if starts is None else starts]
    specs = [P(None, "tensor", None)] * 3 + [P(None)]
    if rope is not None:
        arrays.append(jnp.concatenate([x[..., 0, : H // 2] for x in rope], axis=-1))
        specs.append(P(None, None))
    return _each_device(batch, B, *specs)(*map(pad, arrays))[:, :T]


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


def _largest_block(length: int, limit: int) -> int:
    """Returns the largest multiple of NUM_LANES that divides `length` and is at most `limit`."""
    return max(size for size in range(NUM_LANES, limit + 1, NUM_LANES) if length % size == 0)
