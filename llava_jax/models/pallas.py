"""Runs attention in Pallas kernels on TPUs: those of splash.py for the decoder, and one for the vision tower."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models import tpu
from llava_jax.models.dot_product import apply_rope, attention
from llava_jax.parallel.sharding import row_axes

NUM_LANES = 128
"""Width of a TPU's vector registers. Splash's blocks are multiples of it, and sequences are padded to a multiple."""

SPLASH_BLOCKS = (1280, 512)
"""Maximum number of queries or keys in a block of splash attention, forward and backward. The forward pass waits for
matmuls less often with long blocks; the backward pass would need more VMEM than it has (libtpu 0.0.52)."""

V4_VMEM_BYTES = 2**24
"""Size of VMEM on v4, which all heads of an image would exceed."""


def supports_tower(size: int, num_heads: int) -> bool:
    """Returns whether the kernel of vision towers supports heads of these sizes: registers have 8 rows."""
    return size // num_heads % 8 == 0


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of the first token of each token's segment, whose tokens are adjacent."""
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, jnp.arange(segment_ids.shape[1]), 0), axis=1)


def splash_attention(query: Array, key: Array, value: Array, starts: Array | None = None,
                     rope: tuple[Array, Array] | None = None, interpret: bool = False) -> Array:
    """Runs the kernels of splash.py: a token attends to itself and earlier tokens of its segment.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H], [B, T, K, H]; N is a multiple of K.
      starts: int32 [B, T], position of the first token of each token's segment; None means one segment.
      rope: cosine and sine [B, T, 1, H] of the angles that rotate queries and keys, if they are not rotated yet.
      interpret: whether Pallas interprets the kernel, for tests without a TPU.

    Returns [B, T, N, H].
    """
    from llava_jax.models import splash

    B, T, N, H = query.shape
    padded = -(-T // NUM_LANES) * NUM_LANES
    blocks = [_largest_block(padded, limit) for limit in SPLASH_BLOCKS]
    flat = H % NUM_LANES == 0
    if rope is not None and not flat:
        query, key, rope = apply_rope(query, *rope), apply_rope(key, *rope), None

    def batch(query, key, value, starts, table=None):
        def join(x):
            return x.reshape(len(x), padded, -1) if flat else x.swapaxes(1, 2).reshape(-1, padded, H)

        options = splash.Options(query.shape[2], key.shape[2], H, *blocks, interpret)
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
    from jax.experimental.pallas import tpu as pltpu

    B, T, size = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3

    def batch(qkv):
        itemsize, groups = qkv.dtype.itemsize, _head_groups(T, size, num_heads, qkv.dtype.itemsize)
        width, rows = size // groups, len(qkv) * groups
        if groups > 1:
            qkv = qkv.reshape(-1, T, 3, groups, width).transpose(0, 3, 1, 2, 4).reshape(rows, T, 3 * width)
        out = pl.pallas_call(
            functools.partial(_bidirectional_kernel, num_heads=num_heads // groups), grid=(rows,),
            in_specs=[pl.BlockSpec((None, T, 3 * width), lambda row: (row, 0, 0))],
            out_specs=pl.BlockSpec((None, T, width), lambda row: (row, 0, 0)),
            out_shape=jax.ShapeDtypeStruct((rows, T, width), qkv.dtype),
            scratch_shapes=[pltpu.VMEM((3 * width, T), jnp.float32), pltpu.VMEM((width, T), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=_tower_bytes(T, width, itemsize)),
            cost_estimate=pl.CostEstimate(
                flops=4 * rows * T * T * width, transcendentals=len(qkv) * num_heads // groups * T * T,
                bytes_accessed=4 * rows * T * width * itemsize),
            interpret=interpret, name="bidirectional_attention")(qkv)
        return out if groups == 1 else out.reshape(-1, groups, T, width).swapaxes(1, 2).reshape(-1, T, size)

    return _each_device(batch, B, P(None, None))(qkv).reshape(B, T, num_heads, -1)


def _tower_bytes(length: int, width: int, itemsize: int) -> int:
    """Returns the VMEM of two buffers of each block, both arrays of scratch, scores and their powers."""
    return length * width * (2 * 4 * itemsize + 4 * 4) + 4 * 4 * length * length + 2 * 2**20


def _head_groups(length: int, size: int, num_heads: int, itemsize: int) -> int:
    """Returns the number of parts of an image's heads that are computed one after the other: 1 except on v4."""
    limit = V4_VMEM_BYTES if tpu.device_kind().startswith("TPU v4") else math.inf
    fitting = (groups for groups in range(1, num_heads + 1)
               if num_heads % groups == 0 and _tower_bytes(length, size // groups, itemsize) <= limit)
    return next(fitting, num_heads)


def _bidirectional_kernel(qkv, out, transposed, result, *, num_heads: int):
    """Computes one image's heads, one after the other, from transposed queries, keys and values.

    A head is then some rows, of which a TPU addresses any 8. In columns, heads of 72 would not fill vectors.
    """
    from jax.experimental import pallas as pl

    size, dtype = out.shape[1], qkv.dtype
    head_dim = size // num_heads
    transposed[...] = qkv[...].astype(jnp.float32).T

    def attend(head, _):
        rows = [pl.ds(pl.multiple_of(part * size + head * head_dim, 8), head_dim) for part in range(3)]
        query, key, value = (transposed[part] for part in rows)
        query = (query * (head_dim**-0.5 * math.log2(math.e))).astype(dtype)
        scores = jax.lax.dot_general(key.astype(dtype), query, (((0,), (0,)), ((), ())),
                                     preferred_element_type=jnp.float32)  # [keys, queries]
        weights = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
        weighted = jnp.dot(value.astype(dtype), weights.astype(dtype), preferred_element_type=jnp.float32)
        result[rows[0]] = weighted / weights.sum(axis=0, keepdims=True)

    jax.lax.fori_loop(0, num_heads, attend, None)
    out[...] = result[...].T.astype(dtype)


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
