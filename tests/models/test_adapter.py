"""Linear maps with an adapter beside the kernel, against kernels into which the adapter is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.models import llava
from llava_jax.models.layers import Linear
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text.encode import IMAGE_TOKEN_ID

CONFIG = LlavaConfig(
    vision=VisionConfig(28, 14, 32, 48, 3, 2), text=LlamaConfig(101, 64, 96, 2, 4, 2, 16), feature_layer=-2)
RANK, SCALE = 3, 0.5


class LowRank(nnx.Module):
    """`x @ lora_a @ lora_b`, scaled. With a number of layers, its parameters are stacked."""

    def __init__(self, rng, inputs, outputs, layers):
        self.lora_a = nnx.Param(jnp.asarray(rng.normal(size=(*layers, inputs, RANK)), jnp.float32))
        self.lora_b = nnx.Param(jnp.asarray(rng.normal(size=(*layers, RANK, outputs)), jnp.float32))

    def __call__(self, x):
        return x @ self.lora_a[...].astype(x.dtype) @ self.lora_b[...].astype(x.dtype) * SCALE


def linears(model):
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def adapt(model, wanted, rng):
    """Adds adapters to the linear maps whose paths contain a wanted name; returns the merged kernels by path."""
    merged = {}
    for path, linear in linears(model).items():
        if not any(name in path for name in wanted):
            continue
        layers = linear.kernel.shape[:1] if "layers/" in path else ()
        axes = len(layers) + linear.num_input_axes
        inputs = int(np.prod(linear.kernel.shape[len(layers) : axes]))
        linear.adapter = LowRank(rng, inputs, int(np.prod(linear.kernel.shape[axes:])), layers)
        delta = SCALE * linear.adapter.lora_a[...] @ linear.adapter.lora_b[...]
        merged[f"{path}/kernel"] = linear.kernel[...] + delta.reshape(linear.kernel.shape)
    return merged


@pytest.mark.parametrize("wanted", [
    ("vision/layers/attention/q_proj", "vision/layers/mlp", "projector"),  # fused with maps that have none
    ("vision/patch", "vision/layers/attention", "decoder/layers")])
def test_an_adapter_is_the_kernel_into_which_it_is_merged(wanted):
    rng = np.random.default_rng(0)
    base = {path: x if path.endswith("scale") else jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32)
            for path, x in llava.init_params(CONFIG).items()}
    plain = llava.abstract_params(CONFIG)[0]
    model = llava.from_params(plain, base)
    merged = adapt(model, wanted, rng)
    assert all(jnp.abs(merged[path] - base[path]).max() > 0.1 for path in merged)
    graph, adapted = llava.to_params(model)
    assert {path for path in adapted if "/adapter/lora_" in path} == adapted.keys() - base.keys() != set()

    tokens = rng.integers(0, 101, (2, 12)).astype(np.int32)
    tokens[:, 3:7] = IMAGE_TOKEN_ID
    images = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)

    def loss(graph, parameters):
        logits = llava.from_params(graph, parameters)(tokens, images)
        return jax.nn.log_softmax(logits)[..., 0].mean(), logits

    def run(graph, parameters):
        return jax.jit(jax.value_and_grad(lambda parameters: loss(graph, parameters), has_aux=True))(parameters)

    (_, expected), gradients = run(plain, base | merged)
    (_, found), by_adapter = run(graph, adapted)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())
    for path in merged:  # the gradient of a kernel, seen through one factor, is that of the other
        a, b = (adapted[path.replace("kernel", f"adapter/lora_{name}")] for name in "ab")
        seen = SCALE * jnp.einsum("...ir,...io->...ro", a, gradients[path].reshape(*a.shape[:-1], b.shape[-1]))
        np.testing.assert_allclose(by_adapter[path.replace("kernel", "adapter/lora_b")], seen,
                                   atol=2e-3 * float(jnp.abs(seen).max()))
