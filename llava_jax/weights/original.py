"""Reads and writes the layout of LLaVA's own code: LLaVA v0 to 1.6 and OneVision, deltas and projector files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.weights.files import TensorInfo


def is_original(directory: Path, raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is that of a LLaVA in the original layout."""
    return "mm_vision_tower" in raw and "vision_config" not in raw


def read_config(directory: Path, raw: dict[str, Any], template: str | None, vision: str | Path | None) -> LlavaConfig:
    """Reads the configuration of an original LLaVA."""
    raise UserError(f"{directory}/config.json: mm_vision_tower marks the original LLaVA layout, which is not read yet; "
                    "take the checkpoint of the same name under llava-hf/ on the hub")


def open_tensors(directory: Path, raw: dict[str, Any], vision: str | Path | None,
                 base: str | Path | None) -> dict[str, TensorInfo]:
    """Opens the tensors of an original LLaVA under their names of the hf layout."""
    raise NotImplementedError
