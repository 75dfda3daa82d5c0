"""Reads from a model's files how its conversations and images are prepared."""

import dataclasses
from pathlib import Path

from llava_jax.errors import UserError
from llava_jax.files import read_json, to_path
from llava_jax.image_files import LARGEST_LIMIT, MAX_PIXELS
from llava_jax.images import ImageProcessor
from llava_jax.prepare.options import DataOptions, ImageOptions
from llava_jax.text import agreement, templates
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.video import VideoSampling

TEXT_MODELS = ("llama", "mistral", "qwen2")
"""Model types of decoders that can be joined; other language models give only their tokenizer."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Says how conversations and images are prepared for a model; LLaVA-1.5's by default. Can be pickled."""

    tokenizer: Tokenizer | None = None
    """Tokenizer of the model; None if no model was named, and then tokens cannot be counted."""
    template: Template = templates.TEMPLATES["vicuna_v1"]
    processor: ImageProcessor = ImageProcessor()
    context: int | None = None
    """Maximum number of tokens of a conversation, if the model is known."""
    exif: bool = False
    """Whether images are rotated by their EXIF orientation."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image or a frame."""
    video: VideoSampling = VideoSampling()
    """Frames that are sampled of a video."""

    def __post_init__(self):
        if not 1 <= self.max_pixels <= LARGEST_LIMIT:
            raise UserError(f"--max-pixels is {self.max_pixels}: it must be from 1 to {LARGEST_LIMIT}")

    @classmethod
    def load(cls, model: str = "", template: str = "") -> "Settings":
        """Reads the settings of `model`. A named `template` replaces the model's own.

        `model` is the directory of a LLaVA in any layout that llava_jax reads. It may also be the directory of a
        language model or tokenizer, or a tokenizer's file, which give only the tokenizer; or "". Raises UserError.
        """
        settings = cls(template=templates.get(template)) if template else cls()
        if not model:
            return settings
        if not to_path(model).exists():
            raise UserError(f"{model}: no such model or tokenizer; to fetch one from the hub: "
                            "hf download NAME --local-dir DIR")
        kind = _model_type(to_path(model) / "config.json")
        if not (kind.startswith("llava") or kind in TEXT_MODELS):
            return dataclasses.replace(settings, tokenizer=Tokenizer.load(model))
        from llava_jax.weights import read_config

        config, tokenizer = read_config(model, template or None), Tokenizer.load(model)
        if kind in TEXT_MODELS:
            text = config
            chosen = template or agreement.template_for_decoder(tokenizer, model)
        else:
            text, chosen = config.text, config.template
            settings = cls(processor=config.processor)
        agreement.check(chosen, tokenizer, text.vocab_size, model, trained=kind not in TEXT_MODELS and not template)
        return dataclasses.replace(settings, tokenizer=tokenizer, template=templates.get(chosen),
                                   context=text.max_length)


def _model_type(file: Path) -> str:
    """Returns the `model_type` of a config.json, or "" without the file."""
    return str(read_json(file).get("model_type")) if file.is_file() else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(ImageOptions, DataOptions):
    """Says for which model, and for which sequences, data are prepared."""

    model: str = ""
    """Directory of the LLaVA to train, or of its language model or tokenizer. Without it tokens are not counted."""
    template: str = ""
    """Conversation template; default: the model's, or vicuna_v1."""
    max_length: int | None = None
    """Number of tokens of a packed sequence (data.sequence_length of a recipe); default: 2048."""
    video: VideoSampling = VideoSampling()
    """Frames that are sampled of a video (data.video of a recipe)."""

    image_mode: str = ""
    """Image mode of the stage, as in a recipe: crop, pad, resize, anyres or anyres_max_N; default: the model's."""
    pinpoints: str = ""
    """Canvas sizes of anyres, as in a recipe: (336x672),(672x336), or (1x1),...,(6x6); default: the model's."""
    vision: str = ""
    """Directory of the vision tower, if `model` is a language model; default: CLIP with tiles of 336 pixels."""

    def load_settings(self) -> Settings:
        settings = Settings.load(self.model, self.template)
        processor = settings.processor
        if self.vision:
            from llava_jax.models.llava import LlavaConfig
            from llava_jax.models.vit import VisionConfig
            from llava_jax.weights import read_config
            tower = read_config(self.vision)
            if not isinstance(tower, VisionConfig):
                raise UserError(f"--vision: {self.vision} is no vision tower")
            processor = LlavaConfig(vision=tower).processor
        if self.pinpoints and not self.image_mode.startswith("anyres"):
            raise UserError("--pinpoints are read with --image-mode anyres or anyres_max_N alone")
        if self.image_mode:
            processor = processor.with_mode(self.image_mode, self.pinpoints)
        return dataclasses.replace(settings, processor=processor, exif=self.exif, max_pixels=self.max_pixels,
                                   video=self.video)
