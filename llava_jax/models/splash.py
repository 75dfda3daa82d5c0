"""Implements sparse attention for TPUs in two Pallas kernels: a forward pass, and a backward pass of all gradients.

Scores are transposed, [keys, queries], so that maxima and sums over keys need no moves between lanes. A grid step has
the queries of one block. It loops over blocks of keys, from the start of the first query's segment up to the diagonal,
so that neither later tokens nor earlier segments cost time. Keys, values and their gradients stay in VMEM for a whole
sequence.

Heads that fill a TPU's vectors are read from [B, T, N H], as the matmuls write them, and rotary position embedding is
applied in VMEM: XLA would move the heads to another layout in HBM before each kernel and after it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LOG2E = math.log2(math.e)
"""Scores are in units of log 2, because TPUs compute powers of 2."""

MASKED = -1e30
"""Score of a key that a query does not attend to. Finite, because -inf - -inf would be NaN."""

NUM_LANES = 128
"""Width of a TPU's vector registers."""

TWO_BUFFERS = 3072
"""Maximum length of a sequence of which VMEM has two buffers. VMEM has 16 MiB on v4, and 64 on v5p and tpu7x."""


@dataclass(frozen=True)
class Options:
    """Static arguments of the kernels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block: int
    """Number of queries of a grid step, and of keys that it visits at a time."""
    backward_block: int
    """The same of the backward pass."""
    interpret: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def splash_attention(query: Array, key: Array, value: Array, rope: Float[Array, "B T H"] | None,
                    starts: Int[Array, "B T"], options: Options) -> Array:
    """Computes causal softmax attention with scores divided by the root of H.

    Args:
      query, key, value: [B, T, N H], [B, T, K H], [B, T, K H] if NUM_LANES divides H. Otherwise, or with a single head,
        [B N, T, H], [B K, T, H], [B K, T, H]. T is a multiple of both blocks.
      rope: cosines of H / 2 angles, then their sines, by which queries and keys are rotated; None for no rotation.
      starts: position of the first token of each token's segment. A query attends to the keys from there to its own
        position.

    Returns an array like `query`.
    """
    return _forward(query, key, value, rope, starts, options)[0]


def _forward(query, key, value, rope, starts, options):
    B, T = starts.shape
    queries, keys, row = _blocks(T, options)
    lse = jax.ShapeDtypeStruct((B, options.num_heads, 1, T), jnp.float32)
    return _call(_forward_kernel, "splash_attention", 2, options, rope, starts,
                 [(queries, query), (keys, key), (keys, value)], [(queries, query), (row, lse)],
                 [(1, options.block), (1, options.block), (options.head_dim, options.block)])


def _backward(options, saved, g):
    query, key, value, rope, starts, out, lse = saved
    options = dataclasses.replace(options, block=options.backward_block)
    T, H = starts.shape[1], options.head_dim
    queries, keys, row = _blocks(T, options)
    gradients = _call(_backward_kernel, "splash_attention_backward", 5, options, rope, starts,
                      [(queries, query), (keys, key), (keys, value), (queries, out), (row, lse), (queries, g)],
                      [(queries, query), (keys, key), (keys, value)], [(H, options.block), (T, H), (T, H)])
    return *gradients, None, None


def _save(query, key, value, rope, starts, options):
    # Named, so that a remat policy can save them.
    out, lse = (checkpoint_name(x, "attention") for x in _forward(query, key, value, rope, starts, options))
    return out, (query, key, value, rope, starts, out, lse)


splash_attention.defvjp(_save, _backward)


def _blocks(length: int, options: Options) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Returns the blocks of queries, of all keys of a sequence, and of a number for each query.

    A grid has sequences, heads of keys, and the blocks of queries of all heads that share the keys.
    """
    group, H, count = options.num_heads // options.num_kv_heads, options.head_dim, length // options.block

    def heads(size: int, num_heads: int, index: Callable, **mode) -> pl.BlockSpec:
        def position(b, k, i, *_):
            head, block = index(k, i)
            return (b, block, head) if H % NUM_LANES == 0 else (b * num_heads + head, block, 0)

        return pl.BlockSpec((None, size, H), position, **mode)

    queries = heads(options.block, options.num_heads, lambda k, i: (k * group + i // count, i % count))
    keys = heads(length, options.num_kv_heads, lambda k, i: (k, 0), **_buffers(length))
    row = pl.BlockSpec((None, None, 1, options.block), lambda b, k, i, *_: (b, k * group + i // count, 0, i % count))
    return queries, keys, row


def _buffers(length: int) -> dict[str, pl.Buffered]:
    """Returns the option of blocks with whole sequences: longer ones have no second buffer for the next head."""
    return {"pipeline_mode": pl.Buffered(1)} if length > TWO_BUFFERS else {}


def _call(kernel: Callable, name: str, products: int, options: Options, rope: Array | None, starts: Array,
          inputs: list, outputs: list, scratch: list) -> list[Array]:
    """Runs a kernel. `inputs` and `outputs` are pairs of a block and an array; `scratch` has shapes in float32.

    `products` is the number of matmuls of a block of scores.
    """
    (B, T), N, H, block, dtype = starts.shape, options.num_heads, options.head_dim, options.block, inputs[0][1].dtype
    grid = (B, options.num_kv_heads, N // options.num_kv_heads * (T // block))
    inputs = [(pl.BlockSpec((None, 1, block), lambda b, k, i, *_: (b, 0, i % (T // block))), starts[:, None]), *inputs]
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in scratch]
    if rope is None:
        run = lambda *refs: kernel(refs[0], None, *refs[1:], options=options)  # noqa: E731
    else:
        run = functools.partial(kernel, options=options)
        inputs.insert(0, (pl.BlockSpec((None, T, H), lambda b, *_: (b, 0, 0), **_buffers(T)), rope))
        scratch.append(pltpu.VMEM((T, H), dtype))
    pairs = T * (T + block) // 2
    # Keys, values, their gradients and the angles; rotated keys; sums of gradients.
    buffers = 1 if _buffers(T) else 2
    whole = T * max(H, NUM_LANES) * (buffers * 4 * dtype.itemsize + buffers * 4 + dtype.itemsize + 8)
    return pl.pallas_call(
        run, interpret=options.interpret, name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs], scratch_shapes=scratch),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * B * N * H * pairs, transcendentals=B * N * pairs,
            bytes_accessed=sum(array.size * array.dtype.itemsize for _, array in inputs + outputs)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=whole + 12 * 2**20),
    )(_bounds(starts, block), *(array for _, array in inputs))


def _bounds(starts: Int[Array, "B T"], block: int) -> Int[Array, "2 B I"]:
    """Returns, for each block of queries, the first block of keys, and the first that all its queries see."""
    return jnp.stack([starts[:, ::block] // block, -(-starts[:, block - 1 :: block] // block)])


def _visit_keys(bounds: Array, starts: Array, i: Array, options: Options, visit: Callable) -> None:
    """Calls `visit(position of the first key, mask or None)` for the blocks of keys that the i-th queries see.

    `mask` is True where a query, which is a column, sees a key.
    """
    block, batch = options.block, pl.program_id(0)
    keys, queries = (jax.lax.broadcasted_iota(jnp.int32, (block, block), axis) for axis in (0, 1))
    first, seen = bounds[0, batch, i], jnp.minimum(bounds[1, batch, i], i)
    jax.lax.fori_loop(first, seen, lambda j, _: visit(j * block, keys >= starts - j * block), None)
    jax.lax.fori_loop(seen, i, lambda j, _: visit(j * block, None), None)
    # The diagonal is last, because then each query's maximum is the score of a key that it sees.
    visit(i * block, (keys <= queries) & (keys >= starts - i * block))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _rotate(x: Array, rope: Array, sign: int = 1) -> Array:
    """Rotates the pairs (i, i + H/2) of float32 `x` by the angles of `rope`, or back if `sign` is -1."""
    half = x.shape[-1] // 2
    swapped, first = pltpu.roll(rope, half, 1), jax.lax.broadcasted_iota(jnp.int32, rope.shape, 1) < half
    sin = jnp.where(first, -swapped, rope) * sign
    return x * jnp.where(first, rope, swapped) + pltpu.roll(x, half, 1) * sin


def _queries(query: Array, rope: Array | None, block: Array, options: Options) -> Array:
    """Returns the block's queries, rotated and scaled."""
    x = query[...].astype(jnp.float32)
    if rope is not None:
        x = _rotate(x, rope[pl.ds(block * options.block, options.block)])
    return (x * (x.shape[-1] ** -0.5 * LOG2E)).astype(query.dtype)


def _keys(key: Array, rope: Array | None, rotated: Array | None, options: Options) -> Array:
    """Returns a reference to the rotated keys. The first step of a head rotates them."""
    if rope is None:
        return key

    @pl.when(pl.program_id(2) == 0)
    @_each_block(key.shape[0], options)
    def _(rows):
        rotated[rows] = _rotate(key[rows].astype(jnp.float32), rope[rows]).astype(key.dtype)

    return rotated


def _each_block(length: int, options: Options) -> Callable:
    """Returns a decorator that makes a function run on each block of rows, without an argument.

    A loop needs less VMEM than an operation on all rows, whose registers would be spilled.
    """
    return lambda function: lambda: jax.lax.fori_loop(
        0, length // options.block, lambda j, _: function(pl.ds(j * options.block, options.block)), None)


def _forward_kernel(bounds, rope, starts, query, key, value, out, lse, maximum, total, result, rotated=None, *,
                    options: Options):
    block = pl.program_id(2) % bounds.shape[2]
    queries, key = _queries(query, rope, block, options), _keys(key, rope, rotated, options)
    maximum[...] = jnp.full(maximum.shape, MASKED)
    total[...] = jnp.zeros(total.shape)
    result[...] = jnp.zeros(result.shape)

    def visit(position, mask):
        rows = pl.ds(position, options.block)
        scores = _dot(key[rows], queries, 1, 1)
        if mask is not None:
            scores = jnp.where(mask, scores, MASKED)
        old = maximum[...]
        new = jnp.maximum(old, scores.max(0, keepdims=True))
        weights, decay = jnp.exp2(scores - new), jnp.exp2(old - new)
        maximum[...] = new
        total[...] = total[...] * decay + weights.sum(0, keepdims=True)
        result[...] = result[...] * decay + _dot(value[rows], weights.astype(value.dtype), 0, 0)

    _visit_keys(bounds, starts[...], block, options, visit)
    out[...] = (result[...] / total[...]).T.astype(out.dtype)
    lse[...] = maximum[...] + jnp.log2(total[...])


def _backward_kernel(bounds, rope, starts, query, key, value, out, lse, g, dq, dk, dv, dq_sum, dk_sum, dv_sum,
                     rotated=None, *, options: Options):
    step, H = pl.program_id(2), query.shape[-1]
    block = step % bounds.shape[2]
    queries, key, g = _queries(query, rope, block, options), _keys(key, rope, rotated, options), g[...]
    # A matmul with ones sums over lanes and writes a row.
    weighted = g.astype(jnp.float32) * out[...].astype(jnp.float32)
    mean = jax.lax.dot_general(jnp.ones((8, H), jnp.float32), weighted, (((1,), (1,)), ((), ())),
                               precision="highest", preferred_element_type=jnp.float32)[:1]
    dq_sum[...] = jnp.zeros(dq_sum.shape)

    @pl.when(step == 0)
    @_each_block(dk.shape[0], options)
    def _(rows):
        dk_sum[rows] = dv_sum[rows] = jnp.zeros((options.block, H), jnp.float32)

    def visit(position, mask):
        rows = pl.ds(position, options.block)
        keys = key[rows]
        scores = _dot(keys, queries, 1, 1)
        if mask is not None:
            scores = jnp.where(mask, scores, MASKED)
        weights = jnp.exp2(scores - lse[...])
        dv_sum[rows] += _dot(weights.astype(g.dtype), g, 1, 0)
        d = (weights * (_dot(value[rows], g, 1, 1) - mean)).astype(g.dtype)
        dk_sum[rows] += _dot(d, queries, 1, 0)
        dq_sum[...] += _dot(keys, d, 0, 0)

    _visit_keys(bounds, starts[...], block, options, visit)
    result = (dq_sum[...] * H**-0.5).T
    if rope is not None:
        result = _rotate(result, rope[pl.ds(block * options.block, options.block)], -1)
    dq[...] = result.astype(dq.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    @_each_block(dk.shape[0], options)
    def _(rows):
        result = dk_sum[rows] / LOG2E
        dk[rows] = (result if rope is None else _rotate(result, rope[rows], -1)).astype(dk.dtype)
        dv[rows] = dv_sum[rows].astype(dv.dtype)
