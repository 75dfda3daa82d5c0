"""Implements the key-value cache of a server's slots: written at any position, and read as far as it is filled.

Attention reads the cache in blocks of BLOCK positions, up to the longest row, with a running softmax
(FlashAttention, arXiv:2205.14135, algorithm 1). A block that a row does not attend to leaves the row's bits unchanged,
so a row's result does not depend on the lengths of the other rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from llava_jax.models import slot_kernel

BLOCK = 128
"""Number of positions that attention reads at once. The number of positions of a cache is a multiple of it."""


class SlotCache(NamedTuple):
    """Keys and values of all layers and slots. An int8 cache has one scale, float32, for each head and position."""

    keys: Float[Array, "L B K S H"] | Int8[Array, "L B K S H"]
    values: Float[Array, "L B K S H"] | Int8[Array, "L B K S H"]
    key_scales: Float[Array, "L B K S"] | None = None
    value_scales: Float[Array, "L B K S"] | None = None

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.keys.shape[3]

    @classmethod
    def zeros(cls, layers: int, slots: int, heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> "SlotCache":
        """Returns a cache for at least `length` positions; with scales if `dtype` is int8."""
        shape = layers, slots, heads, -(-length // BLOCK) * BLOCK, head_dim
        scales = [jnp.zeros(shape[:-1])] * 2 if jnp.dtype(dtype) == jnp.int8 else []
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    def copy(self, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""]) -> "SlotCache":
        """Copies the first `length` positions of a slot, rounded up to blocks, to another slot."""

        def copy_block(block, cache):
            def copied(part):
                start, sizes = (0, 0, 0, block * BLOCK, 0)[: part.ndim], list(part.shape)
                sizes[1], sizes[3] = 1, BLOCK
                read = jax.lax.dynamic_slice(part, (0, source, *start[2:]), sizes)
                return jax.lax.dynamic_update_slice(part, read, (0, target, *start[2:]))

            return jax.tree.map(copied, cache)

        return jax.lax.fori_loop(0, -(-length // BLOCK), copy_block, self)


class SlotAttention:
    """Writes keys and values into the slots of a cache, and attends to them: the `attend` of `Llama.extend`.

    Args:
      positions: position of each new token; at least S for padding, which is not written.
      slots: slot of each row, B for a row of padding; None if row i is slot i.
      kernel: whether a Pallas kernel for TPUs computes it, for one token in every slot.
    """

    def __init__(self, positions: Int[Array, "R T"], cache: SlotCache, slots: Int[Array, "R"] | None = None,
                 kernel: bool = False):
        self.positions, self.slots = positions, slots
        self.rows = jnp.arange(len(positions)) if slots is None else slots
        self.blocks = slot_kernel.blocks_to_read(positions[:, 0], cache) if kernel else None
        last = jnp.max(jnp.where(positions < cache.length, positions, 0))
        self.num_blocks = last // BLOCK + 1

    def __call__(self, query: Float[Array, "R T N H"], key: Float[Array, "R T K H"], value: Float[Array, "R T K H"],
                 cache: SlotCache, layer: Int[Array, ""] | int) -> tuple[Float[Array, "R T N H"], SlotCache]:
        """Returns what the new tokens read, and the cache with their keys and values."""
        new = (key, value)
        if cache.key_scales is not None:
            (keys, key_scales), (values, value_scales) = quantize(key), quantize(value)
            new = (keys, values, key_scales, value_scales)
        if self.blocks is not None:
            return slot_kernel.attend_slots(query, new, cache, layer, self.positions[:, 0], self.blocks)
        cache = self._write(cache, layer, SlotCache(*new))
        R, T, N, H = query.shape
        K = key.shape[2]
        query = query.reshape(R, T, K, N // K, H).swapaxes(1, 2).reshape(R, K, -1, H)
        positions = jnp.repeat(self.positions, N // K, axis=1)[:, None, :, None]

        def read_block(block, carry):
            largest, total, weighted = carry
            k, v, k_scale, v_scale = (self._block(part, layer, block) for part in cache)
            scores = jnp.einsum("RKSH,RKQH->RKSQ", k.astype(query.dtype), query, preferred_element_type=jnp.float32)
            scores = scores.swapaxes(2, 3) * H**-0.5
            if k_scale is not None:
                scores = scores * k_scale[:, :, None]
            visible = block * BLOCK + jnp.arange(BLOCK) <= positions
            scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
            new_largest = jnp.maximum(largest, scores.max(-1))
            weights = jnp.exp(scores - new_largest[..., None])
            kept = jnp.exp(largest - new_largest)
            total = total * kept + weights.sum(-1)
            if v_scale is not None:
                weights = weights * v_scale[:, :, None]
            new = jnp.einsum("RKQS,RKSH->RKQH", weights.astype(query.dtype), v.astype(query.dtype),
                             preferred_element_type=jnp.float32)
            return new_largest, total, weighted * kept[..., None] + new

        shape = query.shape[:3]
        carry = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape), jnp.zeros(query.shape)
        _, total, weighted = jax.lax.fori_loop(0, self.num_blocks, read_block, carry)
        read = (weighted / total[..., None]).astype(query.dtype)
        return read.reshape(R, K, T, -1, H).swapaxes(1, 2).reshape(R, T, N, H), cache

    def _write(self, cache: SlotCache, layer, new: SlotCache) -> SlotCache:
        # Indices for all axes but the last, because XLA for TPUs copied the whole cache for a slice of the heads.
        index = layer, self.rows[:, None, None], jnp.arange(new.keys.shape[2])[:, None], self.positions[:, None]
        return jax.tree.map(lambda old, x: old.at[index].set(x.swapaxes(1, 2), mode="drop"), cache, new)

    def _block(self, part: Array | None, layer, block) -> Array | None:
        """Returns a block of positions of the rows' slots."""
        if part is None:
            return None
        def read(slot, count):
            start, sizes = (layer, slot, 0, block * BLOCK, 0), (1, count, part.shape[2], BLOCK, *part.shape[4:])
            return jax.lax.dynamic_slice(part, start[: part.ndim], sizes)[0]

        if self.slots is None:
            return read(0, part.shape[1])
        return jnp.concatenate([read(slot, 1) for slot in self.slots])


def quantize(x: Float[Array, "R T K H"]) -> tuple[Array, Array]:
    """Returns int8 codes of `x`, and the scale of each head and position, float32 [R, T, K]."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale
