"""What a model asks of its data, as far as it can be told without loading the model."""

import dataclasses
import os
from pathlib import Path

from llava_jax.errors import UserError
from llava_jax.files import read_json
from llava_jax.image_files import LARGEST_LIMIT, MAX_PIXELS
from llava_jax.text import agreement, templates
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer

TEXT_MODELS = ("llama", "mistral", "qwen2")
"""Decoders that can be joined; a directory of another language model gives its tokenizer alone."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model's conversations and images are prepared; by default as LLaVA-1.5's. Can be pickled."""

    tokenizer: Tokenizer | None = None  # None: no model was named, so nothing can be said about tokens
    template: Template = templates.TEMPLATES["vicuna_v1"]
    tokens_per_image: int = 576
    image_size: int = 336  # pixels of a tile's side
    image_mode: str = "pad"
    context: int | None = None  # the most tokens of a conversation that the model takes; None: not known
    exif: bool = False  # whether images are turned as their EXIF orientation says
    max_pixels: int = MAX_PIXELS  # of an image, at most

    def __post_init__(self):
        if not 1 <= self.max_pixels <= LARGEST_LIMIT:
            raise UserError(f"--max-pixels is {self.max_pixels}: it must be from 1 to {LARGEST_LIMIT}")

    @classmethod
    def load(cls, model: str = "", template: str = "") -> "Settings":
        """The settings of `model`; a `template` that is named takes the place of the model's own.

        `model` is the directory of a LLaVA in any layout that llava_jax reads; or of a language model or tokenizer, or
        a tokenizer's file, which give the tokenizer alone; or "". Raises UserError with one line.
        """
        settings = cls(template=templates.get(template)) if template else cls()
        if not model:
            return settings
        if not os.path.exists(model):
            raise UserError(f"{model}: no such model or tokenizer; to fetch one from the hub: "
                                    "hf download NAME --local-dir DIR")
        kind = _model_type(Path(model) / "config.json")
        if not (kind.startswith("llava") or kind in TEXT_MODELS):
            return dataclasses.replace(settings, tokenizer=Tokenizer.load(model))
        from llava_jax.weights import read_config

        config, tokenizer = read_config(model, template or None), Tokenizer.load(model)
        if kind in TEXT_MODELS:
            text = config
            chosen = template or agreement.template_for_decoder(tokenizer, model)
        else:
            text, chosen = config.text, config.template
            settings = cls(tokens_per_image=config.tokens_per_image, image_size=config.vision.image_size,
                           image_mode=config.image_mode)
        agreement.check(chosen, tokenizer, text.vocab_size, model, trained=kind not in TEXT_MODELS and not template)
        return dataclasses.replace(settings, tokenizer=tokenizer, template=templates.get(chosen),
                                   context=text.max_length)


def _model_type(file: Path) -> str:
    """What config.json says that a model is; "" without the file."""
    return str(read_json(file).get("model_type")) if file.is_file() else ""
