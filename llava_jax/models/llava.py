"""LLaVA: projected visual features replace a prompt's image tokens (Visual Instruction Tuning, section 4.1)."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.images import SIGLIP_MEAN, SIGLIP_STD, ImageProcessor
from llava_jax.models import lora, vit
from llava_jax.models.attention import resolve
from llava_jax.models.llama import Llama, LlamaConfig
from llava_jax.models.pallas import supports_tower
from llava_jax.models.projector import Projector, merge_size
from llava_jax.models.vit import VisionConfig, Vit
from llava_jax.text.encode import IMAGE_TOKEN_ID
from llava_jax.video import VideoSampling


@dataclass(frozen=True)
class LlavaConfig:
    """Settings that a checkpoint fixes: model sizes, selected features, image processor and conversation template."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: LlamaConfig = field(default_factory=LlamaConfig)
    projector: str = "mlp2x_gelu"
    """Type of the projector (models/projector.py)."""
    feature_layer: int = -2
    """Index of the vision tower's hidden state that the projector reads, as transformers' `vision_feature_layer`."""
    feature_select: str = "patch"
    """Features that the projector reads: `patch`, or `cls_patch` with the class token before the patches."""
    processor: ImageProcessor | None = None
    """Image processor; by default CLIP's statistics with mode pad, or SigLIP's with mode resize."""
    template: str = "vicuna_v1"
    """Name of the conversation template (text/templates.py)."""
    exif: bool = False
    """Whether the model was trained on images rotated as their EXIF orientation says."""
    video: VideoSampling = VideoSampling()
    """Frames that are sampled of a video."""
    lora: Lora | None = None
    """Low-rank adapters of the model's linear maps (models/lora.py)."""
    merged: str = ""
    """Adapters that were merged into the kernels, for readers; "" for none."""

    def __post_init__(self):
        if self.feature_select not in ("patch", "cls_patch"):
            raise UserError(f"feature_select {self.feature_select!r} is neither patch nor cls_patch")
        vit.depth(self.vision, self.feature_layer)
        merge, grid = merge_size(self.projector), self.vision.grid
        expected = {"size": self.vision.image_size, "patches": grid // merge,
                    "class_token": self.feature_select == "cls_patch"}
        if self.feature_select == "cls_patch" and not self.vision.class_token:
            raise UserError("feature_select cls_patch: the vision tower has no class token")
        if merge > 1 and (grid % merge or self.feature_select == "cls_patch"):
            raise UserError(f"projector {self.projector} joins 2 x 2 patches: the vision tower has {grid} x {grid} and "
                            f"feature_select is {self.feature_select}; an even number and patch are needed")
        if self.processor is None:
            siglip = {} if self.vision.class_token else {"mode": "resize", "mean": SIGLIP_MEAN, "std": SIGLIP_STD}
            object.__setattr__(self, "processor", ImageProcessor(**expected, **siglip))
        for name, value in expected.items():
            if (actual := getattr(self.processor, name)) != value:
                raise UserError(f"processor.{name} is {actual}, but {value} suits vision, projector and feature_select")

    def with_image_mode(self, mode: str | None, pinpoints: str = "") -> "LlavaConfig":
        """Returns the configuration with another image mode (`ImageProcessor.with_mode`); None changes nothing."""
        return self if mode is None else replace(self, processor=self.processor.with_mode(mode, pinpoints))


class AttentionChoice(NamedTuple):
    """Attention implementations (models/attention.py) of the decoder and of the vision tower."""

    decoder: str
    vision: str

    def __str__(self) -> str:
        return self.decoder if self.decoder == self.vision else f"{self.decoder} (vision tower {self.vision})"


def choose_attention(name: str, platform: str, config: LlavaConfig, dtype: str) -> AttentionChoice:
    """Chooses the attention implementations of a model on a platform.

    With `auto`, each part uses the platform's implementation if that supports its sizes and dtype, otherwise xla. Both
    parts use any other name, and the model raises an error where it cannot run.
    """
    chosen = resolve(name, platform)
    if name != "auto" or chosen == "xla":
        return AttentionChoice(chosen, chosen)
    vision_head_dim = config.vision.hidden_size // config.vision.num_heads
    if chosen == "splash":
        supported = supports_tower(config.vision.hidden_size, config.vision.num_heads)
        return AttentionChoice(chosen, chosen if supported else "xla")
    # cuDNN's flash attention needs 16 bits, and a head_dim of at most 128 (256 from Hopper on) that 8 divides.
    supported = [dtype != "float32" and head_dim <= 128 and head_dim % 8 == 0
                 for head_dim in (config.text.head_dim, vision_head_dim)]
    return AttentionChoice(*(chosen if is_supported else "xla" for is_supported in supported))


class LlavaModel(nnx.Module):
    """LLaVA: vision tower, projector and decoder.

    `dtype` is the compute dtype, to which parameters are cast where they are used. `attention` names an implementation
    of models/attention.py, and `remat` a policy of `layers.REMAT`.
    """

    def __init__(self, config: LlavaConfig, *, dtype: str = "float32", attention: str | AttentionChoice = "xla",
                 remat: str = "none", rngs: nnx.Rngs):
        attention = attention if isinstance(attention, AttentionChoice) else AttentionChoice(attention, attention)
        self.config = config
        self.dtype = dtype
        self.vision = Vit(config.vision, attention=attention.vision, remat=remat, rngs=rngs)
        self.projector = _projector(config, rngs)
        self.decoder = Llama(config.text, attention=attention.decoder, remat=remat, rngs=rngs)
        if config.processor.has_newline:
            self.image_newline = _image_newline(config.text.hidden_size, rngs)
        if config.lora is not None:
            lora.add_adapters(self, config.lora, rngs.params())

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        tiles: Float[Array, "B I H W 3"] | UInt8[Array, "B I H W 3"] | None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        visual_index: Int[Array, "B T"] | Int[Array, "B T 4"] | None = None,
        visual_weight: Float[Array, "B T 4"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of the next token, float32. The arguments are those of `hidden`."""
        return self.decoder.logits(self.hidden(tokens, tiles, positions, segment_ids, visual_index, visual_weight))

    def hidden(self, tokens, tiles, positions=None, segment_ids=None, visual_index=None, visual_weight=None,
               with_cache: bool = False):
        """Returns the decoder's hidden states `[B, T, D]`, from which `decoder.logits` computes logits.

        Args:
          tokens: int32 [B, T], with IMAGE_TOKEN_ID at the position of every visual token.
          tiles: [B, I, H, W, 3], float32 as `ImageProcessor.normalise` returns them, or uint8; None for text alone.
          positions: int32 [B, T]; 0, 1, 2 ... if None.
          segment_ids: int32 [B, T]. Tokens attend to their own segment only; one segment if None.
          visual_index: int32 [B, T], index of the feature that replaces each visual token. Features are numbered over
            all tiles of a sequence, and the index after the last is the newline (`ImageProcessor.visual_index`). If
            None, the k-th feature replaces the k-th visual token, which matches modes with one tile per image.
          visual_weight: float [B, T, 4], if `visual_index` is [B, T, 4]: the weights of each token's four features,
            whose weighted sum replaces it.
          with_cache: see `Llama.__call__`.
        """
        x = self.embed(tokens, tiles, visual_index, visual_weight)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        with jax.named_scope("decoder"):
            return self.decoder(x, positions, segment_ids, with_cache)

    def embed(self, tokens, tiles, visual_index=None, visual_weight=None) -> Float[Array, "B T D"]:
        """Returns the decoder's input: text embeddings, with projected features at the positions of visual tokens."""
        with jax.named_scope("decoder"):
            x = self.decoder.embed(tokens, jnp.dtype(self.dtype))
        if tiles is None:
            return x
        visual = self.visual_features(tiles)
        is_visual = tokens == IMAGE_TOKEN_ID
        if visual_index is None:
            features = visual.shape[1] - self.config.processor.has_newline
            visual_index = jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, features - 1)
        # A gather within each sequence needs no communication between devices with different sequences.
        index = jnp.maximum(visual_index, 0).reshape(*tokens.shape, -1)
        selected = [jnp.take_along_axis(visual, index[..., k, None], axis=1) for k in range(index.shape[2])]
        if visual_weight is None:
            [selected] = selected
        else:
            selected = sum(x.astype(jnp.float32) * visual_weight[..., k, None] for k, x in enumerate(selected))
            selected = selected.astype(visual.dtype)
        return jnp.where(is_visual[..., None], selected, x)

    def insert_visual(self, tokens: Int[Array, "B T"], visual: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the decoder's input: text embeddings, with `visual` at the positions of visual tokens."""
        x = self.decoder.embed(tokens, jnp.dtype(self.dtype))
        return jnp.where((tokens == IMAGE_TOKEN_ID)[..., None], visual.astype(x.dtype), x)

    def visual_features(self, tiles) -> Float[Array, "B F D"]:
        """Returns projected features of each sequence's tiles, in order of the tiles, and the newline if there is."""
        with jax.named_scope("vision"):
            features = self.features(tiles)
        with jax.named_scope("projector"):
            visual = self.projector(features)
        if self.config.processor.has_newline:
            newline = self.image_newline.get_value().astype(visual.dtype)
            visual = jnp.append(visual, jnp.broadcast_to(newline, (len(visual), 1, len(newline))), axis=1)
        return visual

    def features(self, tiles) -> Float[Array, "B I*P D"]:
        """Returns the vision tower's features of each sequence's tiles, in order of the tiles."""
        B, I = tiles.shape[:2]
        if tiles.dtype == jnp.uint8:
            processor = self.config.processor
            tiles = (tiles.astype(jnp.float32) / 255 - jnp.asarray(processor.mean)) / jnp.asarray(processor.std)
        x = tiles.astype(self.dtype).reshape(B * I, *tiles.shape[2:])
        x = self.vision(x, self.config.feature_layer)
        if self.config.vision.class_token and self.config.feature_select == "patch":
            x = x[:, 1:]
        return x.reshape(B, I * x.shape[1], x.shape[2])


def _projector(config: LlavaConfig, rngs: nnx.Rngs) -> Projector:
    return Projector(config.projector, config.vision.hidden_size, config.text.hidden_size, config.vision.grid,
                     rngs=rngs)


def _image_newline(size: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(size**-0.5 * jax.random.normal(rngs.params(), (size,)))


Parameters = dict[str, jax.Array]
"""Arrays by path, for example `decoder/layers/mlp/up_proj/kernel`. Layers are stacked on the first axis."""


def to_params(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """Splits a module into its structure and its parameters by path."""
    graph, state = nnx.split(model)
    return graph, {"/".join(path): value.get_value() for path, value in nnx.to_flat_state(state)}


def from_params(graph: nnx.GraphDef, parameters: Parameters) -> nnx.Module:
    """Builds the module again: the inverse of `to_params`, cheap enough to be called inside a traced function."""
    flat = {tuple(path.split("/")): nnx.Param(value) for path, value in parameters.items()}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def abstract_params(config: LlavaConfig, dtype: str = "float32", attention: str | AttentionChoice = "xla",
                    remat: str = "none") -> tuple[nnx.GraphDef, Parameters]:
    """Returns `to_params` of a model without allocating memory: the parameters are float32 ShapeDtypeStructs."""
    return to_params(nnx.eval_shape(
        lambda: LlavaModel(config, dtype=dtype, attention=attention, remat=remat, rngs=nnx.Rngs(0))))


def init_params(config: LlavaConfig, seed: int = 0) -> Parameters:
    """Returns initial parameters, float32. Call it inside jit with output shardings if the model is large."""
    return to_params(LlavaModel(config, rngs=nnx.Rngs(seed)))[1]


def fresh_params(config: LlavaConfig, paths: Collection[str], seed: int) -> Parameters:
    """Returns initial values, float32, of the parameters at `paths`. Each part of the model uses the seed separately.

    Call it inside jit, which drops the parameters of a part that `paths` does not name.
    """
    parts = {
        "vision": lambda: Vit(config.vision, rngs=nnx.Rngs(seed)),
        "projector": lambda: _projector(config, nnx.Rngs(seed)),
        "decoder": lambda: Llama(config.text, rngs=nnx.Rngs(seed)),
    }
    fresh = {}
    if "image_newline" in paths:
        fresh["image_newline"] = _image_newline(config.text.hidden_size, nnx.Rngs(seed)).get_value()
    for part in sorted({path.split("/")[0] for path in paths} & parts.keys()):
        fresh |= {f"{part}/{path}": x for path, x in to_params(parts[part]())[1].items() if f"{part}/{path}" in paths}
    if adapters := [path for path in paths if lora.is_adapter(path)]:
        shapes, key = abstract_params(config)[1], nnx.Rngs(seed).params()
        fresh |= {path: lora.init_factor(key, path, shapes[path].shape) for path in adapters}
    return fresh
