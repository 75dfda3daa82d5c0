"""Implements the projector from the vision tower's features to the decoder's embedding space."""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.models.layers import Linear

MERGE = "merge2x2_"
"""Prefix of the types that read 2 x 2 neighbouring patches as one visual token."""


def depth(kind: str) -> int:
    """Returns the number of linear layers: `identity` 0, `linear` 1, `mlpNx_gelu` N. Raises UserError otherwise."""
    if kind == "identity":
        return 0
    if match := re.fullmatch(rf"(?:{MERGE})?(?:linear|mlp([1-9]\d?)x_gelu)", kind):
        return int(match[1] or 1)
    raise UserError(f"projector {kind!r} is not one of identity, linear, mlp2x_gelu (or any mlpNx_gelu), "
                    f"{MERGE}linear, {MERGE}mlp2x_gelu")


def merge_size(kind: str) -> int:
    """Returns the number of patches along one side of a visual token: 2 for `merge2x2_*`, otherwise 1."""
    return 2 if kind.startswith(MERGE) else 1


def merge_patches(x: Float[Array, "... I*P D"], grid: int) -> Float[Array, "... I*P/4 4*D"]:
    """Joins the features of 2 x 2 neighbouring patches of each tile, in reading order.

    `grid` is the number of patches along one side of a tile, an even number, so no square crosses two tiles.
    """
    squares = x.reshape(*x.shape[:-2], -1, 2, grid // 2, 2, x.shape[-1]).swapaxes(-4, -3)
    return squares.reshape(*x.shape[:-2], x.shape[-2] // 4, 4 * x.shape[-1])


def torch_uniform(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch.nn.Linear's default, which LLaVA's projector uses."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Projector(nnx.Module):
    """Linear layers with exact (erf) GELU between them: `linear` is the paper's, `mlp2x_gelu` is LLaVA-1.5's.

    With `merge2x2_`, the first layer reads 2 x 2 patches, so an image has a quarter of the visual tokens.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, grid: int, *, rngs: nnx.Rngs):
        self.count, self.grid = depth(kind), grid
        self.merges = merge_size(kind) > 1
        inputs *= merge_size(kind) ** 2
        if self.count == 0 and inputs != outputs:
            raise UserError(f"projector identity: hidden_size {inputs} of the vision tower and {outputs} of the "
                            "decoder differ")
        for i in range(self.count):
            fan_in = inputs if i == 0 else outputs
            linear = Linear([fan_in], [outputs], bias=True, rngs=rngs, init=torch_uniform)
            linear.bias = nnx.Param(torch_uniform(rngs.params(), (fan_in, outputs), jnp.float32)[0])
            setattr(self, f"layers_{i}", linear)

    def __call__(self, x: Float[Array, "... P D"]) -> Float[Array, "... Q E"]:
        if self.merges:
            x = merge_patches(x, self.grid)
        for i in range(self.count):
            if i > 0:
                x = jax.nn.gelu(x, approximate=False)
            x = getattr(self, f"layers_{i}")(x)
        return x
