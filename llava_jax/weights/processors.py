"""Reads and writes the files of Hugging Face's processors: images to tiles, and the number of visual tokens.

transformers writes a pinpoint as (height, width) and chooses as this project does. So pairs are swapped and their order
is kept, and a model of the original's rule has the same canvases there. Only the rounding differs.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.errors import NoHfForm, UserError
from llava_jax.files import read_json, show_json, to_path
from llava_jax.images import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, ImageProcessor
from llava_jax.models.llava import LlavaConfig
from llava_jax.text import agreement
from llava_jax.text.templates import IMAGE, VIDEO
from llava_jax.weights import fields
from llava_jax.weights.files import write_json

PREPARATION = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
"""Fixed steps of `ImageProcessor`, as fields of Hugging Face's image processors. 3 is PIL's number for bicubic."""

CLIP = {"mode": "crop", "mean": CLIP_MEAN, "std": CLIP_STD}
SIGLIP = {"mode": "resize", "mean": SIGLIP_MEAN, "std": SIGLIP_STD}

OLD_IMAGE_MODES = {"square": "crop"}
"""Names of image modes in older files of the hf layout."""

CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
"""Types of LLaVA in transformers, and the names of their classes without the last words."""

ANYRES = {
    "llava_next": {"mode": "anyres", "rule": "transformers"},
    "llava_onevision": {"mode": "anyres", "rule": "transformers", "several": "pad"},
}
"""Fields of `ImageProcessor` that describe what transformers' models with many tiles do."""

OWN = ("rule", "several", "video_pool", "video_newline")
"""Fields of `ImageProcessor` that config.json has only under `llava_jax`."""


def model_type(config: LlavaConfig) -> str:
    """Returns transformers' type of a model: a key of CLASSES. Raises NoHfForm if none computes the same function."""
    processor = config.processor
    if processor.mode != "anyres" and not processor.has_newline:
        return "llava"
    if processor.merge_type != "spatial_unpad" or processor.mode != "anyres":
        raise NoHfForm(f"image mode {processor.mode} with merge {processor.merge_type} has no form in Hugging Face's "
                       "layout; anyres with spatial_unpad has, and other modes with flat")
    return "llava_onevision" if processor.max_tiles else "llava_next"


def select_strategy(config: LlavaConfig) -> str:
    """Returns Hugging Face's name of the selected features: `default` drops the first one, CLIP's class token."""
    return "default" if config.feature_select == "patch" and config.vision.class_token else "full"


def read(directory: Path, file: Path, config: Any, extras: Mapping[str, Any]) -> ImageProcessor:
    """Reads the image processor of a LLaVA.

    Args:
      file: the model's config.json, for messages.
      config: transformers' configuration of the model.
      extras: fields of `ImageProcessor`, and `image_mode`, that an export of this project adds. They replace others.
    """
    vision = config.vision_config
    has_class = config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
    settings = settings_of(directory, vision.model_type == "siglip_vision_model")
    if config.model_type in ANYRES:
        settings |= ANYRES[config.model_type] | {"pinpoints": _pinpoints(file, config.image_grid_pinpoints)}
        _check_tiles(directory, vision.image_size, settings["pinpoints"])
        if config.model_type == "llava_onevision":
            settings["max_tiles"] = _max_tiles(file, config.vision_aspect_ratio)
    if mode := extras.get("image_mode"):
        settings["mode"] = OLD_IMAGE_MODES.get(mode, mode)
    settings |= {name: extras[name] for name in OWN if name in extras}
    return fields.build(file, ImageProcessor, size=vision.image_size, patches=vision.image_size // vision.patch_size,
                        class_token=has_class, **settings)


def settings_of(directory: Path, is_siglip: bool = False) -> dict[str, Any]:
    """Reads mode, mean and std from the files of an image processor. Without files they are CLIP's or SigLIP's.

    CLIP's processor crops the centre, or pads to a square if `do_pad` is set. SigLIP's resizes to a square. Raises
    UserError if the files have another setting.
    """
    file, settings = _image_settings(directory)
    if file is None:
        return dict(SIGLIP if is_siglip else CLIP)
    for name, value in PREPARATION.items():
        if settings.get(name) is not None and not _is_close(settings[name], value):
            raise UserError(f"{file}: {name} is {show_json(settings[name])}; images are prepared with "
                            f"{show_json(value)} here")
    defaults = SIGLIP if str(settings.get("image_processor_type")).startswith("Siglip") else CLIP
    lists = {name: fields.numbers(file, f"image_{name}", settings.get(f"image_{name}") or defaults[name])
             for name in ("mean", "std")}
    pads = fields.check_fields(file, settings, {"do_pad": fields.Field(bool, null=True)}).get("do_pad")
    result = defaults | lists | ({"mode": "pad"} if pads else {})
    fields.build(file, ImageProcessor, **result)
    return result


def with_colours(config: LlavaConfig, vision: str | Path) -> LlavaConfig:
    """Returns a joined model with the mean and std of its vision tower's image processor, read from `vision`."""
    settings = settings_of(to_path(vision), is_siglip=not config.vision.class_token)
    return dataclasses.replace(config, processor=dataclasses.replace(
        config.processor, mean=settings["mean"], std=settings["std"]))


def _image_settings(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = directory / name
        if file.exists():
            settings = read_json(file)
            if "image_processor" in settings:
                part = {"image_processor": fields.Field(dict)}
                settings = fields.check_fields(file, settings, part)["image_processor"]
            return file, settings
    return None, {}


def _check_tiles(directory: Path, size: int, pinpoints: tuple[tuple[int, int], ...]) -> None:
    """Raises UserError if the processor's files cut other tiles than config.json describes."""
    file, settings = _image_settings(directory)
    for name in ("size", "crop_size"):
        side = settings.get(name)
        if isinstance(side, dict):
            side = side.get("height") or side.get("shortest_edge")
        if side is not None and side != size:
            raise UserError(f"{file}: {name} is {show_json(settings[name])}, but vision_config.image_size of "
                            f"config.json is {size}; a tile has the size of the tower's images")
    own = settings.get("image_grid_pinpoints")
    if own is not None and _pinpoints(file, own) != pinpoints:
        raise UserError(f"{file}: image_grid_pinpoints differ from those of config.json")


def _pinpoints(file: Path, value: Any) -> tuple[tuple[int, int], ...]:
    """Converts (height, width) pairs to (width, height)."""
    return tuple((width, height) for height, width in fields.pairs(file, "image_grid_pinpoints", value))


def _max_tiles(file: Path, ratio: str) -> int:
    match = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio)
    if match is None:
        raise UserError(f"{file}: vision_aspect_ratio is {show_json(ratio)}; supported: anyres_max_N, where N is a "
                        "number of tiles")
    return int(match[1])


def _is_close(given: Any, value: float) -> bool:
    return isinstance(given, bool | int | float) and 0.999 * value <= given <= 1.001 * value


def config_fields(config: LlavaConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json that describe images, and reports on stderr where transformers differs."""
    kind, processor = model_type(config), config.processor
    result = {"image_token_index": tokens["image"]}
    if kind != "llava_onevision":
        result["image_seq_length"] = processor.features_per_tile
    if kind in ANYRES:
        result["image_grid_pinpoints"] = _hf_pinpoints(processor)
        _tell_differences(kind, config)
    if kind == "llava_onevision":
        result |= {"video_token_index": tokens["video"], "vision_aspect_ratio": f"anyres_max_{processor.max_tiles}"}
    return result


def extras(processor: ImageProcessor) -> dict[str, Any]:
    """Returns the settings that only this project reads back from config.json."""
    names = {"mode": "image_mode"} | {name: name for name in OWN}
    return {theirs: getattr(processor, ours) for ours, theirs in names.items()}


def _tell_differences(kind: str, config: LlavaConfig) -> None:
    processor = config.processor
    if processor.rule == "original":
        agreement.say("export: transformers rounds an image's size without padding, the original truncates it; at most "
                      "1 size in 36,000 gets two rows or columns of visual tokens more there")
    if processor.several != ("pad" if kind == "llava_onevision" else "same"):
        theirs = "pads each to one tile" if kind == "llava_onevision" else "gives each its own tiles"
        agreement.say(f"export: of several images in one conversation, transformers' {kind} {theirs}; this model was "
                      f"trained with several = {processor.several}")
    if kind == "llava_onevision" and (processor.pool, processor.video_newline) != ("bilinear", "one_token"):
        agreement.say(f"export: transformers' {kind} reads videos with video_pool bilinear, video_newline one_token; "
                      f"this model has {processor.pool} and {processor.video_newline}")
    if kind == "llava_onevision" and config.video.time_text:
        agreement.say("export: transformers does not write the times of a video's frames before the question, as this "
                      "model was trained")


def _hf_pinpoints(processor: ImageProcessor) -> list[list[int]]:
    return [[height, width] for width, height in processor.pinpoints]


def write(directory: Path, config: LlavaConfig) -> None:
    """Writes preprocessor_config.json and processor_config.json, and OneVision's video_preprocessor_config.json."""
    kind, processor = model_type(config), config.processor
    size, square = processor.size, {"height": processor.size, "width": processor.size}
    prefix = CLASSES[kind]
    # Of the processors for one tile, only Llava's can pad to a square.
    image_prefix = {"crop": "CLIP", "resize": "Siglip"}.get(processor.mode, prefix)
    exact = processor.mode == "resize" or kind == "llava_onevision"
    image = {
        "image_processor_type": f"{image_prefix}ImageProcessor",
        "processor_class": f"{prefix}Processor",
        "do_convert_rgb": True,
        "do_pad": processor.mode in ("pad", "anyres"),
        "do_resize": True,
        "size": square if exact else {"shortest_edge": size},
        "resample": PREPARATION["resample"],
        "do_center_crop": not exact,
        "do_rescale": True,
        "rescale_factor": PREPARATION["rescale_factor"],
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
    text = {"processor_class": f"{prefix}Processor", "image_token": IMAGE,
            "vision_feature_select_strategy": select_strategy(config)}
    if kind == "llava_onevision":
        crops = processor.frames.mode == "crop"
        video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False,
                 "do_center_crop": crops} | ({"size": {"shortest_edge": size}, "crop_size": square} if crops else {})
        write_json(directory / "video_preprocessor_config.json", {
            name: value for name, value in image.items() if name not in ("image_processor_type", "do_pad")} | video)
        text |= {"video_token": VIDEO, "num_image_tokens": processor.patches**2 + config.vision.class_token,
                 "vision_aspect_ratio": f"anyres_max_{processor.max_tiles}"}
    else:
        image["crop_size"] = square
        # The strategy "default" subtracts the additional token again.
        text |= {"patch_size": config.vision.patch_size, "num_additional_image_tokens": int(config.vision.class_token)}
    if kind in ANYRES:
        image["image_grid_pinpoints"] = _hf_pinpoints(processor)
    write_json(directory / "preprocessor_config.json", image)
    write_json(directory / "processor_config.json", text)
