"""What a model asks of its data, as far as it can be told without loading the model."""

import dataclasses
import json
import os
from pathlib import Path

from llava_jax.errors import UserError
from llava_jax.text import templates
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model's conversations and images are prepared; by default as LLaVA-1.5's. Can be pickled."""

    tokenizer: Tokenizer | None = None  # None: no model was named, so nothing can be said about tokens
    template: Template = templates.TEMPLATES["vicuna_v1"]
    tokens_per_image: int = 576
    image_size: int = 336  # pixels of a tile's side
    image_mode: str = "pad"

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
        if _is_llava(Path(model) / "config.json"):
            from llava_jax.weights import read_config  # imports JAX, which takes seconds

            config = read_config(model)
            settings = cls(
                template=settings.template if template else templates.get(config.template),
                tokens_per_image=config.tokens_per_image,
                image_size=config.vision.image_size,
                image_mode=config.image_mode,
            )
        return dataclasses.replace(settings, tokenizer=Tokenizer.load(model))


def _is_llava(file: Path) -> bool:
    """Whether config.json is that of a whole LLaVA, which `read_config` then reads or refuses."""
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the file again") from None
    return isinstance(config, dict) and str(config.get("model_type")).startswith("llava")
