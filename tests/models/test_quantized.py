"""Quantised kernels: against qwix and the closed forms, in a matmul and its gradient, and their shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import PartitionSpec as P

from llava_jax.models import quantized
from llava_jax.parallel import sharding

QUERY, OUT = "decoder/layers/attention/q_proj/kernel", "decoder/layers/attention/o_proj/kernel"


def kernel(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape) * 0.1
    x[0, :, 1] = 0  # a block of zeros
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("path, shape, channels, tiles", [
    (QUERY, (2, 128, 3, 16), (0, 2, 3), {1: 64}), (OUT, (2, 3, 128, 16), (0, 1, 3), {2: 64}),
    (OUT, (2, 4, 24, 16), (0, 1, 3), {2: 8})])  # 24 numbers do not divide into 64
def test_nf4_is_that_of_qwix(path, shape, channels, tiles):
    x = kernel(shape)
    found = jax.jit(lambda x: quantized.quantize(path, x, "nf4"))(x)
    expected = qwix.quantize(x, "nf4", channelwise_axes=channels, tiled_axes=tiles)
    assert found.codes.dtype == jnp.uint4
    np.testing.assert_array_equal(found.codes, expected.qvalue)
    nonzero = np.asarray(expected.scale) != 1  # qwix's scale of zeros
    np.testing.assert_array_equal(np.asarray(found.scale)[nonzero], np.asarray(expected.scale)[nonzero])
    np.testing.assert_allclose(found.dequantize(jnp.float32), qwix.dequantize(expected), rtol=1e-6)


def test_int8_errs_by_half_a_step_and_nf4_by_half_a_gap():
    for dtype in ("float32", "bfloat16"):
        x = kernel((2, 128, 3, 16), dtype)
        exact, rounding = np.asarray(x, np.float64), 2.0**-8 if dtype == "bfloat16" else 1e-6
        q = quantized.quantize(QUERY, x, "int8")
        assert q.codes.dtype == jnp.int8 and q.scale.shape == (2, 1, 3, 16) and q.scale.dtype == x.dtype
        step = np.abs(exact).max(1, keepdims=True) / 127
        assert (np.abs(np.asarray(q.dequantize(jnp.float32)) - exact) <= step * (0.5 + 127 * rounding)).all()

        q = quantized.quantize(QUERY, x, "nf4")
        blocks = exact.reshape(2, 2, 64, 3, 16)
        largest = np.abs(blocks).max(2, keepdims=True)
        table = np.asarray(quantized.NF4)
        relative = blocks / np.where(largest, largest, 1)
        nearest = table[np.abs(relative[..., None] - table).argmin(-1)] * largest
        error = np.abs(np.asarray(q.dequantize(jnp.float32), np.float64).reshape(blocks.shape) - nearest)
        assert (error <= 1e-6 * largest).all()


def test_a_matmul_and_its_gradient_are_those_of_the_dequantised_kernel():
    q = quantized.quantize(OUT, kernel((2, 3, 64, 16)), "nf4")
    one = jax.tree.map(lambda x: x[1], q)
    dense = one.dequantize(jnp.float32).reshape(-1, 16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3 * 64)), jnp.float32)
    found, vjp = jax.vjp(lambda x: quantized.quantized_matmul(x, one), x)
    np.testing.assert_allclose(found, x @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(found)[0], found @ dense.T, rtol=1e-5, atol=1e-5)


def test_int8_matrices_are_int8_as_matrices():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3 * 64)), jnp.bfloat16)
    for path, shape in ((QUERY, (2, 3 * 64, 4, 16)), (OUT, (2, 3, 64, 16))):
        plain = quantized.store_kernel(path, kernel(shape), "int8")
        flat = quantized.store_kernel(path, kernel(shape), "int8_matrices")
        assert flat.shape[:2] == (2, 3 * 64) and flat.scale.shape == (2, 1, flat.shape[2])
        np.testing.assert_array_equal(flat.dequantize(jnp.float32), plain.dequantize(jnp.float32).reshape(flat.shape))
        found = quantized.quantized_matmul(x, jax.tree.map(lambda x: x[1], flat))
        exact = np.asarray(x, np.float64) @ np.asarray(flat.dequantize(jnp.float32)[1], np.float64)
        assert (np.abs(np.asarray(found, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 1e-6).all()  # rounded once
        found = quantized.quantized_matmul(x.astype("float32"), jax.tree.map(lambda x: x[1], flat))
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_scales_are_sharded_as_the_kernel_where_they_divide():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    for path, shape, kind, expected in [
            (QUERY, (2, 256, 4, 16), "nf4", P(None, "fsdp", "tensor", None)),
            (QUERY, (2, 128, 4, 16), "nf4", P(None, None, "tensor", None)),  # 2 blocks on 4 devices
            (QUERY, (2, 128, 4, 16), "int8", P(None, None, "tensor", None)),
            (OUT, (2, 4, 16, 64), "int8", P(None, None, None, "fsdp"))]:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.parameter_shardings({path: shape}, mesh)[path])
        found = quantized.abstract_quantized(path, x, kind)
        assert found.codes.sharding == x.sharding and found.scale.sharding.spec == expected
        assert found.codes.shape == shape
    for path, shape, codes, scale in [
            (QUERY, (2, 128, 4, 16), P(None, "fsdp", "tensor"), P(None, None, "tensor")),
            (OUT, (2, 4, 16, 64), P(None, "tensor", "fsdp"), P(None, None, "fsdp"))]:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.parameter_shardings({path: shape}, mesh)[path])
        found = quantized.abstract_quantized(path, x, "int8_matrices")
        assert found.codes.sharding.spec == codes and found.scale.sharding.spec == scale
