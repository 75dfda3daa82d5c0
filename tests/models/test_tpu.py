"""The gated MLP's form for TPUs against the plain one: values and gradients, also of adapters and quantized kernels."""

import jax
import numpy as np
import pytest
from flax import nnx

from llava_jax.config import Lora
from llava_jax.models import tpu
from llava_jax.models.layers import Linear
from llava_jax.models.lora import LoraAdapter
from llava_jax.models.quantized import quantize


def make_down(kind: str) -> Linear:
    down = Linear([24], [16], bias=True, rngs=nnx.Rngs(1))
    if kind == "lora":
        a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(24, 4), (4, 16)]))
        down.adapter = LoraAdapter(Lora(rank=4), a, b)
    if kind == "int8":
        stacked = quantize("decoder/layers/mlp/down_proj/kernel", down.kernel[...][None], "int8")
        down.kernel = nnx.Param(jax.tree.map(lambda x: x[0], stacked))
    return down


@pytest.mark.parametrize("kind", ["plain", "lora", "int8"])
def test_the_gated_mlp_has_the_values_and_gradients_of_the_plain_one(kind):
    down, shape = make_down(kind), (2, 8, 24)
    gate, up, g = (jax.random.normal(jax.random.key(i), shape) for i in range(2, 5))
    plain, plain_vjp = jax.vjp(lambda down, gate, up: down(jax.nn.silu(gate) * up), down, gate, up)
    found, found_vjp = jax.vjp(tpu.gated_down, down, gate, up)
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)
    for x, y in zip(*(jax.tree.leaves(vjp(g[..., :16])) for vjp in (found_vjp, plain_vjp)), strict=True):
        assert x.dtype == y.dtype
        if x.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
