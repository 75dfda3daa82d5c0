"""CLIP's vision transformer, as far as LLaVA reads it: hidden states, no pooling head."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.models.attention import full
from llava_jax.models.layers import LayerNorm, Linear, gather, moments, normal, scan, stack

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a CLIP vision tower; the defaults are CLIP ViT-L/14-336's."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    intermediate_size: int = 4096
    layers: int = 24
    heads: int = 16
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(f"vision activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise UserError(f"vision width {self.width} does not divide into {self.heads} heads")
        if self.image_size < self.patch_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side; a rest of the image that fills no patch is not seen (as in CLIP's convolution)."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


class Attention(nnx.Module):
    """The parameters as checkpoints have them; `JoinedAttention` computes with them."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        heads = (config.heads, config.width // config.heads)
        self.query = Linear([config.width], heads, bias=True, rngs=rngs)
        self.key = Linear([config.width], heads, bias=True, rngs=rngs)
        self.value = Linear([config.width], heads, bias=True, rngs=rngs)
        self.out = Linear(heads, [config.width], bias=True, rngs=rngs)


class JoinedAttention(nnx.Module):
    """Stacked layers' attention, with queries, keys and values from one product: they lie side by side."""

    def __init__(self, parts: Attention):
        linears = (parts.query, parts.key, parts.value)
        self.inputs, self.out = copy.copy(parts.query), parts.out
        self.inputs.kernel = _side_by_side([part.kernel for part in linears])
        self.inputs.bias = _side_by_side([part.bias for part in linears])
        self.inputs.outputs = self.inputs.bias.shape[1:]

    def __call__(self, x: Float[Array, "B P D"], attend: Callable) -> Float[Array, "B P D"]:
        return self.out(attend(self.inputs(x)))


def _side_by_side(arrays: list[nnx.Param]) -> nnx.Param:
    """`[..., N, H]`, three times -> `[..., 3 N H]`."""
    return nnx.Param(jnp.concatenate([x[...].reshape(*x.shape[:-2], -1) for x in arrays], axis=-1))


class Mlp(nnx.Module):
    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = Linear([config.width], [config.intermediate_size], bias=True, rngs=rngs)
        self.down = Linear([config.intermediate_size], [config.width], bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, state: tuple[Array, tuple[Array, Array]], attend: Callable) -> tuple[Array, tuple[Array, Array]]:
        """`state`: the rows and their moments, which XLA computes with the product that comes before, not apart."""
        x, known = state
        x = x + self.attention(self.attention_norm(x, known), attend)
        x = x + self.mlp(self.mlp_norm(x))
        return x, moments(x)


class Vit(nnx.Module):
    """The tower. It holds all layers and the last norm, as its checkpoint does, and computes what is asked for."""

    def __init__(self, config: VitConfig, *, attention: str = "xla", remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        self.attention = attention
        self.remat = remat
        patch = [config.patch_size, config.patch_size, 3]
        self.patch = Linear(patch, [config.width], bias=False, rngs=rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (config.width,), jnp.float32))
        self.position_embedding = nnx.Param(normal(rngs.params(), (1 + config.patches, config.width), jnp.float32))
        self.pre_norm = LayerNorm(config.width, config.norm_eps)
        self.layers = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.post_norm = LayerNorm(config.width, config.norm_eps)

    def __call__(self, images: Float[Array, "B H W 3"], layer: int = -1) -> Float[Array, "B P+1 D"]:
        """Hidden states of the class token and the patches, in the images' dtype.

        `layer` counts as `hidden_states` does in transformers: 0 is the input of the first layer, `layers` or -1 the
        output of the last, before the last norm. LLaVA reads -2 (Visual Instruction Tuning, section 4.1).
        """
        config = self.config
        side, grid = config.patch_size, config.grid
        images = images[:, : grid * side, : grid * side]
        patches = images.reshape(-1, grid, side, grid, side, 3).swapaxes(2, 3).reshape(-1, grid**2, side, side, 3)
        x = self.patch(patches)
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, config.width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(x.dtype)
        x = self.pre_norm(x)
        layers = copy.copy(self.layers)
        layers.attention = JoinedAttention(layers.attention)
        # Gathered at once: the tower is small, and pieces of single layers would be too small to send.
        layers = gather(layers, depth(config, layer), x.dtype)
        attend = full(self.attention, config.heads)
        (x, _), _ = scan(layers, (x, moments(x)), call=lambda block, state: (block(state, attend), None),
                         remat=self.remat)
        return x


def depth(config: VitConfig, layer: int) -> int:
    """How many blocks must run for the hidden states of `layer`; UserError if the tower has no such layer."""
    if not -config.layers - 1 <= layer <= config.layers:
        raise UserError(f"feature_layer {layer}: the vision tower has {config.layers} layers, "
                         f"so it must lie in {-config.layers - 1}..{config.layers}")
    return layer % (config.layers + 1)
