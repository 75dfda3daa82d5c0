"""Reads and writes config.json of the native layout, and of Hugging Face's LLaVA, vision towers and decoders."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from llava_jax.config import Lora
from llava_jax.errors import NoHfForm, UserError
from llava_jax.files import read_json, to_path
from llava_jax.images import ImageProcessor
from llava_jax.models import projector
from llava_jax.models.llama import LlamaConfig, RopeScaling
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import ACTIVATIONS, VisionConfig
from llava_jax.text import templates
from llava_jax.weights import fields, processors
from llava_jax.weights.chat_templates import template_name
from llava_jax.weights.fields import build
from llava_jax.weights.files import has_tensors, other_format

MODEL_TYPE = "llava_jax"
VERSION = 2
TEXT_MODELS = ("llama", "mistral", "qwen2")
TOWERS = ("clip_vision_model", "siglip_vision_model")
FEATURE_SELECT = {"default": "patch", "full": "cls_patch"}

VISION_FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "hidden_act": "activation", "layer_norm_eps": "norm_eps"}
"""Fields of Hugging Face's vision configs and of VisionConfig."""

TEXT_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_length"}
"""Fields of Hugging Face's decoder configs and of LlamaConfig."""


def read_config(path: str | Path, template: str | None = None) -> LlavaConfig | VisionConfig | LlamaConfig:
    """Reads the configuration of a checkpoint directory: a LLaVA, a vision tower (CLIP, SigLIP) or a decoder.

    config.json determines the layout; `original.read_config` reads the original one. `template` replaces a LLaVA's
    conversation template, which is then not read from its files. Raises UserError that names file and field if a file
    is missing or a setting is not supported.
    """
    directory = to_path(path)
    raw, file = read_raw(directory), directory / "config.json"
    kind = raw.get("model_type")
    if kind == MODEL_TYPE:
        return read_native(raw | ({"template": template} if template else {}), file)
    kinds = (*processors.CLASSES, "clip", "siglip", *TOWERS, *TEXT_MODELS)
    if kind not in kinds:
        raise UserError(f"{file}: model_type {kind!r} is not supported; {', '.join(kinds)} and {MODEL_TYPE} are")
    for name in ("quantization_config", "text_config.quantization_config"):
        part = raw.get("text_config") if "." in name else raw
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            raise UserError(f"{file}: {name}: quantised models are not read; take the model it was made of")
    if kind in TEXT_MODELS:
        return read_decoder(file, raw, kind)
    if kind in TOWERS:
        return _vision(file, "", _parse(file, kind, fields.tower(file, raw)))
    if kind in ("clip", "siglip"):
        return _vision(file, "vision_config.", _parse(file, kind, fields.clip(file, raw)).vision_config)
    extras = fields.check_fields(file, raw, {MODEL_TYPE: fields.Field(dict)}).get(MODEL_TYPE, {})
    extras = fields.check_fields(file, extras, fields.HF_EXTRAS, f"{MODEL_TYPE}.")
    return _llava(directory, file, _parse_llava(file, raw), extras | ({"template": template} if template else {}))


def read_raw(directory: Path) -> dict[str, Any]:
    """Returns the config.json of a model's directory. Raises UserError if it is not one."""
    if not directory.is_dir():
        raise UserError(f"{directory}: " + ("a file; name its directory" if directory.exists() else "no such directory;"
                                            " to fetch a model from the hub: hf download NAME --local-dir DIR"))
    file = directory / "config.json"
    if not file.exists() or (directory / "adapter_config.json").exists() and not has_tensors(directory):
        raise UserError(other_format(directory) or f"{file}: no such file, so this is not the directory of a model")
    return read_json(file)


def read_decoder(file: Path, raw: dict[str, Any], kind: str) -> LlamaConfig:
    """Reads a decoder, one of TEXT_MODELS, from the fields of a config.json."""
    return _text(file, "", _parse(file, kind, fields.decoder(file, raw)))


def _parse_llava(file: Path, raw: dict[str, Any]) -> Any:
    checked = {"use_image_newline_parameter": True} | fields.llava(file, raw)  # absent in transformers 5
    for name, kinds in (("vision_config", TOWERS), ("text_config", TEXT_MODELS)):
        kind = checked.get(name, {}).get("model_type", kinds[0])
        if kind not in kinds:
            raise UserError(f"{file}: {name}.model_type is {kind!r}; supported: {' and '.join(kinds)}")
    return _parse(file, raw["model_type"], checked)


def _parse(file: Path, kind: str, settings: dict[str, Any]) -> Any:
    """Builds Hugging Face's configuration, whose class fills in the defaults of missing fields."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    from transformers import AutoConfig, logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if name != "model_type"})
    except (OSError, MemoryError):
        raise
    except Exception as error:  # their validators raise many types
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    finally:
        logging.set_verbosity(verbosity)


def _expect(file: Path, config: Any, prefix: str = "", **allowed: Any) -> None:
    """Raises UserError unless every named field has its value, or one of a tuple of values."""
    for field, values in allowed.items():
        value = getattr(config, field, None)
        if value not in (values if isinstance(values, tuple) else (values,)):
            choices = " and ".join(map(str, values)) if isinstance(values, tuple) else values
            raise UserError(f"{file}: {prefix}{field} is {value!r}; supported: {choices}")


def _llava(directory: Path, file: Path, config: Any, extras: dict) -> LlavaConfig:
    _expect(file, config, multimodal_projector_bias=True, projector_hidden_act=("gelu", "linear"),
            vision_feature_select_strategy=tuple(FEATURE_SELECT), use_image_newline_parameter=True)
    text = dataclasses.replace(_text(file, "text_config.", config.text_config),
                               tie_word_embeddings=config.tie_word_embeddings)
    select = config.vision_feature_select_strategy
    is_siglip = config.vision_config.model_type == "siglip_vision_model"
    if is_siglip and select == "default":
        raise UserError(f"{file}: vision_feature_select_strategy is 'default', which drops the first feature, but "
                        "SigLIP has no class token; supported: full")
    return build(
        file, LlavaConfig, vision=_vision(file, "vision_config.", config.vision_config), text=text,
        projector="mlp2x_gelu" if config.projector_hidden_act == "gelu" else "linear",
        feature_layer=config.vision_feature_layer,
        feature_select="patch" if is_siglip else FEATURE_SELECT[select],
        processor=processors.read(directory, file, config, extras),
        exif=extras.get("exif", False), merged=extras.get("merged", ""),
        video=fields.video(file, extras.get("video", {}), f"{MODEL_TYPE}.video."),
        template=build(
            file, templates.get,
            template=extras.get("template") or template_name(directory, config.text_config.model_type)).name,
    )


def _vision(file: Path, prefix: str, config: Any) -> VisionConfig:
    _expect(file, config, prefix, num_channels=3, hidden_act=tuple(ACTIVATIONS))
    is_clip = config.model_type == "clip_vision_model"
    sizes = {ours: getattr(config, theirs) for theirs, ours in VISION_FIELDS.items()}
    return build(file, VisionConfig, **sizes, class_token=is_clip, patch_bias=not is_clip, pre_norm=is_clip)


def _text(file: Path, prefix: str, config: Any) -> LlamaConfig:
    _expect(file, config, prefix, hidden_act="silu")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{file}: {prefix}rope_scaling {rope} is not supported; rope_type linear and llama3 are")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                "original_max_position_embeddings")}
    for name in needed.get(rope["rope_type"], ()):
        if rope.get(name) is None:
            raise UserError(f"{file}: {prefix}rope_scaling lacks {name}, which rope_type {rope['rope_type']} needs")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UserError(f"{file}: {prefix}sliding_window is {window}, shorter than max_position_embeddings "
                         f"{config.max_position_embeddings}; sliding window attention is not supported")
    scaling = None
    if rope["rope_type"] == "linear":
        scaling = RopeScaling("linear", rope["factor"])
    elif rope["rope_type"] == "llama3":
        scaling = build(file, RopeScaling, kind="llama3", factor=rope["factor"],
                         low_freq_factor=rope["low_freq_factor"], high_freq_factor=rope["high_freq_factor"],
                         original_length=rope["original_max_position_embeddings"])
    attention_bias = getattr(config, "attention_bias", False)
    sizes = {ours: getattr(config, theirs, None) for theirs, ours in TEXT_FIELDS.items()}
    sizes["head_dim"] = sizes["head_dim"] or config.hidden_size // config.num_attention_heads
    return build(
        file, LlamaConfig, **sizes, rope_theta=float(rope["rope_theta"]), rope_scaling=scaling,
        qkv_bias=config.model_type == "qwen2" or attention_bias, out_bias=attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False), tie_word_embeddings=config.tie_word_embeddings,
    )


def read_native(raw: dict, file: Path) -> LlavaConfig:
    """Reads a configuration of the native layout. `file` is where it is, for messages."""
    if raw.get("version") == 1:
        raise UserError(f"{file}: version 1 of the {MODEL_TYPE} layout has parameter and field names of an earlier "
                        "version; convert the model again from its hf layout (python -m llava_jax.convert)")
    if raw.get("version") != VERSION:
        raise UserError(f"{file}: version {raw.get('version')!r} of the {MODEL_TYPE} layout is not known here; "
                        f"{VERSION} is")
    checked = fields.native(file, {key: value for key, value in raw.items() if key not in ("model_type", "version")})
    scaling = checked["text"]["rope_scaling"]
    text = checked["text"] | {"rope_scaling": scaling and build(file, RopeScaling, **scaling)}
    lists = {name: fields.numbers(file, f"processor.{name}", checked["processor"][name]) for name in ("mean", "std")}
    lists["pinpoints"] = fields.pairs(file, "processor.pinpoints", checked["processor"]["pinpoints"])
    parts = {"processor": build(file, ImageProcessor, **checked["processor"] | lists), "video": checked["video"],
             "vision": build(file, VisionConfig, **checked["vision"]), "text": build(file, LlamaConfig, **text)}
    if checked["lora"] is not None:
        parts["lora"] = build(file, Lora, **checked["lora"] | {"targets": tuple(map(str, checked["lora"]["targets"]))})
    config = build(file, LlavaConfig, **checked | parts)
    build(file, projector.depth, kind=config.projector)
    return dataclasses.replace(config, template=build(file, templates.get, template=config.template).name)


def native_config(config: LlavaConfig) -> dict:
    """Returns the config.json of the native layout."""
    return {"model_type": MODEL_TYPE, "version": VERSION, **dataclasses.asdict(config)}


def hf_config(config: LlavaConfig, tokens: dict[str, Any], vocab_size: int, dtype: str) -> dict:
    """Returns the config.json of Hugging Face's LLaVA, with every field that matters, because defaults change.

    `tokens`: ids of "image", "video", "pad", "bos" and "eos". `vocab_size`: rows of the embedding. `dtype`: of the
    tensors. The image processor decides which of transformers' types it is (`processors.model_type`).
    Raises NoHfForm if Hugging Face's model cannot compute the same function.
    """
    if projector.depth(config.projector) not in (1, 2) or projector.merge_size(config.projector) > 1:
        raise NoHfForm(f"projector {config.projector!r} has no form in Hugging Face's layout; "
                       "linear and mlp2x_gelu have")
    kind = processors.model_type(config)
    ids = {f"{name}_token_id": tokens[name] for name in ("bos", "eos", "pad")}
    return {
        "architectures": [f"{processors.CLASSES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "torch_dtype": dtype,
        **processors.config_fields(config, tokens),
        "projector_hidden_act": "gelu" if projector.depth(config.projector) == 2 else "linear",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": processors.select_strategy(config),
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **ids,
        "vision_config": hf_vision(config.vision),
        "text_config": hf_text(config.text, vocab_size) | ids,
        MODEL_TYPE: own_settings(config),
    }


def own_settings(config: LlavaConfig) -> dict[str, Any]:
    """Returns what other layouts have no field for; their config.json has it under MODEL_TYPE."""
    settings = {"template": config.template, "exif": config.exif, "video": dataclasses.asdict(config.video),
                **processors.extras(config.processor)}
    return settings | ({"merged": config.merged} if config.merged else {})


def hf_vision(config: VisionConfig) -> dict:
    """Returns the config of a CLIP or SigLIP vision tower. Raises NoHfForm if Hugging Face has no such tower."""
    flags = (config.class_token, config.patch_bias, config.pre_norm)
    clip, siglip = (True, False, True), (False, True, False)
    if flags not in (clip, siglip):
        raise NoHfForm("Hugging Face has no vision tower with these flags: "
                       f"class_token {flags[0]}, patch_bias {flags[1]}, pre_norm {flags[2]}")
    kind = {"model_type": "clip_vision_model", "projection_dim": 768}  # of a head that LLaVA does not have
    if flags == siglip:
        kind = {"model_type": "siglip_vision_model", "vision_use_head": False}
    sizes = {theirs: getattr(config, ours) for theirs, ours in VISION_FIELDS.items()}
    return kind | sizes | {"num_channels": 3, "attention_dropout": 0.0}


def hf_text(config: LlamaConfig, vocab_size: int) -> dict:
    """Returns the config of a Qwen2 if only queries, keys and values have biases, otherwise of a LLaMA.

    `vocab_size`: number of rows of the embedding. Raises NoHfForm if Hugging Face has no decoder with these biases.
    """
    qwen2 = config.qkv_bias and not config.out_bias
    if config.out_bias and not config.qkv_bias or qwen2 and config.mlp_bias:
        raise NoHfForm("Hugging Face has no decoder with these biases: "
                       f"qkv_bias {config.qkv_bias}, out_bias {config.out_bias}, mlp_bias {config.mlp_bias}")
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            scaling |= {"low_freq_factor": config.rope_scaling.low_freq_factor,
                        "high_freq_factor": config.rope_scaling.high_freq_factor,
                        "original_max_position_embeddings": config.rope_scaling.original_length}
    kind = {"model_type": "qwen2", "use_sliding_window": False}
    if not qwen2:
        kind = {"model_type": "llama", "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    sizes = {theirs: getattr(config, ours) for theirs, ours in TEXT_FIELDS.items()}
    return kind | sizes | {
        "vocab_size": vocab_size, "hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "attention_dropout": 0.0, "tie_word_embeddings": config.tie_word_embeddings, "use_cache": True}
