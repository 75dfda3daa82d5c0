"""Attention three times: plain XLA, Pallas kernels for TPUs (`splash`), and cuDNN's for NVIDIA GPUs.

Which one runs is chosen (`resolve`) and never changes quietly: what cannot run raises.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llava_jax.errors import UserError
from llava_jax.parallel.sharding import row_axes

NUM_LANES = 128
"""Width of a TPU's vector registers: splash's blocks are multiples of it, and rows are padded to one."""

NUM_CHUNKS = 4
"""Of a row, in which plain attention under a causal mask goes where there is a backward pass."""

SPLASH_BLOCK_SIZES = {"TPU v6": 2048, "TPU7": 2048}
"""The longest splash block whose backward kernel compiles, by the start of a device's kind; 1024 for the others."""


def resolve(name: str, platform: str) -> str:
    """The implementation that `auto` stands for on a platform (tpu, gpu or cuda, cpu); any other name is itself."""
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla") if name == "auto" else name


def fills_lanes(width: int, heads: int) -> bool:
    """Whether the heads of a vision tower fill a TPU's vectors, which the tower's splash kernel needs."""
    return NUM_LANES % (width // heads) == 0 and width % NUM_LANES == 0


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


def attention_heads_first(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """`attention` of few queries over a cache that lies so that XLA for CPUs need not move it."""
    B, T, N, H = query.shape
    K = key.shape[1]
    query = query.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    scores = jnp.einsum("BKSH,BKQH->BKSQ", key, query, preferred_element_type=jnp.float32).swapaxes(2, 3) * H**-0.5
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(value.dtype)
    mixed = jnp.einsum("BKQS,BKSH->BKQH", weights, value)
    return mixed.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(B, T, N, H)


@jax.custom_vjp
def chunked_causal_attention(
    query: Array, key: Array, value: Array, mask: Bool[Array, "B T T"]
) -> Float[Array, "B T N H"]:
    """`attention` under a causal mask; with a backward pass it runs in NUM_CHUNKS, which skip most masked scores.

    Weights are not saved but recomputed from each row's log-sum-exp (FlashAttention, section 3.1): on a CPU, the memory
    traffic of saved weights costs more than the recomputation.
    """
    return attention(query, key, value, mask)


def _attention_forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    q, k, v = _heads(query, key) * query.shape[-1] ** -0.5, key.swapaxes(1, 2), value.swapaxes(1, 2)
    outs, norms = [], []
    for part in _chunks(query.shape[1]):
        seen = slice(part.stop)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q[..., part, :], k[:, :, seen], preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None, part, seen], scores, jnp.finfo(jnp.float32).min)
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), v[:, :, seen])
        outs.append((mixed / total).astype(value.dtype))
        norms.append((most + jnp.log(total))[..., 0])
    out, norm = _tokens(jnp.concatenate(outs, axis=3)), jnp.concatenate(norms, axis=3)
    return out, (query, key, value, mask, out, norm)


def _attention_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    query, key, value, mask, out, norm = saved
    scale = query.shape[-1] ** -0.5
    q, g, out = _heads(query, key) * scale, _heads(g, key), _heads(out, key)
    k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
    inner = (out * g).sum(-1, dtype=jnp.float32)
    by_query, by_key, by_value = jnp.zeros(q.shape, jnp.float32), [], []
    for part in _chunks(query.shape[1]):
        later = slice(part.start, None)
        q_, g_ = q[..., later, :], g[..., later, :]
        scores = jnp.einsum("BKSH,BKGTH->BKGST", k[:, :, part], q_, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - norm[..., None, later])
        weights = jnp.where(mask[:, None, None, later, part].swapaxes(-1, -2), weights, 0)
        by_weights = jnp.einsum("BKSH,BKGTH->BKGST", v[:, :, part], g_, preferred_element_type=jnp.float32)
        by_scores = (weights * (by_weights - inner[..., None, later])).astype(q.dtype)
        by_value.append(jnp.einsum("BKGST,BKGTH->BKSH", weights.astype(g.dtype), g_))
        by_key.append(jnp.einsum("BKGST,BKGTH->BKSH", by_scores, q_))
        by_query = by_query.at[..., later, :].add(jnp.einsum("BKGST,BKSH->BKGTH", by_scores, k[:, :, part]))
    by_key, by_value = (jnp.concatenate(parts, axis=2).swapaxes(1, 2) for parts in (by_key, by_value))
    return _tokens((by_query * scale).astype(query.dtype)), by_key, by_value, None


chunked_causal_attention.defvjp(_attention_forward, _attention_backward)


def _chunks(length: int) -> list[slice]:
    size = -(-length // NUM_CHUNKS)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _heads(x: Float[Array, "B T N H"], key: Float[Array, "B S K H"]) -> Float[Array, "B K G T H"]:
    B, T, N, H = x.shape
    return x.reshape(B, T, key.shape[2], -1, H).transpose(0, 2, 3, 1, 4)


def _tokens(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


Attend = Callable[[Array, Array, Array], Array]
"""`query [B, T, N, H], key [B, T, K, H], value [B, T, K, H] -> [B, T, N, H]`."""


def causal(name: str, length: int, segment_ids: Int[Array, "B T"] | None = None) -> Attend:
    """Attention of rows of `length` tokens that see themselves and what is before them in their own segment.

    `name`: xla, splash or cudnn; UserError for another. `segment_ids`: one segment when None.
    """
    if name == "splash":
        return functools.partial(_splash, segment_ids=segment_ids)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if name == "xla":
        return lambda query, key, value: chunked_causal_attention(query, key, value, mask)
    if name == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, mask=mask[:, None], implementation="cudnn")
    raise UserError(f"attention {name!r} is not one of xla, splash, cudnn")


def bidirectional_attention(name: str, heads: int) -> Callable[[Array], Array]:
    """Attention in which all tokens see all, of queries, keys, values side by side: `[B, T, 3 N H] -> [B, T, N, H]`.

    For `splash` it is a kernel that takes heads which fill vectors of 128, as CLIP's do; UserError for others, and for
    a name that is none of xla, splash and cudnn.
    """
    if name not in ("xla", "splash", "cudnn"):
        raise UserError(f"attention {name!r} is not one of xla, splash, cudnn")
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn") if name == "cudnn" else attention

    def run(joined: Float[Array, "B T 3NH"]) -> Float[Array, "B T N H"]:
        width = joined.shape[2] // 3
        if name == "splash":
            if not fills_lanes(width, heads):
                raise UserError(f"attention splash: a vision tower of width {width} with {heads} heads does not fill "
                                f"vectors of {NUM_LANES}; choose xla or auto")
            return _bidirectional_splash(joined, heads)
        return attend(*_parts(joined, heads))

    return run


def _splash(query: Array, key: Array, value: Array, segment_ids: Array | None, interpret: bool = False) -> Array:
    """JAX's splash kernel, forward and (fused) backward, with blocks as long as the device's memory allows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = query.shape
    padded = -(-T // NUM_LANES) * NUM_LANES
    # With at least two blocks in a row, what a causal mask hides wholly is left out.
    block = _block(padded, min(_longest_block(), max(padded // 2, NUM_LANES)))
    part = _block(block, max(block // 2, NUM_LANES))
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


def _parts(joined: Array, heads: int) -> list[Array]:
    """Queries, keys and values, each `[B, T, N, H]`."""
    joined = joined.reshape(*joined.shape[:2], 3, heads, -1)
    return [joined[:, :, part] for part in range(3)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _bidirectional_splash(joined: Array, heads: int, interpret: bool = False) -> Array:
    """A kernel that holds all scores of a head in fast memory and leaves the heads side by side, as products do."""
    from jax.experimental import pallas as pl

    B, T, width = joined.shape[0], joined.shape[1], joined.shape[2] // 3

    def rows(joined):
        def block(part: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, T, NUM_LANES), lambda row, lanes: (row, 0, part * (width // NUM_LANES) + lanes))

        return pl.pallas_call(
            functools.partial(_bidirectional_kernel, width=width // heads), grid=(joined.shape[0], width // NUM_LANES),
            in_specs=[block(0), block(1), block(2)], out_specs=block(0),
            out_shape=jax.ShapeDtypeStruct((joined.shape[0], T, width), joined.dtype),
            interpret=interpret, name="bidirectional_attention")(joined, joined, joined)

    return _each_device(rows, B, P(None, None))(joined).reshape(B, T, heads, -1)


def _bidirectional_kernel(query, key, value, out, *, width: int):
    """Computes one row's heads within NUM_LANES lanes. Lanes of other heads are zeroed, at no further cost."""
    query, key, value = query[0], key[0], value[0]
    head_of = jax.lax.broadcasted_iota(jnp.int32, key.shape, 1) // width
    result = jnp.zeros(query.shape, jnp.float32)
    for head in range(NUM_LANES // width):
        scores = jax.lax.dot_general(query, jnp.where(head_of == head, key, 0), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32) * width**-0.5
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        mixed = jax.lax.dot_general(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())),
                                    preferred_element_type=jnp.float32)
        result = jnp.where(head_of == head, mixed / weights.sum(axis=1, keepdims=True), result)
    out[0] = result.astype(out.dtype)


# A vision tower is seldom trained: its backward pass computes the scores again, by XLA.
_bidirectional_splash.defvjp(lambda joined, *options: (_bidirectional_splash(joined, *options), joined),
              lambda heads, _, joined, g: jax.vjp(lambda joined: attention(*_parts(joined, heads)), joined)[1](g))


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
    return next((size for start, size in SPLASH_BLOCK_SIZES.items() if kind.startswith(start)), 1024)


def _block(length: int, most: int) -> int:
    """The largest part of at most `most` that divides `length`, both multiples of NUM_LANES."""
    return max(size for size in range(NUM_LANES, most + 1, NUM_LANES) if length % size == 0)
