"""Checks types and ranges of the fields of a config.json, before a model is built from them.

A size that no model has is refused, because it would fill the memory or run for ever: a billion layers, for example.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.files import show_json
from llava_jax.images import ImageProcessor
from llava_jax.models.llama import LlamaConfig, RopeScaling
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.video import MAX_SAMPLED, VideoSampling


@dataclass(frozen=True)
class Field:
    """A JSON type (int, float, bool, str, dict, list), the range of a number, and whether null means a default."""

    kind: type
    low: float = 1
    high: float = math.inf
    null: bool = False

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.null
        if self.kind is float:
            return type(value) in (int, float) and self.low <= value <= self.high
        return type(value) is self.kind and (self.kind is not int or self.low <= value <= self.high)

    def __str__(self) -> str:
        names = {bool: "true or false", str: "a text", dict: "an object", list: "a list"}
        if self.kind in names:
            return names[self.kind]
        kind = "whole number" if self.kind is int else "number"
        return f"a {kind} from {self.low:,} to {self.high:,}"


EPS, FACTOR = Field(float, 1e-30, 1), Field(float, 1e-6, 1e6)
FLAG, TEXT = Field(bool), Field(str)
SIZES = {
    "hidden_size": Field(int, 1, 2**17), "intermediate_size": Field(int, 1, 2**20),
    "num_hidden_layers": Field(int, 1, 1000), "num_attention_heads": Field(int, 1, 2**12),
}
ROPE = {"rope_type": TEXT, "type": TEXT, "factor": FACTOR, "low_freq_factor": FACTOR, "high_freq_factor": FACTOR,
        "original_max_position_embeddings": Field(int, 1, 2**30), "rope_theta": Field(float, 1, 1e15),
        "partial_rotary_factor": Field(float, 0, 1)}
DECODER = SIZES | {
    "model_type": TEXT, "vocab_size": Field(int, 1, 2**24), "num_key_value_heads": Field(int, 1, 2**12, null=True),
    "head_dim": Field(int, 1, 2**12, null=True), "hidden_act": TEXT, "rms_norm_eps": EPS,
    "max_position_embeddings": Field(int, 1, 2**30), "rope_theta": ROPE["rope_theta"],
    "rope_scaling": Field(dict, null=True), "rope_parameters": Field(dict, null=True), "attention_bias": FLAG,
    "mlp_bias": FLAG, "tie_word_embeddings": FLAG, "sliding_window": Field(int, 0, 2**30, null=True),
    "use_sliding_window": FLAG, "max_window_layers": Field(int, 0, 1000), "partial_rotary_factor": Field(float, 0, 1),
}
TOWER = SIZES | {
    "model_type": TEXT, "image_size": Field(int, 1, 2**13), "patch_size": Field(int, 1, 2**13),
    "num_channels": Field(int, 1, 2**10), "hidden_act": TEXT, "layer_norm_eps": EPS,
    "vision_use_head": FLAG,
}
LLAVA = {
    "model_type": TEXT, "vision_config": Field(dict), "text_config": Field(dict), "multimodal_projector_bias": FLAG,
    "projector_hidden_act": TEXT, "vision_feature_select_strategy": TEXT, "tie_word_embeddings": FLAG,
    "vision_feature_layer": Field(int, -1001, 1000), "image_grid_pinpoints": Field(list, null=True),
    "vision_aspect_ratio": TEXT, "use_image_newline_parameter": FLAG,
}
HF_EXTRAS = {"merged": TEXT, "template": TEXT, "exif": FLAG, "image_mode": TEXT, "rule": TEXT, "several": TEXT,
             "video_pool": Field(str, null=True), "video_newline": TEXT, "video": Field(dict)}
"""Fields of `llava_jax` in a config.json of Hugging Face's layout."""
NATIVE_RANGES = {
    "image_size": TOWER["image_size"], "size": TOWER["image_size"], "patches": TOWER["image_size"],
    "patch_size": TOWER["patch_size"], "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["intermediate_size"], "num_layers": SIZES["num_hidden_layers"],
    "num_heads": SIZES["num_attention_heads"], "num_kv_heads": SIZES["num_attention_heads"],
    "head_dim": Field(int, 1, 2**12), "vocab_size": DECODER["vocab_size"],
    "max_length": DECODER["max_position_embeddings"], "norm_eps": EPS, "rope_theta": ROPE["rope_theta"],
    "factor": FACTOR, "low_freq_factor": FACTOR, "high_freq_factor": FACTOR,
    "original_length": ROPE["original_max_position_embeddings"], "feature_layer": LLAVA["vision_feature_layer"],
    "rank": Field(int, 1, 2**14), "alpha": Field(float, 1e-6, 1e6), "dropout": Field(float, 0, 1),
    "fps": Field(float, 1e-6, 1e6), "frames": Field(int, 0, MAX_SAMPLED),
    "max_tiles": Field(int, 0, 9999),
}
"""Ranges of the numbers in a config.json of the native layout, by the names of the dataclasses' fields."""
NEW = {"max_tiles", "rule", "merge", "several", "video_pool", "video_newline", "lora", "merged",
       *(field.name for field in dataclasses.fields(VideoSampling))}
"""Fields that older native files of the same version lack. A missing one has its default."""
PIXELS = Field(int, 1, 2**14)


def check_fields(file: Path, raw: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of `raw` that `fields` lists. Raises UserError if one has a wrong type or size."""
    for name, field in fields.items():
        if name in raw and not field.accepts(raw[name]):
            raise UserError(f"{file}: {prefix}{name} is {show_json(raw[name])}; it must be {field}")
    return {name: raw[name] for name in fields if name in raw}


def build(file: Path, constructor: Callable, /, **values: Any) -> Any:
    """Calls a constructor. A ValueError becomes a UserError that names the file."""
    try:
        return constructor(**values)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def numbers(file: Path, name: str, value: Any) -> tuple[float, ...]:
    """Converts a list of numbers, such as the mean of each colour."""
    try:
        return tuple(map(float, value))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: {name} is {show_json(value)}; it must be a list of numbers") from None


def pairs(file: Path, name: str, value: Any) -> tuple[tuple[int, int], ...]:
    """Converts a list of pairs of sizes in pixels, such as pinpoints."""
    try:
        result = tuple((first, second) for first, second in value)
    except (TypeError, ValueError):
        result = ((None, None),)
    if len(result) > 1000 or not all(PIXELS.accepts(size) for pair in result for size in pair):
        raise UserError(f"{file}: {name} is {show_json(value)}; it must be a list of at most 1,000 pairs of sizes in "
                        f"pixels, each {PIXELS}")
    return result


def decoder(file: Path, raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the checked fields of a LLaMA, Mistral or Qwen2, and of its rotary embedding."""
    checked = check_fields(file, raw, DECODER, prefix)
    for name in ("rope_scaling", "rope_parameters"):
        if checked.get(name):
            checked[name] = check_fields(file, checked[name], ROPE, f"{prefix}{name}.")
    return checked


def llava(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked fields of a LLaVA and its parts."""
    checked = check_fields(file, raw, LLAVA)
    for name, part in (("vision_config", tower), ("text_config", decoder)):
        if name in checked:
            checked[name] = part(file, checked[name], f"{name}.")
    return checked


def tower(file: Path, raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the checked fields of a vision tower of CLIP or SigLIP."""
    return check_fields(file, raw, TOWER, prefix)


def clip(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked vision fields of a CLIP or SigLIP with text tower. Old files have them twice."""
    names = ("vision_config", "vision_config_dict")
    checked = check_fields(file, raw, {name: Field(dict, null=True) for name in names})
    return {name: tower(file, part, f"{name}.") for name, part in checked.items() if part}


def native(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked fields of the native layout. Raises UserError if one is missing or unknown."""
    checked = _exactly(file, {"video": {}} | raw, LlavaConfig)
    checked["video"] = video(file, checked["video"], "video.")
    for name, kind in (("vision", VisionConfig), ("text", LlamaConfig), ("processor", ImageProcessor)):
        checked[name] = _exactly(file, checked[name], kind, f"{name}.")
    if checked["text"]["rope_scaling"] is not None:
        checked["text"]["rope_scaling"] = _exactly(
            file, checked["text"]["rope_scaling"], RopeScaling, "text.rope_scaling.")
    if checked["lora"] is not None:
        checked["lora"] = _exactly(file, checked["lora"], Lora, "lora.")
    return checked


def video(file: Path, raw: Mapping[str, Any], prefix: str) -> VideoSampling:
    """Reads the sampling of videos."""
    return build(file, VideoSampling, **_exactly(file, raw, VideoSampling, prefix))


def _exactly(file: Path, raw: Mapping[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    fields = {field.name: _native_field(field) for field in dataclasses.fields(kind)}
    raw = {field.name: field.default for field in dataclasses.fields(kind) if field.name in NEW} | raw
    problems = {"lacks": fields.keys() - raw.keys(), "has an unknown field,": raw.keys() - fields.keys()}
    for what, names in problems.items():
        if names:
            named = ", ".join(show_json(prefix + name) for name in sorted(names)[:5])
            raise UserError(f"{file}: not a configuration of the llava_jax layout: it {what} {named}")
    return check_fields(file, raw, fields, prefix)


def _native_field(field: dataclasses.Field) -> Field:
    if field.name in NATIVE_RANGES:
        return NATIVE_RANGES[field.name]
    if field.type in (bool, str):
        return Field(field.type)
    kinds = {typing.get_origin(kind) for kind in (field.type, *typing.get_args(field.type))}
    if typing.Literal in kinds:
        return Field(str, null=type(None) in typing.get_args(field.type))
    if typing.get_origin(field.type) is tuple:
        return Field(list)
    assert field.type not in (int, float), f"{field.name} has no range"
    return Field(dict, null=field.type in (RopeScaling | None, Lora | None))
