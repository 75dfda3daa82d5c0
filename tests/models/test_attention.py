"""The Pallas kernels, interpreted on this machine, against plain attention; and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import attention


def inputs(length: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width), (2, length, kv_heads, width), (2, length, kv_heads, width)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_same_with_gradients(function, expected, arrays):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    got = jax.value_and_grad(lambda arrays: (function(*arrays) * weights).sum(), has_aux=False)(arrays)
    want = jax.value_and_grad(lambda arrays: (expected(*arrays) * weights).sum())(arrays)
    np.testing.assert_allclose(function(*arrays), expected(*arrays), atol=2e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "heads", "kv_heads", "width"), [(300, 4, 2, 128), (256, 2, 2, 64)])
def test_splash_sees_what_a_causal_mask_of_segments_shows(monkeypatch, length, heads, kv_heads, width):
    monkeypatch.setattr(attention, "BLOCKS", {"": 128})  # several blocks in a row
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], -(-length // 4), axis=1)[:, :length]
    for ids in (jnp.asarray(segments, jnp.int32), None):
        assert_same_with_gradients(
            lambda *arrays, ids=ids: attention._splash(*arrays, ids, interpret=True),
            attention.causal("xla", length, ids), inputs(length, heads, kv_heads, width))


@pytest.mark.parametrize(("length", "heads", "width"), [(37, 4, 64), (50, 3, 32), (16, 1, 128)])
def test_the_towers_kernel_sees_everything(length, heads, width):
    assert_same_with_gradients(lambda *arrays: attention._whole(*arrays, True), attention.attention,
                               inputs(length, heads, heads, width))


def test_auto_depends_on_the_platform_and_other_names_stand_for_themselves():
    assert [attention.resolve("auto", name) for name in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "xla"]
    assert attention.resolve("xla", "tpu") == "xla"
    with pytest.raises(ValueError, match="'flash' is not one of xla, splash, cudnn"):
        attention.causal("flash", 4)


def test_what_cannot_run_raises():
    q, k, v = inputs(16, 2, 2, 64)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        jax.block_until_ready(attention.causal("cudnn", 16)(q, k, v))
    with pytest.raises(ValueError):
        jax.block_until_ready(attention.causal("splash", 16)(q, k, v))
