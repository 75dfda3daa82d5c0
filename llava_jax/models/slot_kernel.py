"""Runs attention of a decode step in a Pallas kernel on TPUs, which reads and writes a SlotCache in place.

The kernel reads each slot as far as it is filled, in blocks of positions, with a running softmax (FlashAttention,
arXiv:2205.14135, algorithm 1). It starts with the new token, whose key and value are not in the cache yet.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from llava_jax.models.slot_cache import SlotCache

MAX_BLOCK_BYTES = 2**20
"""Maximum size of a block of keys, or of values: long enough for the full HBM rate, short enough for little waste."""

NUM_SUBLANES = 8
"""Number of rows of a TPU's vector registers. Query heads are computed in groups of as many."""

WINDOW = 32
"""Number of positions that are written for a new one, because HBM stores as many int8 rows in one tile."""

SCALE_WINDOW = 128
"""Number of scales that are written for a new one, which are the lanes of a tile."""


def block_size(cache: "SlotCache") -> int:
    """Returns the number of positions of a block."""
    *_, heads, length, head_dim = cache.keys.shape
    mesh = jax.sharding.get_abstract_mesh()
    position_bytes = heads // (1 if mesh.empty else mesh.shape["tensor"]) * head_dim * cache.keys.dtype.itemsize
    fitting = [size for size in range(SCALE_WINDOW, length + 1, SCALE_WINDOW)
               if length % size == 0 and size * position_bytes <= MAX_BLOCK_BYTES]
    return fitting[-1] if fitting else SCALE_WINDOW


def blocks_to_read(positions: Int[Array, "B"], cache: "SlotCache") -> tuple[Array, Array, Array]:
    """Returns the number of blocks that all slots have together, and slot and number of each block.

    A free slot, whose position is at least S, has one block, so that its result is defined.
    """
    block = block_size(cache)
    counts = jnp.where(positions < cache.length, positions, 0) // block + 1
    ends = jnp.cumsum(counts)
    items = jnp.arange(len(positions) * (cache.length // block))
    slot = jnp.minimum((items[:, None] >= ends).sum(axis=1), len(positions) - 1).astype(jnp.int32)
    return ends[-1], slot, items - (ends - counts)[slot]


def attend_slots(query: Float[Array, "B 1 N H"], new: Sequence[Array], cache: "SlotCache", layer: Int[Array, ""] | int,
                 positions: Int[Array, "B"], blocks: tuple[Array, Array, Array],
                 interpret: bool = False) -> tuple[Float[Array, "B 1 N H"], "SlotCache"]:
    """Writes a new token's key and value to each slot, and attends to them and all earlier ones.

    Args:
      new: keys and values, [B, 1, K, H] in the cache's dtype, and their scales, [B, 1, K], if the cache has scales.
      positions: position of each slot's new token; at least S in a free slot, which is not written.
      blocks: `blocks_to_read`, which is the same for all layers.
      interpret: whether Pallas interprets the kernel, for tests without a TPU.
    """
    run = functools.partial(_attend, block=block_size(cache), interpret=interpret)
    parts = tuple(part for part in cache if part is not None)
    if not jax.sharding.get_abstract_mesh().empty:
        heads, slots = P(None, None, "tensor"), tuple(P(None, None, "tensor") for _ in parts)
        run = jax.shard_map(run, in_specs=(heads, slots, slots, P(), P(), P()), out_specs=(heads, slots),
                            check_vma=False)
    attended, parts = run(query, tuple(new), parts, jnp.reshape(layer, 1), positions, blocks)
    return attended, type(cache)(*parts)


def _attend(query, new, cache, layer, positions, blocks, *, block: int, interpret: bool):
    """Runs the kernel on one device's heads. Its grid is as long as the slots are filled."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    num_blocks, slot_of, block_of = blocks
    N, (_, B, K, S, H) = query.shape[2], cache[0].shape

    def slot_spec(*shape):
        return pl.BlockSpec((None, *shape), lambda i, layer, position, slot, block: (slot[i], *[0] * len(shape)))

    def cache_spec(part, size, window):
        def index(i, layer, position, slot, block):
            position = position[slot[i]]
            number = jax.lax.div(jnp.where(position < S, position, 0), size) if window else block[i]
            return (layer[0], slot[i], 0, number, 0)[: part.ndim]

        return pl.BlockSpec((None, None, K, size, H)[: part.ndim], index)

    windows = [cache_spec(part, WINDOW if part.ndim == 5 else SCALE_WINDOW, True) for part in cache]
    # The axis of the one position is last for scales, because their positions are lanes.
    new = [x.swapaxes(1, 2).astype(jnp.float32) for x in new]
    groups = pltpu.VMEM((N, 128), jnp.float32)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4, grid=(num_blocks,),
        in_specs=[slot_spec(N, H), *[slot_spec(*x.shape[1:]) for x in new],
                  *[cache_spec(part, block, False) for part in cache]],
        out_specs=[slot_spec(N, H), *windows],
        scratch_shapes=[groups, groups, pltpu.VMEM((N, H), jnp.float32)])
    first, layers = 4 + 1 + len(new), len(cache[0])
    cost = pl.CostEstimate(flops=4 * B * N * S * H, transcendentals=B * N * S,
                           bytes_accessed=sum(part.size * part.dtype.itemsize // layers for part in cache))
    attended, *cache = pl.pallas_call(
        functools.partial(_kernel, length=S, block_size=block, num_parts=len(cache)),
        grid_spec=spec, name="attend_slots", interpret=interpret, cost_estimate=cost,  # of full slots
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query[:, 0], *cache)],
        input_output_aliases={first + i: 1 + i for i in range(len(cache))},
    )(layer, positions, slot_of, block_of, query[:, 0], *new, *cache)
    return attended[:, None], tuple(cache)


def _kernel(layer, positions, slots, blocks, query, *refs, length: int, block_size: int, num_parts: int):
    """Attends to one block of one slot."""
    from jax.experimental import pallas as pl

    new, cache, (out, *windows), (largest, total, weighted) = (
        refs[:num_parts], refs[num_parts : 2 * num_parts], refs[2 * num_parts : -3], refs[-3:])
    item = pl.program_id(0)
    position, block = positions[slots[item]], blocks[item]
    filled = jnp.where(position < length, position, 0)  # number of positions before the new one
    N, K = query.shape[0], cache[0].shape[0]
    G = N // K
    per_group = max(NUM_SUBLANES // G, 1) if NUM_SUBLANES % G == 0 else 1
    for start in range(0, K, per_group):
        heads = range(start, min(start + per_group, K))
        rows = slice(start * G, heads[-1] * G + G)
        _attend_block(query, new, cache, largest, total, weighted, rows, heads, G, block, block * block_size, filled)

    @pl.when(block == jax.lax.div(filled, block_size))
    def finish():
        out[...] = (weighted[...] / total[:, :1]).astype(out.dtype)
        for fresh, part, window in zip(new, cache, windows, strict=True):
            size = window.shape[1]
            start = pl.multiple_of(jax.lax.rem(filled, block_size) - jax.lax.rem(filled, size), size)
            old = part[:, pl.ds(start, size)].astype(jnp.float32)
            offset = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
            is_new = (offset == jax.lax.rem(position, size)) & (position < length)
            window[...] = jnp.where(is_new, fresh[...], old).astype(window.dtype)


def _attend_block(query, new, cache, largest, total, weighted, rows, heads, G, block, first, filled):
    """Attends to a block with some heads, whose query rows share registers: `[rows, positions]` of scores.

    A head's product has zeros in the rows of the other heads, so that their sum has the scores of all of them.
    """
    from jax.experimental import pallas as pl

    H, dtype = query.shape[1], query.dtype
    q = query[rows]
    row_head = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, q.shape, 0), G)
    has_scales = len(cache) == 4

    def own(number):
        return row_head == number

    @pl.when(block == 0)
    def start():
        keys, values = (jnp.zeros(q.shape, jnp.float32) for _ in range(2))
        for number, head in enumerate(heads):
            key, value = (new[part][head] * (new[part + 2][head : head + 1] if has_scales else 1) for part in (0, 1))
            keys, values = jnp.where(own(number), key, keys), jnp.where(own(number), value, values)
        score = (q.astype(jnp.float32) * keys).sum(axis=1, keepdims=True) * H**-0.5
        largest[rows] = jnp.broadcast_to(score, largest[rows].shape)
        total[rows] = jnp.ones_like(total[rows])
        weighted[rows] = values

    scores = 0.0
    for number, head in enumerate(heads):
        of_head = jax.lax.dot_general(jnp.where(own(number), q, 0), cache[0][head].astype(dtype),
                                      (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores += of_head * cache[2][head : head + 1] if has_scales else of_head
    column = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(column < filled, scores * H**-0.5, jnp.finfo(jnp.float32).min)
    before = largest[rows, :1]
    after = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights, kept = jnp.exp(scores - after), jnp.exp(before - after)
    result = jnp.zeros(q.shape, jnp.float32)
    for number, head in enumerate(heads):
        scaled = weights * cache[3][head : head + 1] if has_scales else weights
        of_head = jnp.dot(scaled.astype(dtype), cache[1][head].astype(dtype), preferred_element_type=jnp.float32)
        result = jnp.where(own(number), of_head, result)
    largest[rows] = jnp.broadcast_to(after, largest[rows].shape)
    total[rows] = total[rows] * kept + weights.sum(axis=1, keepdims=True)
    weighted[rows] = weighted[rows] * kept + result
