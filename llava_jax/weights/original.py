"""Reads the layout of LLaVA's own code: LLaVA v0 to 1.6 and OneVision, deltas and projector files.

Keys of config.json and of the tensors tell the version, never the name of a folder. The vision tower is in the
checkpoint, or config.json only names it (`mm_vision_tower`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.errors import UserError
from llava_jax.files import show_json, to_path
from llava_jax.images import (
    CLIP_MEAN,
    CLIP_STD,
    MERGES,
    SIGLIP_MEAN,
    SIGLIP_STD,
    ImageProcessor,
    parse_mode,
    parse_pinpoints,
)
from llava_jax.models import projector
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.text import agreement, templates
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.weights import configs, fields, files, processors, tables
from llava_jax.weights.fields import FLAG, Field
from llava_jax.weights.files import TensorInfo

SIGLIP = VisionConfig(384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", 1e-6, class_token=False, patch_bias=True,
                      pre_norm=False)
HUB_TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig(),
              "openai/clip-vit-large-patch14": VisionConfig(image_size=224), "google/siglip-so400m-patch14-384": SIGLIP}
"""Vision towers of the published checkpoints by their names on the hub."""

TEXT_OR_NULL = Field(str, null=True)
FIELDS = {
    "mm_vision_tower": TEXT_OR_NULL, "mm_projector_type": TEXT_OR_NULL, "mm_vision_select_feature": TEXT_OR_NULL,
    "mm_vision_select_layer": Field(int, -1001, 1000), "mm_use_im_start_end": FLAG, "use_mm_proj": FLAG,
    "mm_resampler_type": TEXT_OR_NULL, "image_aspect_ratio": TEXT_OR_NULL, "mm_patch_merge_type": TEXT_OR_NULL,
    "unfreeze_mm_vision_tower": Field(bool, null=True), "mm_tunable_parts": TEXT_OR_NULL, "architectures": Field(list),
    "mm_newline_position": TEXT_OR_NULL, "mm_spatial_pool_mode": TEXT_OR_NULL, configs.MODEL_TYPE: Field(dict),
    "force_sample": Field(bool, null=True), "add_time_instruction": Field(bool, null=True),
}
"""Fields of config.json that are read here, beside those of the decoder."""

DECODERS = {"qwen": "qwen2", "mistral": "mistral", "llama": "llama", "llava": "llama"}
"""Part of a model_type or class name -> model_type of the decoder."""
MARKS = ("<im_start>", "<im_end>")
START_END = {"vicuna_v1": "v1_start_end", "llava_v0": "v0_start_end"}
"""Templates whose image is between MARKS, by the template without them."""

VIDEO_FIELDS = {"uniform": "force_sample", "time_text": "add_time_instruction"}
"""Fields of VideoSampling and of LLaVA-NeXT's config.json."""


def is_original(directory: Path, raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json, or else the tensors beside it, are those of a LLaVA in the original layout."""
    if raw.get("model_type") == configs.MODEL_TYPE or "vision_config" in raw:
        return False
    if "mm_vision_tower" in raw or re.match(r"llava_(llama|mistral|qwen|mpt)", str(raw.get("model_type"))):
        return True
    return raw.get("model_type") in ("llava", *configs.TEXT_MODELS) and any(
        "mm_projector." in name for name in files.tensor_names(directory))


def read_config(directory: Path, raw: dict[str, Any], template: str | None, vision: str | Path | None,
                file: Path | None = None) -> LlavaConfig:
    """Reads the configuration of an original LLaVA.

    Args:
      directory: has the tensors, which tell the decoder and whether the tower is among them, and the tokenizer.
      raw: the contents of its config.json.
      template: replaces the conversation template, which otherwise follows from the decoder and the tokenizer.
      vision: folder of the vision tower. By default `mm_vision_tower`, absolute or relative to `directory`.
      file: path of its config.json, for messages. By default it is in `directory`.

    Raises UserError if the tower is missing, if the checkpoint was trained with another tower than the named one, and
    for MPT decoders, resamplers and settings that are not supported.
    """
    file = file or directory / "config.json"
    checked = fields.check_fields(file, raw, FIELDS)
    stored = {*map(hf_name, files.tensor_names(directory))}
    kind = _decoder(file, raw, stored)
    text = configs.read_decoder(file, raw, kind)
    tower, is_siglip = _tower(directory, file, raw, vision, stored)
    extras = fields.check_fields(file, checked.get(configs.MODEL_TYPE, {}), fields.HF_EXTRAS, f"{configs.MODEL_TYPE}.")
    if is_siglip:  # LLaVA deletes the last layer and reads what enters the last norm, whatever the layer that is named
        tower = dataclasses.replace(tower, num_layers=tower.num_layers - 1)
    template = template or extras.get("template")
    video = {ours: bool(checked.get(theirs)) for ours, theirs in VIDEO_FIELDS.items()} | extras.get("video", {})
    try:
        select = checked.get("mm_vision_select_feature") or "patch"
        return LlavaConfig(
            vision=tower, text=text, projector=_projector(checked), feature_select=select,
            feature_layer=-1 if is_siglip else checked.get("mm_vision_select_layer", -2),
            processor=dataclasses.replace(_processor(directory, raw, tower, select == "cls_patch", vision), **{
                name: extras[name] for name in processors.OWN if name in extras}),
            template=_template(directory, raw, kind, template), exif=extras.get("exif", False),
            merged=extras.get("merged", ""), video=fields.video(file, video, f"{configs.MODEL_TYPE}.video."))
    except ValueError as error:
        named = (str(directory), str(find_tower(directory, raw, vision) or directory))
        raise UserError(str(error) if str(error).startswith(named) else f"{file}: {error}") from None


def _decoder(file: Path, raw: Mapping[str, Any], stored: set[str]) -> str:
    """Returns the model_type of the decoder, from its keys, or else the class or model_type of the LLaVA."""
    names = f"{raw.get('model_type')} {' '.join(map(str, raw.get('architectures', ())))}".lower()
    if "mpt" in names or any(name.startswith("transformer.") for name in stored):
        raise UserError(f"{file}: a LLaVA with an MPT decoder, which is not supported; LLaMA, Mistral and Qwen2 are")
    biases = {name.split(".")[-2] for name in stored if name.startswith(tables.LANGUAGE) and name.endswith(".bias")}
    if "q_proj" in biases and "o_proj" not in biases:  # a LLaMA's attention_bias is of all four maps
        return "qwen2"
    for part, kind in DECODERS.items():
        if part in names:
            return kind
    raise UserError(f"{file}: model_type {raw.get('model_type')!r} is no LLaVA that is known here")


def _projector(checked: Mapping[str, Any]) -> str:
    if checked.get("mm_resampler_type"):
        raise UserError(f"mm_resampler_type {checked['mm_resampler_type']!r} is not supported; a LLaVA without it is")
    if checked.get("use_mm_proj") is False:
        raise UserError("use_mm_proj is false: a LLaVA without projector is not supported")
    kind = checked.get("mm_projector_type") or "linear"
    check_projector(kind)
    return kind


def check_projector(kind: str) -> None:
    """Raises UserError for a type of projector that LLaVA's own code does not have."""
    projector.depth(kind)
    if projector.merge_size(kind) > 1:
        raise UserError(f"projector {kind!r} has no form in the original layout; linear and mlpNx_gelu have")


def _tower(directory: Path, file: Path, raw: Mapping[str, Any], vision: str | Path | None,
           stored: set[str]) -> tuple[VisionConfig, bool]:
    """Returns the configuration of the vision tower, and whether it is a SigLIP."""
    name = raw.get("mm_vision_tower") or "of an unknown name"
    is_stored = any(key.startswith(tables.VISION) for key in stored)
    tuned = raw.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in (raw.get("mm_tunable_parts") or "")
    if stored and tuned and not is_stored:
        flag = "unfreeze_mm_vision_tower" if raw.get("unfreeze_mm_vision_tower") else "mm_tunable_parts"
        raise UserError(f"{file}: {flag} says that the vision tower was trained, but the checkpoint lacks its tensors; "
                        "download all of its files")
    folder = find_tower(directory, raw, vision)
    if folder:
        tower = configs.read_config(folder)
        if not isinstance(tower, VisionConfig):
            raise UserError(f"{folder}: model_type {files.read_json(folder / 'config.json')['model_type']} is not a "
                            "vision tower")
    elif name in HUB_TOWERS and (not stored or is_stored and _is_tower(HUB_TOWERS[name], directory)):
        tower = HUB_TOWERS[name]
    else:
        what = "its config.json is needed, because the tensors do not tell all of its sizes" if is_stored else (
            "it is not in the checkpoint")
        fetch = f"fetch it (hf download {name} --local-dir DIR) and " if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise UserError(f"{file}: vision tower {name}: {what}; {fetch}name its folder by --vision DIR "
                        "(vision= in Python, model.vision in a recipe), or as mm_vision_tower in this file")
    return tower, not tower.class_token


def _is_tower(tower: VisionConfig, directory: Path) -> bool:
    """Returns whether stored tensors have the sizes of a tower, as its position embedding tells."""
    try:
        stored = _by_hf_name(directory)
    except UserError:  # told when the tensors are read; `plan` needs none
        return True
    positions = stored.get(f"{tables.VISION}embeddings.position_embedding.weight")
    return positions is not None and positions.shape == (tower.num_tokens, tower.hidden_size)


def find_tower(directory: Path, raw: Mapping[str, Any], vision: str | Path | None) -> Path | None:
    """Returns the folder of the vision tower: `vision`, or what `mm_vision_tower` names, if that is a local folder."""
    if vision:
        return to_path(vision)
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        return None
    candidates = directory / name, directory / Path(name).name  # the first may be absolute
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _processor(directory: Path, raw: Mapping[str, Any], tower: VisionConfig, class_token: bool,
               vision: str | Path | None) -> ImageProcessor:
    """Returns the image processor: the tower's colours, and the mode and merge type of LLaVA's config.json."""
    is_siglip = not tower.class_token
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if is_siglip else (CLIP_MEAN, CLIP_STD)
    if folder := find_tower(directory, raw, vision):
        settings = processors.settings_of(folder, is_siglip)
        mean, std = settings["mean"], settings["std"]
    ratio, merge = raw.get("image_aspect_ratio") or "square", raw.get("mm_patch_merge_type") or "flat"
    if not re.fullmatch(r"square|pad|anyres(_max_[1-9]\d{0,3})?", ratio):
        raise UserError(f"image_aspect_ratio {ratio!r} is not supported; square, pad, anyres and anyres_max_N are")
    # "square" is what the tower's own processor does.
    mode, max_tiles = parse_mode(("resize" if is_siglip else "crop") if ratio == "square" else ratio)
    pinpoints = _pinpoints(raw.get("image_grid_pinpoints"), tower.image_size) if mode == "anyres" else ()
    if merge not in MERGES:
        raise UserError(f"mm_patch_merge_type {merge!r} is not supported; {', '.join(MERGES)} are")
    newer = any(raw.get(name) is not None for name in ("mm_newline_position", "mm_spatial_pool_mode",
                                                          "mm_tunable_parts"))  # of LLaVA-NeXT's code
    pool, default = raw.get("mm_spatial_pool_mode"), "bilinear" if max_tiles else None
    return ImageProcessor(
        size=tower.image_size, mode=mode, patches=tower.grid, class_token=class_token, mean=mean, std=std,
        pinpoints=pinpoints, max_tiles=max_tiles, several="pad" if newer else "same",
        merge=None if merge == ("spatial_unpad" if mode == "anyres" else "flat") else merge,
        video_pool=None if pool == default else pool,
        video_newline=raw.get("mm_newline_position") or "one_token")


def _pinpoints(value: Any, side: int) -> tuple[tuple[int, int], ...]:
    """Parses image_grid_pinpoints: a list, its text, or the corners of a grid of tiles such as "(1x1),...,(6x6)"."""
    text = value if isinstance(value, str) else show_json(value, 10**6)
    if corners := re.findall(r"\(\d+x\d+\)", text):
        text = f"{corners[0]},...,{corners[-1]}"
    try:
        return parse_pinpoints(text, side)
    except UserError:
        raise UserError(f"image_grid_pinpoints {text!r:.200} is no list of sizes") from None


def _template(directory: Path, raw: Mapping[str, Any], kind: str, chosen: str | None) -> str:
    """Returns the conversation template: `chosen`, or that of the decoder's family. A guess is printed on stderr."""
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = Tokenizer.load(directory) if has_tokenizer else None
    name, why = {"qwen2": "qwen_1_5", "mistral": "mistral_instruct"}.get(kind), f"its decoder is a {kind}"
    if not name and raw.get("model_type") == "llama":
        name, why = "llava_v0", "its model_type is llama, as in LLaVA v0"
    for end, template in (("<|eot_id|>", "llava_llama_3"), ("<|im_end|>", "chatml_direct")):
        if not name and tokenizer and tokenizer.special_id(end) is not None:
            name, why = template, f"its tokenizer has {end}"
    name = templates.get(chosen or name or "vicuna_v1").name
    if raw.get("mm_use_im_start_end"):
        if name not in (*START_END, *START_END.values()):
            raise UserError(f"mm_use_im_start_end: template {name!r} has no form with {' and '.join(MARKS)}; "
                            f"{' and '.join(START_END)} have")
        if missing := [mark for mark in MARKS if tokenizer and tokenizer.special_id(mark) is None]:
            raise UserError(f"mm_use_im_start_end: the tokenizer has no {' and no '.join(missing)}; take its "
                            "added_tokens.json along")
        name = START_END.get(name, name)
    if not chosen:
        agreement.say(f"template {name}: {directory} is an original LLaVA, {why} (--template chooses another)")
    return name


# Tensors.

def hf_name(name: str) -> str:
    """Returns a tensor's name in the hf layout (tables.py); the same name if it is not known."""
    if match := re.fullmatch(r"(?:.*\.)?mm_projector\.(?:(\d?\d)\.)?(weight|bias)", name):
        index = int(match[1] or 0)
        return f"{tables.PROJECTOR}linear_{index // 2 + 1}.{match[2]}" if index % 2 == 0 else name
    if match := re.match(r"(model\.)?vision_tower\.vision_tower\.(vision_model\.)?", name):
        return tables.VISION + name[match.end() :]
    return tables.hf_name(name)


def original_name(name: str, depth: int) -> str:
    """Returns the original name of a tensor of the hf layout, with a projector of `depth` layers.

    A name that is not known stays.
    """
    if match := re.fullmatch(rf"{re.escape(tables.PROJECTOR)}linear_(\d+)\.(\w+)", name):
        return f"model.mm_projector.{'' if depth == 1 else f'{2 * int(match[1]) - 2}.'}{match[2]}"
    for prefix, ours in ((tables.VISION, "model.vision_tower.vision_tower.vision_model."), (tables.LANGUAGE, "model."),
                         ("language_model.", ""), ("image_newline", "model.image_newline")):
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def speller(config: LlavaConfig) -> Callable[[str], str]:
    """Returns the function from a tensor's name in the hf layout to its original one."""
    return functools.partial(original_name, depth=projector.depth(config.projector))


def open_tensors(directory: Path, raw: dict[str, Any], config: LlavaConfig, vision: str | Path | None,
                 base: str | Path | None) -> dict[str, TensorInfo]:
    """Opens the tensors of an original LLaVA, and of its tower if that is elsewhere, by their names in the hf layout.

    A `base` is added to them, which are then a delta.
    """
    tensors = _by_hf_name(directory)
    # Training with QLoRA leaves quantization_config in files of models that are not quantised.
    if raw.get("quantization_config") and any(x.kind not in ("F16", "BF16", "F32") for x in tensors.values()):
        raise UserError(f"{directory / 'config.json'}: quantization_config: quantised models are not read; take the "
                        "model it was made of")
    if base:
        tensors = _add(directory, tensors, to_path(base))
    elif _is_near_zero(tensors):
        agreement.say(f"{directory}: the weights of its last norm are near 0, as in a delta of LLaVA v0 or v1-1, which "
                      "means nothing without the decoder that it changes (--base)")
    if not any(name.startswith(tables.VISION) for name in tensors):
        folder = find_tower(directory, raw, vision)
        if folder is None:
            read_config(directory, raw, None, vision)  # raises the error that names the tower
        tower = {name: tensor for name, tensor in _by_hf_name(folder).items() if name.startswith(tables.VISION)}
        tensors |= {name: tensor for name, tensor in tower.items() if not _is_beyond(name, config.vision)}
    return tensors


def _is_beyond(name: str, tower: VisionConfig) -> bool:
    """Returns whether a tensor is of SigLIP's last layer, which LLaVA deletes."""
    match = re.search(r"\.encoder\.layers\.(\d+)\.", name)
    return bool(match) and not tower.class_token and int(match[1]) >= tower.num_layers


def _by_hf_name(directory: Path) -> dict[str, TensorInfo]:
    tensors = {}
    for name, tensor in files.list_tensors(directory).items():
        if tables.IGNORED.fullmatch(hf_name(name)):
            continue
        if hf_name(name) in tensors:
            raise UserError(f"{tensor.file}: {name} and {tensors[hf_name(name)].name} are the same parameter")
        tensors[hf_name(name)] = tensor
    return tensors


# Deltas.

@dataclass(frozen=True)
class _Sum(TensorInfo):
    """A delta and the tensor that it changes, added in float16 as LLaVA's apply_delta does."""

    base: TensorInfo | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float16)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        total = np.array(super().read(rows), np.float16)
        if self.base:  # new rows of the embedding are in the delta alone
            old = self.base.read(rows).astype(np.float16)
            with np.errstate(over="ignore"):  # values that are not finite are reported by name
                total[tuple(map(slice, old.shape))] += old
        return total


def _add(directory: Path, delta: Mapping[str, TensorInfo], base_dir: Path) -> dict[str, TensorInfo]:
    configs.read_raw(base_dir)
    base, sums = _by_hf_name(base_dir), {}
    for name, tensor in delta.items():
        old = base.get(name)
        if old is None and not name.startswith((tables.PROJECTOR, tables.VISION)):
            raise UserError(f"{base_dir} lacks {tensor.name}, which the delta {directory} changes; name the decoder "
                            "that the delta was made for")
        larger = name in (tables.EMBEDDING, tables.HEAD)
        if old and old.shape != tensor.shape and not (
                larger and all(a <= b for a, b in zip(old.shape, tensor.shape, strict=True))):
            raise UserError(f"{tensor.name} has shape {list(tensor.shape)} in the delta {directory} and "
                            f"{list(old.shape)} in {base_dir}; name the decoder that the delta was made for")
        sums[name] = _Sum(**{field.name: getattr(tensor, field.name) for field in dataclasses.fields(TensorInfo)},
                          base=old)
    return sums


def _is_near_zero(tensors: Mapping[str, TensorInfo]) -> bool:
    norm = tensors.get(f"{tables.LANGUAGE}norm.weight")
    return norm is not None and float(np.abs(norm.read().astype(np.float32)).mean()) < 0.05
