"""CLIP's vision transformer, as far as LLaVA reads it: hidden states, no pooling head."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.models.attention import bidirectional_attention
from llava_jax.models.layers import LayerNorm, Linear, mean_and_variance, normal, replicate_layers, scan, stack

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a CLIP vision tower; the defaults are CLIP ViT-L/14-336's."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(f"vision activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}")
        if self.image_size < self.patch_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along one side; a rest of the image that fills no patch is not seen (as in CLIP's convolution)."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


class VisionAttention(nnx.Module):
    """The parameters as checkpoints have them; `FusedAttention` computes with them."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        self.q_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.k_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.v_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, [config.hidden_size], bias=True, rngs=rngs)


class FusedAttention(nnx.Module):
    """Stacked layers' attention, with queries, keys and values from one product: they lie side by side."""

    def __init__(self, parts: VisionAttention):
        linears = (parts.q_proj, parts.k_proj, parts.v_proj)
        self.inputs, self.o_proj = copy.copy(parts.q_proj), parts.o_proj
        self.inputs.kernel = _side_by_side([part.kernel for part in linears])
        self.inputs.bias = _side_by_side([part.bias for part in linears])
        self.inputs.outputs = self.inputs.bias.shape[1:]

    def __call__(self, x: Float[Array, "B P D"], attend: Callable) -> Float[Array, "B P D"]:
        return self.o_proj(attend(self.inputs(x)))


def _side_by_side(arrays: list[nnx.Param]) -> nnx.Param:
    """`[..., N, H]`, three times -> `[..., 3 N H]`."""
    return nnx.Param(jnp.concatenate([x[...].reshape(*x.shape[:-2], -1) for x in arrays], axis=-1))


class VisionMlp(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up_proj = Linear([config.hidden_size], [config.intermediate_size], bias=True, rngs=rngs)
        self.down_proj = Linear([config.intermediate_size], [config.hidden_size], bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = VisionMlp(config, rngs=rngs)

    def __call__(self, state: tuple[Array, tuple[Array, Array]], attend: Callable) -> tuple[Array, tuple[Array, Array]]:
        """`state`: the rows and their moments, which XLA computes with the product that comes before, not apart."""
        x, stats = state
        x = x + self.attention(self.attention_norm(x, stats), attend)
        x = x + self.mlp(self.mlp_norm(x))
        return x, mean_and_variance(x)


class Vit(nnx.Module):
    """The tower. It holds all layers and the last norm, as its checkpoint does, and computes what is asked for."""

    def __init__(self, config: VisionConfig, *, attention: str = "xla", remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        self.attention = attention
        self.remat = remat
        patch = [config.patch_size, config.patch_size, 3]
        self.patch = Linear(patch, [config.hidden_size], bias=False, rngs=rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (config.hidden_size,), jnp.float32))
        positions = (1 + config.patches, config.hidden_size)
        self.position_embedding = nnx.Param(normal(rngs.params(), positions, jnp.float32))
        self.pre_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = stack(lambda rngs: VisionBlock(config, rngs=rngs), config.num_layers, rngs)
        self.post_norm = LayerNorm(config.hidden_size, config.norm_eps)

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
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, config.hidden_size))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(x.dtype)
        x = self.pre_norm(x)
        layers = copy.copy(self.layers)
        layers.attention = FusedAttention(layers.attention)
        # Gathered at once: the tower is small, and pieces of single layers would be too small to send.
        layers = replicate_layers(layers, depth(config, layer), x.dtype)
        attend = bidirectional_attention(self.attention, config.num_heads)
        (x, _), _ = scan(layers, (x, mean_and_variance(x)), call=lambda block, state: (block(state, attend), None),
                         remat=self.remat)
        return x


def depth(config: VisionConfig, layer: int) -> int:
    """How many blocks must run for the hidden states of `layer`; UserError if the tower has no such layer."""
    if not -config.num_layers - 1 <= layer <= config.num_layers:
        raise UserError(f"feature_layer {layer}: the vision tower has {config.num_layers} layers, "
                         f"so it must lie in {-config.num_layers - 1}..{config.num_layers}")
    return layer % (config.num_layers + 1)
