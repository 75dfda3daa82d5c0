"""Attention three times: plain XLA, Pallas kernels for TPUs (`splash`), and cuDNN's for NVIDIA GPUs.

Which one runs is chosen (`resolve`) and never changes quietly: what cannot run raises.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llava_jax.sharding import row_axes

LANES = 128
"""Width of a TPU's vector registers: splash's blocks are multiples of it, and rows are padded to one."""

BLOCKS = {"TPU v6": 2048, "TPU7": 2048}
"""The longest splash block whose backward kernel compiles, by the start of a device's kind; 1024 for the others."""


def resolve(name: str, platform: str) -> str:
    """The implementation that `auto` stands for on a platform (tpu, gpu or cuda, cpu); any other name is itself."""
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla") if name == "auto" else name


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention of N query heads over K key-value heads (N a multiple of K), softmax in float32.

    `mask` is True where a query may look. A query that may look nowhere gets the mean of all values, not NaN.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


Attend = Callable[[Array, Array, Array], Array]
"""`query [B, T, N, H], key [B, T, K, H], value [B, T, K, H] -> [B, T, N, H]`."""


def causal(name: str, length: int, segment_ids: Int[Array, "B T"] | None = None) -> Attend:
    """Attention of rows of `length` tokens that see themselves and what is before them in their own segment.

    `name`: xla, splash or cudnn; ValueError for another. `segment_ids`: one segment when None.
    """
    if name == "splash":
        return functools.partial(_splash, segment_ids=segment_ids)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if name == "xla":
        return functools.partial(attention, mask=mask)
    if name == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, mask=mask[:, None], implementation="cudnn")
    raise ValueError(f"attention {name!r} is not one of xla, splash, cudnn")


def full(name: str, head_width: int) -> Attend:
    """Attention in which every token sees all, with as many key-value heads as query heads.

    For `splash` it is a kernel that takes heads whose width divides 128, as CLIP's do; others go through XLA.
    """
    if name == "splash" and LANES % head_width == 0:
        return _whole
    if name == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attention


def _splash(query: Array, key: Array, value: Array, segment_ids: Array | None, interpret: bool = False) -> Array:
    """JAX's splash kernel, forward and (fused) backward, with blocks as long as the device's memory allows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = query.shape
    padded = -(-T // LANES) * LANES
    # With at least two blocks in a row, what a causal mask hides wholly is left out.
    block = _block(padded, min(_longest_block(), max(padded // 2, LANES)))
    part = _block(block, max(block // 2, LANES))
    sizes = kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block,
                              block_kv_dkv=block, block_kv_dkv_compute=part, use_fused_bwd_kernel=True)

    def rows(query, key, value, segments):
        mask = masks.MultiHeadMask([masks.CausalMask((padded, padded))] * query.shape[2])
        splash = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
                                        residual_checkpoint_name="attention")

        def row(query, key, value, segments):
            heads_first = (x.swapaxes(0, 1) for x in (query, key, value))
            return splash(*heads_first, kernel.SegmentIds(segments, segments)).swapaxes(0, 1)

        return jax.vmap(row)(query, key, value, segments)

    def pad(x, value=0):
        return jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    run = _each_device(rows, B, P(None, "tensor", None), P(None, "tensor", None), P(None, "tensor", None), P(None))
    return run(pad(query * H**-0.5), pad(key), pad(value), pad(segments, -1))[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _whole(query: Array, key: Array, value: Array, interpret: bool = False) -> Array:
    """A kernel that holds all scores of a head in fast memory and leaves the heads side by side, as products do."""
    from jax.experimental import pallas as pl

    B, T, N, H = query.shape

    def rows(*inputs):
        block = pl.BlockSpec((1, T, LANES), lambda row, lanes: (row, 0, lanes))
        return pl.pallas_call(
            functools.partial(_whole_kernel, width=H), grid=(inputs[0].shape[0], inputs[0].shape[2] // LANES),
            in_specs=[block] * 3, out_specs=block, out_shape=jax.ShapeDtypeStruct(inputs[0].shape, query.dtype),
            interpret=interpret, name="whole_attention")(*inputs)

    lanes = -(-N * H // LANES) * LANES
    flat = [jnp.pad(x.reshape(B, T, N * H), ((0, 0), (0, 0), (0, lanes - N * H))) for x in (query, key, value)]
    run = _each_device(rows, B, P(None, None), P(None, None), P(None, None))
    return run(*flat)[..., : N * H].reshape(B, T, N, H)


def _whole_kernel(query, key, value, out, *, width: int):
    """One row, and the heads that lie in LANES lanes. Lanes of other heads are nulled, which costs no product more."""
    query, key, value = query[0], key[0], value[0]
    head_of = jax.lax.broadcasted_iota(jnp.int32, key.shape, 1) // width
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(LANES // width):
        scores = jax.lax.dot_general(query, jnp.where(head_of == head, key, 0), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32) * width**-0.5
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        mixed = jax.lax.dot_general(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())),
                                    preferred_element_type=jnp.float32)
        result = jnp.where(head_of == head, mixed / weights.sum(axis=1, keepdims=True), result)
    out[0] = result.astype(out.dtype)


# A vision tower is seldom trained: its backward pass computes the scores again, by XLA.
_whole.defvjp(lambda *inputs: (_whole(*inputs), inputs[:3]), lambda _, saved, g: jax.vjp(attention, *saved)[1](g))


def _each_device(function: Callable, count: int, *specs: P) -> Callable:
    """`function` on each device's part of arrays of `count` rows; `specs` lay out what follows the rows.

    XLA does not partition kernels. The result lies as the first argument does.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    rows = row_axes(count)
    layouts = tuple(P(rows, *spec) for spec in specs)
    return jax.shard_map(function, in_specs=layouts, out_specs=layouts[0], check_vma=False)


def _longest_block() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return next((size for start, size in BLOCKS.items() if kind.startswith(start)), 1024)


def _block(length: int, most: int) -> int:
    """The largest part of at most `most` that divides `length`, both multiples of LANES."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)
