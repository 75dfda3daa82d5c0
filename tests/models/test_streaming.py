"""Matmuls that read a layer's kernel in place, against the same matmul of the sliced layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models import streaming
from llava_jax.models.quantized import quantize, quantized_matmul
from llava_jax.models.streaming import LayerKernel, layer_matmul


@pytest.mark.parametrize("kind", ["matrices", "int8_matrices"])
@pytest.mark.parametrize(("inputs", "block"), [(512, 128), (96, 32)])
def test_a_layer_is_multiplied_in_place(monkeypatch, kind, inputs, block):
    """Blocks of 128 rows, or of 32 where these do not divide the inputs."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 0)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, inputs)), jnp.float32)
    stack = jnp.asarray(rng.normal(size=(3, inputs, 256)), jnp.float32)
    expected = x @ stack[1]
    if kind == "int8_matrices":
        stack = quantize("decoder/layers/mlp/up_proj/kernel", stack, kind)
        expected = quantized_matmul(x, jax.tree.map(lambda part: part[1], stack))
    kernels = []
    monkeypatch.setattr(streaming, "_stream", lambda *args, run=streaming._stream, **options: (
        kernels.append(options["block"]), run(*args, **options))[1])
    found = jax.jit(lambda x, stack, layer: layer_matmul(x, LayerKernel(stack, layer), False, True))(x, stack, 1)
    assert kernels == [block]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits_input", [False, True])
def test_blocks_are_as_large_where_devices_share_a_kernel(monkeypatch, splits_input):
    """VMEM of a v5e does not have two blocks of 8 MiB, which o_proj of 70B once had on 8 devices."""
    blocks = []
    monkeypatch.setattr(streaming, "_stream", lambda x, layer, kernel, block, interpret: (
        blocks.append(block * kernel[0, 0].nbytes), x @ kernel[0])[1])
    mesh = jax.sharding.AbstractMesh((1, 1, 8), ("data", "fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda x, stack: layer_matmul(x, LayerKernel(stack, 0), splits_input),
                       jax.ShapeDtypeStruct((1, 8192), "bfloat16"), jax.ShapeDtypeStruct((2, 8192, 8192), "bfloat16"))
    assert blocks == [2**20 if not splits_input else 128 * 2 * 8192]


def test_a_block_is_contiguous_and_at_least_as_high_as_tiles():
    assert streaming._block_rows(4096, 2 * 1024) == 512
    assert streaming._block_rows(2752, 2 * 4096) == 64  # 43 x 64, of which 128 is no part
    assert streaming._block_rows(4096, 2 * 22016) == 128
    assert streaming._block_rows(40, 2 * 4096) is None
