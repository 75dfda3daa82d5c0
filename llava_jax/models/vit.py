"""Implements the vision transformers of CLIP and SigLIP up to their hidden states. LLaVA reads no pooling head."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from llava_jax.errors import UserError
from llava_jax.models.attention import bidirectional_attention
from llava_jax.models.layers import LayerNorm, Linear, fuse, mean_and_variance, normal, replicate_layers, scan, stack

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower. The defaults are those of CLIP ViT-L/14-336.

    SigLIP has `patch_bias`, but neither `class_token` nor `pre_norm`.
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    activation: str = "quick_gelu"
    """Activation of the MLP, a key of ACTIVATIONS."""
    norm_eps: float = 1e-5
    class_token: bool = True
    """Whether a class token precedes the patches."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    pre_norm: bool = True
    """Whether a norm precedes the first layer."""

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(f"vision activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}")
        if self.image_size < self.patch_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Number of patches along one side. Pixels beyond the last complete patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid**2

    @property
    def num_tokens(self) -> int:
        """Number of hidden states of one image: patches and the class token."""
        return self.patches + self.class_token


class VisionAttention(nnx.Module):
    """Parameters of attention as checkpoints store them. `FusedAttention` computes with them."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        self.q_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.k_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.v_proj = Linear([config.hidden_size], heads, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, [config.hidden_size], bias=True, rngs=rngs)


class FusedAttention(nnx.Module):
    """Attention of stacked layers with one matmul for queries, keys and values."""

    def __init__(self, parts: VisionAttention):
        self.qkv_proj, self.o_proj = fuse([parts.q_proj, parts.k_proj, parts.v_proj]), parts.o_proj

    def __call__(self, x: Float[Array, "B P D"], attend: Callable) -> Float[Array, "B P D"]:
        return self.o_proj(attend(self.qkv_proj(x)))


class VisionMlp(nnx.Module):
    """The MLP `down_proj(activation(up_proj(x)))`."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up_proj = Linear([config.hidden_size], [config.intermediate_size], bias=True, rngs=rngs)
        self.down_proj = Linear([config.intermediate_size], [config.hidden_size], bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        # XLA for a v6e would compute both matmuls in one loop that takes 2.5 times as long.
        return self.down_proj(optimization_barrier(ACTIVATIONS[self.activation](self.up_proj(x))))


class VisionBlock(nnx.Module):
    """One layer of the vision tower: attention and MLP, each after a norm and with a residual."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = VisionMlp(config, rngs=rngs)

    def __call__(self, state: tuple[Array, tuple[Array, Array]], attend: Callable) -> tuple[Array, tuple[Array, Array]]:
        """Applies the block to `state`: hidden states, and their mean and variance.

        The statistics are carried, because XLA then fuses them with the matmul that computes the hidden states.
        """
        x, stats = state
        x = x + self.attention(self.attention_norm(x, stats), attend)
        x = x + self.mlp(self.mlp_norm(x))
        return x, mean_and_variance(x)


class Vit(nnx.Module):
    """The vision tower, with all layers and the last norm of its checkpoint. A call runs only the needed layers."""

    def __init__(self, config: VisionConfig, *, attention: str = "xla", remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        self.attention = attention
        self.remat = remat
        size, patch = config.hidden_size, [config.patch_size, config.patch_size, 3]
        self.patch = Linear(patch, [size], bias=config.patch_bias, rngs=rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (size,), jnp.float32)) if config.class_token else None
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.num_tokens, size), jnp.float32))
        self.pre_norm = LayerNorm(size, config.norm_eps) if config.pre_norm else None
        self.layers = stack(lambda rngs: VisionBlock(config, rngs=rngs), config.num_layers, rngs)
        self.post_norm = LayerNorm(size, config.norm_eps)

    def __call__(self, images: Float[Array, "B H W 3"], layer: int = -1) -> Float[Array, "B P D"]:
        """Returns hidden states of the class token, if any, and of the patches, in the images' dtype.

        `layer` counts as `hidden_states` does in transformers: 0 is the input of the first layer, `num_layers` or -1
        the output of the last layer, before the last norm. LLaVA reads -2 (Visual Instruction Tuning, section 4.1).
        """
        config = self.config
        side, grid = config.patch_size, config.grid
        images = images[:, : grid * side, : grid * side]
        patches = images.reshape(-1, grid, side, grid, side, 3).swapaxes(2, 3).reshape(-1, grid**2, side, side, 3)
        x = self.patch(patches)
        if self.class_embedding is not None:
            class_token = self.class_embedding[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(class_token, (x.shape[0], 1, config.hidden_size)), x], axis=1)
        x = x + self.position_embedding[...].astype(x.dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        layers = copy.copy(self.layers)
        layers.attention = FusedAttention(layers.attention)
        # Replicated before the scan, because shards of single layers would be too small to send efficiently.
        layers = replicate_layers(layers, depth(config, layer), x.dtype)
        attend = bidirectional_attention(self.attention, config.num_heads)
        (x, _), _ = scan(layers, (x, mean_and_variance(x)), call=lambda block, state: (block(state, attend), None),
                         remat=self.remat)
        return x


def depth(config: VisionConfig, layer: int) -> int:
    """Returns the number of blocks to run for hidden state `layer`. Raises UserError if the tower has no such layer."""
    if not -config.num_layers - 1 <= layer <= config.num_layers:
        raise UserError(f"feature_layer {layer}: the vision tower has {config.num_layers} layers, "
                        f"so it must be in {-config.num_layers - 1}..{config.num_layers}")
    return layer % (config.num_layers + 1)
