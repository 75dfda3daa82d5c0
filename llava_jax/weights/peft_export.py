"""Writes the adapters of a model as a LoRA folder of PEFT, or of the original LLaVA."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.models import lora
from llava_jax.models.llava import LlavaConfig, Parameters
from llava_jax.weights import (
    checkpoint,
    configs,
    files,
    fingerprint,
    original_export,
    peft,
    source,
    tables,
    torch_writer,
)
from llava_jax.weights.files import NotFinite, TensorSpec
from llava_jax.weights.source import ParameterSource

PREFIX = "base_model.model."
"""Prefix of PEFT's names: of the wrapped model in PEFT's own."""


def save_peft(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    base: str | Path,
    *,
    layout: Literal["peft", "original-lora"] = "peft",
    trained: Collection[str] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes the adapters of a model, and the projector in full, as a folder that opens on the base model.

    Args:
      directory: path of a missing or empty directory. It appears when it is complete.
      config, parameters: of a model with adapters. Kernels are read for the base's fingerprint alone. Every process
        must call this function, and the first process writes.
      base: name or path of the base model, which is noted in the folder.
      layout: peft opens in PEFT with transformers 4.52 or later. original-lora is the four files of the original LLaVA,
        whose code wants "llava" and "lora" in the folder's name.
      trained: paths of the parameters besides adapters that training changed, which are saved in full. None means the
        projector and `image_newline`.
      dtype: "float32", "bfloat16" or "float16" for all tensors; unchanged if None.

    Raises UserError if the model has no adapters, if the layout has no place for a parameter, or if a value is not
    finite.
    """
    if config.lora is None:
        raise UserError("the model has no adapters to write; they may have been merged into it. Name the run's "
                        "directory, or one of its checkpoints")
    if not isinstance(parameters, ParameterSource):
        parameters = source.from_memory(parameters)
    has_adapter = {path.split("/adapter/")[0] for path in parameters.shapes if lora.is_adapter(path)}
    trained = {path for path in (usually_trained(parameters) if trained is None else trained)
               if not lora.is_adapter(path)}
    if any(path.startswith("vision/") for path in trained):  # PEFT replaces whole modules
        trained |= {path for path in parameters.shapes if path.startswith("vision/") and not lora.is_adapter(path)}
    _check(layout, trained, has_adapter)
    pairs = _pairs(parameters, layout, dtype)
    full = _full(parameters, trained, layout, dtype)
    note = {"base": str(base), "config": configs.native_config(config),
            "fingerprint": fingerprint.compute(parameters, trained)}

    def write(target: Path | None, _: ParameterSource) -> NotFinite:
        if target:
            files.write_json(target / peft.CONFIG, _settings(config, base, pairs, trained, layout))
            files.write_json(target / peft.NOTE, note)
        if layout == "peft":
            return files.write(target, [*pairs, *full], single=f"{peft.TENSORS}.safetensors")
        if target:
            files.write_json(target / "config.json", original_export.config_json(config))
        first = torch_writer.write(target and target / f"{peft.TENSORS}.bin", pairs)
        second = torch_writer.write(target and target / peft.FULL, full)
        return NotFinite(first.stored + second.stored, first.overflowed + second.overflowed)

    checkpoint.save_directory(Path(directory), parameters, write)


def usually_trained(parameters: ParameterSource) -> set[str]:
    """Returns the paths of the projector, unless it has adapters, and of `image_newline`."""
    adapted = any(path.startswith("projector/") and lora.is_adapter(path) for path in parameters.shapes)
    return {path for path in parameters.shapes
            if path == "image_newline" or path.startswith("projector/") and not adapted}


def in_full(adapter: str | Path, shapes: Mapping[str, tables.Shape]) -> set[str]:
    """Returns the paths of the parameters that an adapter's folder replaces in full."""
    shapes = {path: shape for path, shape in shapes.items() if not lora.is_adapter(path)}
    return {path for path, _ in peft.Adapter(adapter).full(shapes)}


def differing_paths(sources: Model, shapes: Mapping[str, tables.Shape]) -> set[str]:
    """Returns the paths of a recipe's model that its base lacks, or has with other values, before training."""
    paths = set(source.fresh_paths(sources, shapes))
    if not sources.llava:
        paths |= {path for path in shapes if re.match("projector/|image_newline", path) and not lora.is_adapter(path)}
    return paths | (in_full(sources.adapter, shapes) if sources.adapter else set())


def _check(layout: str, trained: set[str], has_adapter: set[str]) -> None:
    """Raises UserError for parameters that a layout has no place for."""
    merged = "merge the adapters into a whole checkpoint (--merge)"
    if other := sorted(path for path in trained if path.startswith("decoder/")):
        raise UserError(f"{files.shorten(other, 3)}: trained in full, for which {layout} has no place; {merged}")
    if both := {path.split("/")[0] for path in trained} & {path.split("/")[0] for path in has_adapter}:
        raise UserError(f"the {both.pop()} has adapters and was trained in full too, for which {layout} has no place; "
                        f"{merged}")
    if layout == "original-lora" and (tower := sorted(
            path for path in trained | has_adapter if path.startswith("vision/"))):
        raise UserError(f"{files.shorten(tower, 3)}: LLaVA's code reads no vision tower from a LoRA folder; take "
                        f"--to peft, or {merged}")


def _pairs(parameters: ParameterSource, layout: str, dtype: str | None) -> list[TensorSpec]:
    """Lists the tensors lora_A [rank, in] and lora_B [out, rank] of every adapted module."""
    kernels = {path: shape for path, shape in parameters.shapes.items() if not lora.is_adapter(path)}
    specs = []
    for module, linear in peft.linear_maps(kernels, layout).items():
        for half in "ab":
            path = f"{linear.path}/adapter/lora_{half}"
            if path in parameters.shapes:
                rows, columns = parameters.shapes[path][-2:]

                def blocks(path: str = path, layer: int | None = linear.layer) -> Iterator[np.ndarray]:
                    yield parameters.read(path, layer).T

                specs.append(TensorSpec(f"{PREFIX}{module}.lora_{half.upper()}.weight",
                                        checkpoint.stored_dtype(parameters, path, dtype), (columns, rows), blocks))
    return specs


def _full(parameters: ParameterSource, trained: set[str], layout: str, dtype: str | None) -> list[TensorSpec]:
    """Lists the tensors of parameters that are saved in full."""
    specs = []
    shapes = {path: parameters.shapes[path] for path in sorted(trained)}
    for name, mapping in tables.tensor_mappings(shapes).items():
        spelled = peft.spell(name, layout, parameters.shapes)
        specs.append(checkpoint.mapped_spec(PREFIX + spelled, parameters, mapping, dtype))
    for name, x in source.second_linear(shapes, np.dtype(np.float32)).items() if layout == "peft" else ():
        specs.append(TensorSpec(f"{PREFIX}model.{name}", x.dtype, x.shape, lambda x=x: [x]))
    return specs


def _settings(config: LlavaConfig, base: str | Path, pairs: list[TensorSpec], trained: set[str],
              layout: str) -> dict[str, Any]:
    """Returns adapter_config.json. In PEFT's layout the targets are a pattern that spares the other parts' modules."""
    names = [tensor.name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for tensor in pairs[::2]]
    targets: Any = sorted({name.rpartition(".")[2] for name in names})
    modules = None
    if layout == "peft":
        patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names})
        targets = "|".join(patterns).replace(r"model\.vision_tower\.", r"model\.vision_tower\.(vision_model\.)?")
        parts = {"projector": "multi_modal_projector", "vision": "vision_tower"}
        modules = sorted({parts[part] for path in trained if (part := path.split("/")[0]) in parts}) or None
    alpha = config.lora.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "inference_mode": True,
        "r": config.lora.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora.dropout, "use_rslora": config.lora.rslora, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": targets, "modules_to_save": modules}
