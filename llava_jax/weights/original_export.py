"""Writes checkpoints that LLaVA's own code opens (LLaVA 1.6, and LLaVA-NeXT for Qwen2 and OneVision)."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from llava_jax.errors import UserError
from llava_jax.files import to_path
from llava_jax.models import vit
from llava_jax.models.llava import LlavaConfig, Parameters
from llava_jax.models.vit import VisionConfig
from llava_jax.text import agreement
from llava_jax.weights import checkpoint, configs, files, original, processors, tables, tokenizer_files
from llava_jax.weights.files import NotFinite, TensorSpec
from llava_jax.weights.original import SIGLIP, START_END
from llava_jax.weights.source import ParameterSource

TOWER_DIR = "vision_tower"
"""Folder of a vision tower that is not on the hub, inside the checkpoint."""
CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "qwen": "LlavaQwenForCausalLM"}


def save_original(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    tokenizer_dir: str | Path,
    *,
    tower: Literal["in", "out"] = "in",
    dtype: str | None = None,
    shard_bytes: int = checkpoint.SHARD_BYTES,
) -> None:
    """Writes a directory that LLaVA's own code opens.

    Args:
      directory, config, parameters, tokenizer_dir, dtype, shard_bytes: as in `checkpoint.save_hf`, but the tokenizer is
        copied as it is, because the original has no `<image>` token.
      tower: whether the vision tower is among the tensors. Without it, config.json names the tower on the hub, which
        the model must have been trained with unchanged. A tower that is not that of a published LLaVA is in a folder
        `vision_tower` of its own, because LLaVA's code reads its sizes there.

    Raises UserError if LLaVA's code cannot compute the same function, and as `save_hf` does.
    """
    hub_name, target_dir = hub_tower(config), Path(directory).absolute()
    settings = config_json(config, hub_name or str(target_dir / TOWER_DIR), tower == "in")

    def write(target: Path | None, parameters: ParameterSource) -> NotFinite:
        specs = _specs(parameters, config, dtype)
        main = [spec for spec in specs if tower == "in" or original.hf_name(spec.name)[: len(tables.VISION)]
                != tables.VISION]
        if target:
            tokenizer_files.copy(to_path(tokenizer_dir), target, config.template)
            settings["torch_dtype"] = max((spec.dtype for spec in main), key=lambda kind: kind.itemsize).name
            files.write_json(target / "config.json", settings)
        found = files.write(target, main, shard_bytes)
        if hub_name is None:
            if target:
                _write_tower_files(target / TOWER_DIR, config)
            vision = [dataclasses.replace(spec, name=original.hf_name(spec.name).removeprefix("vision_tower."))
                      for spec in specs if original.hf_name(spec.name).startswith(tables.VISION)]
            in_folder = files.write(target and target / TOWER_DIR, vision, shard_bytes)
            found = NotFinite(found.stored + in_folder.stored, found.overflowed + in_folder.overflowed)
        return found

    checkpoint.save_directory(Path(directory), parameters, write)
    if tower == "out" and hub_name:
        agreement.say(f"{directory}: without vision tower; LLaVA's code takes {hub_name} from the hub, untrained")


def _hub_sizes(config: LlavaConfig) -> VisionConfig:
    """Returns the sizes of the tower from which LLaVA takes this model's. Of a SigLIP it deletes the last layer."""
    if config.vision.class_token:
        return config.vision
    return dataclasses.replace(config.vision, num_layers=vit.depth(config.vision, config.feature_layer) + 1)


def hub_tower(config: LlavaConfig) -> str | None:
    """Returns the name on the hub of the vision tower of these sizes and colours; None if it is no published one."""
    processor, sizes = config.processor, _hub_sizes(config)
    published = processors.SIGLIP if sizes == SIGLIP else processors.CLIP
    if (processor.mean, processor.std) != (published["mean"], published["std"]):
        return None
    return next((name for name, tower in original.HUB_TOWERS.items() if tower == sizes), None)


def config_json(config: LlavaConfig, tower: str | None = None, has_tower: bool = False) -> dict[str, Any]:
    """Returns the config.json of an original LLaVA.

    `tower` is the value of `mm_vision_tower`, by default the tower's name on the hub or a folder in the checkpoint.
    `has_tower`: whether the checkpoint has the tower's tensors. Raises UserError if the original has no such model.
    """
    original.check_projector(config.projector)
    processor, is_siglip = config.processor, not config.vision.class_token
    square = "resize" if is_siglip else "crop"
    if processor.mode not in (square, "pad", "anyres"):
        raise UserError(f"image mode {processor.mode} with a {'SigLIP' if is_siglip else 'CLIP'} has no form in the "
                        f"original layout; {square}, pad and anyres have (--image-mode)")
    if processor.rule == "transformers":
        agreement.say("export: LLaVA's code truncates an image's size without padding, transformers, as this model was "
                      "trained, rounds it; about 1 size in 36,000 gets two rows or columns of visual tokens less there")
    ratio = {square: "square", "pad": "pad"}.get(processor.mode, "anyres")
    family = "qwen" if config.text.qkv_bias else "mistral" if config.template.startswith("mistral") else "llama"
    text = configs.hf_text(config.text, config.text.vocab_size)
    if scaling := text["rope_scaling"]:
        text["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}  # the key of LLaVA's transformers 4.37
    settings = text | {
        "architectures": [CLASSES[family]], "model_type": f"llava_{family}",
        "mm_vision_tower": tower or hub_tower(config) or TOWER_DIR, "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": config.projector, "mm_vision_select_layer": -2 if is_siglip else config.feature_layer,
        "mm_vision_select_feature": config.feature_select, "mm_patch_merge_type": processor.merge_type,
        "mm_use_im_start_end": config.template in START_END.values(), "mm_use_im_patch_token": False,
        "use_mm_proj": True, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": has_tower, "tokenizer_model_max_length": config.text.max_length,
        "tokenizer_padding_side": "right",
        "image_aspect_ratio": f"anyres_max_{processor.max_tiles}" if processor.max_tiles else ratio,
        configs.MODEL_TYPE: configs.own_settings(config),
    }
    if processor.pinpoints:
        settings["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in processor.pinpoints]
    if processor.several == "pad":
        settings |= {"mm_newline_position": processor.video_newline, "mm_spatial_pool_stride": 2,
                     "mm_spatial_pool_mode": processor.pool or "bilinear",
                     **{theirs: getattr(config.video, ours) for ours, theirs in original.VIDEO_FIELDS.items()}}
    return settings


def _specs(parameters: ParameterSource, config: LlavaConfig, dtype: str | None) -> list[TensorSpec]:
    """Lists the tensors in the original layout, without the layers of a SigLIP that LLaVA deletes."""
    read_layers = vit.depth(config.vision, config.feature_layer)
    specs = []
    for name, mapping in tables.tensor_mappings(parameters.shapes).items():
        if not config.vision.class_token and mapping.path.startswith("vision/layers/") and mapping.layer >= read_layers:
            continue
        specs.append(checkpoint.mapped_spec(original.speller(config)(name), parameters, mapping, dtype))
    return specs


def _write_tower_files(folder: Path, config: LlavaConfig) -> None:
    """Writes config.json and preprocessor_config.json of a vision tower alone, as transformers opens it."""
    is_siglip, size = not config.vision.class_token, config.processor.size
    folder.mkdir()
    files.write_json(folder / "config.json", configs.hf_vision(_hub_sizes(config)) | {
        "architectures": ["SiglipVisionModel" if is_siglip else "CLIPVisionModel"]})
    shape = {"size": {"height": size, "width": size}} if is_siglip else {
        "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
    files.write_json(folder / "preprocessor_config.json", shape | processors.PREPARATION | {
        "image_processor_type": "SiglipImageProcessor" if is_siglip else "CLIPImageProcessor",
        "image_mean": list(config.processor.mean), "image_std": list(config.processor.std)})
