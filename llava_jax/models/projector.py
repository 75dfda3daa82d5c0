"""Implements the projector from the vision tower's features to the decoder's embedding space."""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.models.layers import Linear


def depth(kind: str) -> int:
    """Returns the number of linear layers: `identity` 0, `linear` 1, `mlpNx_gelu` N. Raises UserError otherwise."""
    if kind in ("identity", "linear"):
        return 0 if kind == "identity" else 1
    if match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind):
        return int(match[1])
    raise UserError(f"projector {kind!r} is not one of identity, linear, mlp2x_gelu (or any mlpNx_gelu)")


def torch_uniform(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch.nn.Linear's default, which LLaVA's projector uses."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Projector(nnx.Module):
    """Linear layers with exact (erf) GELU between them: `linear` is the paper's, `mlp2x_gelu` is LLaVA-1.5's."""

    def __init__(self, kind: str, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.count = depth(kind)
        if self.count == 0 and inputs != outputs:
            raise UserError(f"projector identity: hidden_size {inputs} of the vision tower and {outputs} of the "
                            "decoder differ")
        for i in range(self.count):
            fan_in = inputs if i == 0 else outputs
            linear = Linear([fan_in], [outputs], bias=True, rngs=rngs, init=torch_uniform)
            linear.bias = nnx.Param(torch_uniform(rngs.params(), (fan_in, outputs), jnp.float32)[0])
            setattr(self, f"layers_{i}", linear)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        for i in range(self.count):
            if i > 0:
                x = jax.nn.gelu(x, approximate=False)
            x = getattr(self, f"layers_{i}")(x)
        return x
