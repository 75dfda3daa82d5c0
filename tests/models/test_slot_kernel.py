"""The kernel of a decode step against plain attention over the values that the cache has after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import slot_kernel
from llava_jax.models.dot_product import attention
from llava_jax.models.slot_cache import SlotAttention, SlotCache


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(slot_kernel, "attend_slots", functools.partial(slot_kernel.attend_slots, interpret=True))


def filled(num_layers, slots, heads, length, head_dim, dtype):
    """A cache whose every position has a random key and value, and the same arrays for plain attention."""
    cache, rng = SlotCache.zeros(num_layers, slots, heads, length, head_dim, dtype), np.random.default_rng(0)

    def random(x):
        if x.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, x.shape), jnp.int8)
        return jnp.asarray(rng.normal(size=x.shape) if x.ndim == 5 else rng.uniform(0, 0.02, x.shape), x.dtype)

    return jax.tree.map(random, cache)


def plain(query, cache, layer, positions):
    keys, values = (part[layer].astype(jnp.float32) for part in (cache.keys, cache.values))
    if cache.key_scales is not None:
        keys, values = keys * cache.key_scales[layer, ..., None], values * cache.value_scales[layer, ..., None]
    mask = jnp.arange(cache.length) <= positions[:, None, None]
    return attention(query, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (12, 12), (8, 2), (6, 2), (16, 1)])
def test_the_kernel_reads_every_position_of_its_slot(monkeypatch, dtype, num_heads, num_kv_heads):
    """Slots of one token, up to the edges of blocks, full, and free, in any order; groups of heads of any size."""
    monkeypatch.setattr(slot_kernel, "MAX_BLOCK_BYTES", 0)  # blocks of 128
    length, head_dim, rng = 384, 16, np.random.default_rng(1)
    positions = jnp.array([127, 0, 383, 500, 128, 130, 1, 384, 255])
    B, free = len(positions), np.array([3, 7])
    query = jnp.asarray(rng.normal(size=(B, 1, num_heads, head_dim)), jnp.float32)
    new = [jnp.asarray(rng.normal(size=(B, 1, num_kv_heads, head_dim)), jnp.float32) for _ in range(2)]
    before = filled(2, B, num_kv_heads, length, head_dim, dtype)
    expected = SlotAttention(positions[:, None], before)(query, *new, before, 1)[1]  # what XLA writes
    read, after = SlotAttention(positions[:, None], before, kernel=True)(query, *new, before, 1)
    for part, other, old in zip(after, expected, before, strict=True):
        if part is not None:
            np.testing.assert_array_equal(part, other)
            np.testing.assert_array_equal(part[:, free], old[:, free])
            assert np.asarray(part[1] != old[1]).any(axis=tuple(range(1, part.ndim - 1))).sum() == B - len(free)
    used = np.delete(np.arange(B), free)
    np.testing.assert_allclose(read[used], plain(query, after, 1, positions)[used], atol=2e-6)
    assert np.isfinite(read).all()


def test_no_bit_depends_on_other_slots():
    cache, rng = filled(1, 4, 2, 256, 16, "float32"), np.random.default_rng(2)
    query, key, value = (jnp.asarray(rng.normal(size=(4, 1, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    reads = [SlotAttention(jnp.array(positions)[:, None], cache, kernel=True)(query, key, value, cache, 0)[0][1]
             for positions in ([3, 200, 0, 256], [255, 200, 256, 17])]
    np.testing.assert_array_equal(*reads)


def test_a_block_is_long_enough_for_the_full_rate_and_divides_the_cache():
    for heads, length, dtype, expected in ((8, 4096, "bfloat16", 512), (32, 4096, "int8", 256), (8, 4096, "int8", 1024),
                                           (8, 640, "bfloat16", 128), (64, 4096, "float32", 128)):
        cache = jax.eval_shape(lambda: SlotCache.zeros(1, 1, heads, length, 128, dtype))  # noqa: B023
        assert slot_kernel.block_size(cache) == expected
