"""Reads LoRA adapters of PEFT, and of the original LLaVA, as parameters beside those of a base model.

A PEFT folder has adapter_config.json and adapter_model.safetensors (or .bin). The original LLaVA adds
non_lora_trainables.bin, whose parameters were trained in full, and its config.json. Sources: PEFT 0.21
(utils/save_and_load.py, tuners/tuners_utils.py) and LLaVA (model/builder.py).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.files import matches_schema, read_json, show_json, to_path
from llava_jax.models import lora
from llava_jax.models.llava import LlavaConfig
from llava_jax.weights import fields, files, fingerprint, original, source, tables
from llava_jax.weights.fields import FLAG, Field
from llava_jax.weights.source import ParameterSource
from llava_jax.weights.tables import Shape

CONFIG, TENSORS, FULL = "adapter_config.json", "adapter_model", "non_lora_trainables.bin"
NOTE = "llava_jax.json"
"""File of an adapter's folder with its base and the model's configuration. PEFT ignores it."""

READ = {
    "peft_type": fields.TEXT, "r": Field(int, 1, 2**14), "lora_alpha": Field(float, 1e-6, 1e6),
    "lora_dropout": Field(float, 0, 0.999), "use_rslora": FLAG, "rank_pattern": Field(dict, null=True),
    "alpha_pattern": Field(dict, null=True), "modules_to_save": Field(list, null=True),
}
"""Fields of adapter_config.json whose types are checked."""

NOTE_FIELDS = {"base": fields.TEXT, "config": Field(dict), "fingerprint": Field(dict)}

NO_EFFECT = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
             "megatron_core", "qalora_group_size", "eva_config", "target_modules", "exclude_modules",
             "layers_to_transform", "layers_pattern")
"""Fields that are read elsewhere or do not change what the adapter computes."""

INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is. pissa, olora, corda, loftq and lora_ga change it."""

# Prefixes of the decoder, the vision tower and the projector in a model that PEFT wraps.
SPELLINGS = {
    "peft": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),  # transformers 5.6
    "transformers 4.52": ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
    "transformers 4.51": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "original-lora": (),  # see original.py
    "decoder alone": ("",),
}


@dataclass(frozen=True)
class LinearMap:
    """A linear map that may have an adapter: its parameter path without `/kernel`, its layer, and its sizes."""

    path: str
    layer: int | None
    inputs: int
    outputs: int


def linear_maps(shapes: Mapping[str, Shape], spelling: str) -> dict[str, LinearMap]:
    """Returns the linear maps of a model with these parameters by their module names in a spelling."""
    kernels = {path: shape for path, shape in shapes.items()
               if path.endswith("/kernel") and lora.TAKES_ADAPTER.fullmatch(path.removesuffix("/kernel"))}
    maps = {}
    for name, mapping in tables.tensor_mappings(kernels).items():
        outputs, inputs = mapping.hf_shape
        if spelled := spell(name, spelling, shapes):
            maps[spelled.removesuffix(".weight")] = LinearMap(
                mapping.path.removesuffix("/kernel"), mapping.layer, inputs, outputs)
    return maps


def spell(name: str, spelling: str, shapes: Mapping[str, Shape]) -> str | None:
    """Returns the name of a tensor of the hf layout in a spelling, or None if it has none."""
    if spelling == "original-lora":
        return original.original_name(name, sum(path.startswith("projector/") and path.endswith("/kernel")
                                                for path in shapes))
    for hf_prefix, prefix in zip((tables.LANGUAGE, tables.VISION, tables.PROJECTOR), SPELLINGS[spelling], strict=False):
        if name.startswith(hf_prefix):
            return prefix + name.removeprefix(hf_prefix)
    return "model.image_newline" if name == "image_newline" else None


class Adapter:
    """The folder of an adapter, of which only small files and headers are read.

    Attributes:
      directory: path of the folder.
      settings: adapter_config.json.
      note: content of NOTE, {} without it.

    Raises UserError for a field that is unknown or changes the result in a way that is not supported.
    """

    def __init__(self, directory: str | Path):
        self.directory = to_path(directory)
        self.file = self.directory / CONFIG
        if not self.file.exists():
            hint = ""
            if (self.directory / "adapter" / CONFIG).exists():
                hint = f"; one is in {self.directory / 'adapter'}"
            elif (self.directory / "recipe.json").exists() or (self.directory / files.RUN_CHECKPOINT).exists():
                hint = f"; to write one of this run: python -m llava_jax.convert {self.directory} DST --to peft"
            raise UserError(f"{self.file}: no such file, so {self.directory} is not the folder of an adapter{hint}")
        self.settings = read_json(self.file)
        checked = fields.check_fields(self.file, self.settings, READ)
        if checked.get("peft_type") != "LORA":
            raise UserError(f"{self.file}: peft_type is {show_json(checked.get('peft_type'))}; supported: LORA")
        for name, value in self.settings.items():
            if name == "init_lora_weights":
                if value not in INITS:
                    raise UserError(f"{self.file}: init_lora_weights is {show_json(value)}, which changes the base "
                                    "model; convert the adapter to an ordinary LoRA with PEFT "
                                    "(save_pretrained with path_initial_model_for_weight_conversion)")
            elif name not in READ and name not in NO_EFFECT and value not in (None, False, "none", "", {}, []):
                raise UserError(f"{self.file}: {name} is {show_json(value)}, which is not supported; merge the adapter "
                                "with PEFT's merge_and_unload, and use the merged model")
        file = self.directory / NOTE
        self.note = fields.check_fields(file, read_json(file) if file.exists() else {}, NOTE_FIELDS)

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        """Tensors of adapter_model and non_lora_trainables by their names without PEFT's prefix."""
        candidates = [self.directory / f"{TENSORS}.{kind}" for kind in ("safetensors", "bin")]
        stored = next((file for file in candidates if file.exists()), None)
        if stored is None:
            raise UserError(f"{candidates[0]}: no such file, nor {candidates[1].name}; download the folder again")
        tensors = {re.sub(r"^base_model\.(model\.)?", "", name): tensor
                   for name, tensor in files.tensors_in_file(stored).items()}
        if (self.directory / FULL).exists():
            # Files of wrapped models have more prefixes than those of bare ones.
            tensors |= {re.sub(r"^(base_model\.)?(model\.)*", "", name): tensor
                        for name, tensor in files.tensors_in_file(self.directory / FULL).items()}
        return tensors

    @property
    def pairs(self) -> dict[str, dict[str, Any]]:
        """The tensors A and B of each module."""
        pairs: dict[str, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            if match := re.fullmatch(r"(.*)\.lora_([AB])\.weight", name):
                pairs.setdefault(match[1], {})[match[2]] = tensor
        return pairs

    def full(self, shapes: Mapping[str, Shape]) -> dict[tuple[str, int | None], tuple[Any, tables.TensorMapping]]:
        """Returns tensors that replace whole parameters, by path and layer. Raises UserError for unknown tensors."""
        mappings, identity = tables.tensor_mappings(shapes), source.second_linear(shapes, np.dtype(np.float32))
        found, unknown = {}, []
        for name, tensor in self.tensors.items():
            if re.fullmatch(r".*\.lora_[AB]\.weight", name):
                continue
            hf_name = original.hf_name(name)
            if hf_name == tables.HEAD and hf_name not in mappings and any(
                    original.hf_name(other) == tables.EMBEDDING and np.array_equal(x.read(), tensor.read())
                    for other, x in self.tensors.items()):
                continue  # PEFT stores a tied embedding twice
            if hf_name in identity and np.array_equal(tensor.read().astype(np.float32), identity[hf_name]):
                continue
            mapping = mappings.get(hf_name)
            if mapping is None:
                unknown.append(name)
            elif tensor.shape != mapping.hf_shape:
                raise UserError(f"{self.directory}: {name} is {list(tensor.shape)}, but the base model's is "
                                f"{list(mapping.hf_shape)}; name the base that the adapter was trained on")
            else:
                found[mapping.path, mapping.layer] = tensor, mapping
        if kept := [name for name in unknown if re.search(r"\.(base_layer|lora_embedding_[AB])(\.|$)", name)]:
            raise UserError(f"{self.directory}: {files.shorten(kept)}: adapters of an embedding or a head are not "
                            "supported; merge the adapter with PEFT's merge_and_unload, and use the merged model")
        if unknown:
            raise UserError(f"{self.directory}: left over: {files.shorten(unknown)}; the base model has no such "
                            "parameters")
        for module in self.settings.get("modules_to_save") or []:
            if not any(f".{module}." in f".{name}" for name in self.tensors):
                raise UserError(f"{self.directory}: no tensor of {module}, which modules_to_save names; the folder is "
                                "incomplete")
        return found


def attach(adapter: Adapter, config: LlavaConfig, base: ParameterSource,
           name: str | Path) -> tuple[LlavaConfig, ParameterSource]:
    """Adds an adapter to the parameters of its base model. `name` is the base's, for messages.

    Returns the configuration with `lora`, and the base's parameters with those of the adapter. Parameters that the
    adapter's training changed in full replace the base's. The base may lack those.

    Raises UserError if the base is another model than the adapter's (`fingerprint`), if a pair of tensors is missing,
    left over or of another shape, or if the pairs are not those that the adapter's settings name.
    """
    if config.lora is not None:
        raise UserError(f"{name} has adapters itself; merge them first (python -m llava_jax.convert --merge)")
    shapes = source.shapes(config)
    full = adapter.full(shapes)
    fingerprint.check(adapter.directory, adapter.note, base, {path for path, _ in full}, name)
    targets = _targets(adapter, shapes)
    paths = {target.path for target, _, _ in targets.values()}
    settings = adapter.settings
    usual = {path.removesuffix("/kernel") for path in shapes
             if re.fullmatch(Lora().targets[0], path.removesuffix("/kernel"))}
    added = Lora(max(rank for _, rank, _ in targets.values()), float(settings.get("lora_alpha", 8)),
                float(settings.get("lora_dropout", 0)), Lora().targets if paths == usual else tuple(sorted(paths)),
                settings.get("use_rslora", False))
    config = dataclasses.replace(config, lora=added)
    factors = _factors(adapter, targets, added)
    expected = source.shapes(config)
    missing = sorted(expected.keys() - base.shapes.keys() - factors.keys() - {path for path, _ in full})
    if missing:
        hint = "" if (adapter.directory / FULL).exists() else f" (the folder has no {FULL})"
        raise UserError(f"{adapter.directory}{hint} and {name} lack {files.shorten(missing, 3)}; name a finished LLaVA "
                        "as base, or the adapter's folder from the end of its training")
    dtypes = {path: base.dtypes[path] for path in expected if path in base.dtypes}
    for path in {path for path, _ in full}:
        kinds = {tensor.dtype for (other, _), (tensor, _) in full.items() if other == path}
        dtypes[path] = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    dtypes |= {path: dtype for path, (dtype, *_) in factors.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        if path in factors:
            return factors[path][1](layer)
        if (path, layer) in full:
            tensor, mapping = full[path, layer]
            return mapping.transform.from_hf(tensor.read(), mapping.shape)
        return base.read(path, layer)

    def tensor(path: str, layer: int | None) -> source.Stored | None:
        if path in factors:
            return factors[path][2](layer)
        if (path, layer) in full:
            return full[path, layer][0], full[path, layer][1].transform
        return base.tensor(path, layer)

    return config, ParameterSource(expected, dtypes, read, tensor)


def attach_several(adapters: Sequence[Adapter], config: LlavaConfig, base: ParameterSource, name: str | Path
                   ) -> tuple[LlavaConfig, ParameterSource, list[ParameterSource]]:
    """Adds several adapters of one base model, which a LoraBank concatenates along the rank.

    Returns configuration and parameters as `attach` does, and for each adapter the projector's parameters that its
    training changed in full, which are not among the parameters. `name` is the base's, for messages.

    Raises UserError as `attach` does, and if an adapter was trained with other parameters in full.
    """
    attached, own = [attach(adapter, config, base, name) for adapter in adapters], []
    base_shapes = source.shapes(config)
    for adapter, (_, parameters) in zip(adapters, attached, strict=True):
        full = sorted({path for path, _ in adapter.full(base_shapes)})
        if other := [path for path in full if not re.match("projector/|image_newline$", path)]:
            raise UserError(f"{adapter.directory}: {files.shorten(other, 3)} were trained in full, and several "
                            "adapters share those of the base; merge this adapter (python -m llava_jax.convert "
                            "--merge) and serve it as its own model")
        own.append(dataclasses.replace(parameters, shapes={path: base_shapes[path] for path in full}))
    ranks = [added.lora.rank for added, _ in attached]
    targets = {lora.FACTOR.fullmatch(path)[1] for _, parameters in attached for path in parameters.shapes
               if lora.is_adapter(path)}
    bank = lora.LoraBank(sum(ranks), dropout=0.0, targets=tuple(sorted(targets)),
                         parts=tuple((added.lora.rank, added.lora.scale) for added, _ in attached))
    config = dataclasses.replace(config, lora=bank)
    shapes = source.shapes(config)

    def read(path: str, layer: int | None) -> np.ndarray:
        if not lora.is_adapter(path):
            return base.read(path, layer)
        axis = 1 if path.endswith("lora_a") else 0
        size = shapes[path][-2:][1 - axis]
        return np.concatenate([
            parameters.read(path, layer) if path in parameters.shapes else
            np.zeros((size, rank) if axis else (rank, size), np.float32)
            for rank, (_, parameters) in zip(ranks, attached, strict=True)], axis)

    dtypes = {path: base.dtypes.get(path, np.dtype(np.float32)) for path in shapes}
    tensor = lambda path, layer: None if lora.is_adapter(path) else base.tensor(path, layer)  # noqa: E731
    return config, ParameterSource(shapes, dtypes, read, tensor), own


def _targets(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[str, tuple[LinearMap, int, float]]:
    """Returns linear map, rank and scale of every adapted module. Raises UserError if pairs and settings differ."""
    pairs, settings, where = adapter.pairs, adapter.settings, adapter.directory
    spellings = {name: linear_maps(shapes, name) for name in SPELLINGS}
    spelling = max(spellings, key=lambda name: len(spellings[name].keys() & pairs.keys()))
    maps = spellings[spelling]
    unused = {module for module in pairs if tables.IGNORED.fullmatch(tables.hf_name(f"{module}.weight"))}
    if unknown := sorted(pairs.keys() - maps.keys() - unused):
        raise UserError(f"{where}: adapters of {files.shorten(unknown, 3)}, which the base model does not have or "
                        "which takes no adapter here; name the base that the adapter was trained on")
    if spelling in ("original-lora", "decoder alone"):  # PEFT wrapped a part of the model
        parts = {maps[module].path.split("/")[0] for module in pairs}
        maps = {module: linear for module, linear in maps.items() if linear.path.split("/")[0] in parts}
    wanted = {module for module in maps if _is_target(adapter, module)}
    absent, extra = wanted - pairs.keys(), pairs.keys() - wanted - unused
    for problem, modules in (("no adapters of", absent), ("adapters of", extra)):
        if modules:
            raise UserError(f"{where}: {problem} {files.shorten(sorted(modules), 3)}, which is not what target_modules "
                            f"in {CONFIG} says; the folder is incomplete, or its files are of different adapters")
    if not wanted:
        raise UserError(f"{where}: no tensor lora_A or lora_B")
    targets = {}
    for module in sorted(wanted):
        rank = _by_pattern(adapter, "rank_pattern", module, settings.get("r", 8))
        alpha = _by_pattern(adapter, "alpha_pattern", module, settings.get("lora_alpha", 8))
        linear, pair = maps[module], pairs[module]
        for half, shape in (("A", (rank, linear.inputs)), ("B", (linear.outputs, rank))):
            if half not in pair:
                raise UserError(f"{where}: {module}.lora_{half}.weight is missing; download the folder again")
            if pair[half].shape != shape:
                raise UserError(f"{where}: {module}.lora_{half}.weight is {list(pair[half].shape)} instead of "
                                f"{list(shape)}; name the base that the adapter was trained on")
        targets[module] = linear, rank, Lora(rank, alpha, rslora=settings.get("use_rslora", False)).scale
    return targets


def _is_target(adapter: Adapter, module: str) -> bool:
    """Returns whether PEFT adapts a module, by the rules of its `check_target_module_exists`."""
    target, exclude, layers = (adapter.settings.get(name) for name in
                               ("target_modules", "exclude_modules", "layers_to_transform"))
    saved = adapter.settings.get("modules_to_save") or []
    for name, value in (("target_modules", target), ("exclude_modules", exclude or []), ("modules_to_save", saved)):
        if not matches_schema(value, str) and not matches_schema(value, [str]):
            raise UserError(f"{adapter.file}: {name} is {show_json(value)}; it must be a text or a list of texts")
    try:
        if exclude and _matches(exclude, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if isinstance(target, str):
            return target.lower() == "all-linear" or _matches(target, module)
        if not _matches(target, module) or layers is None or layers == []:
            return _matches(target, module)
        patterns = adapter.settings.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False
    except (re.error, TypeError) as error:
        raise UserError(f"{adapter.file}: target_modules or its companions are invalid ({error})") from None


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _by_pattern(adapter: Adapter, field: str, module: str, default: Any) -> Any:
    """Returns the rank or alpha of a module, as PEFT's `get_pattern_key` chooses it."""
    limits = READ["r" if field == "rank_pattern" else "lora_alpha"]
    for pattern, value in (adapter.settings.get(field) or {}).items():
        if not limits.accepts(value):
            raise UserError(f"{adapter.file}: {field} has {show_json(value)}; it must be {limits}")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _factors(adapter: Adapter, targets: dict[str, tuple[LinearMap, int, float]], added: Lora
             ) -> dict[str, tuple[np.dtype, Callable[[int | None], np.ndarray],
                                  Callable[[int | None], source.Stored | None]]]:
    """Returns dtype of every parameter `lora_a` and `lora_b`, and its functions of a ParameterSource.

    Zeros fill a layer without adapter, and the columns of a smaller rank. They stay zero in training, because the
    gradient of a zero column is zero if its row is. A scale of its own is multiplied into `lora_b`.
    """
    pairs = adapter.pairs
    modules = {(linear.path, linear.layer): module for module, (linear, _, _) in targets.items()}
    scales = {scale for _, _, scale in targets.values()}
    factors = {}

    def tensor(path: str, half: str, layer: int | None) -> source.Stored | None:
        module = modules.get((path, layer))
        same = module and targets[module][1] == added.rank and (half == "A" or targets[module][2] == added.scale)
        return (pairs[module][half], tables.FROM_HIDDEN) if same else None

    for linear, _, _ in targets.values():
        kinds = {pairs[module][half].dtype for (path, _), module in modules.items() if path == linear.path
                 for half in "AB"}
        dtype = kinds.pop() if len(kinds) == 1 and scales == {added.scale} else np.dtype(np.float32)

        def lora_a(layer: int | None, linear: LinearMap = linear, dtype: np.dtype = dtype) -> np.ndarray:
            a = np.zeros((linear.inputs, added.rank), dtype)
            if module := modules.get((linear.path, layer)):
                a[:, : targets[module][1]] = pairs[module]["A"].read().T
            return a

        def lora_b(layer: int | None, linear: LinearMap = linear, dtype: np.dtype = dtype) -> np.ndarray:
            b = np.zeros((added.rank, linear.outputs), dtype)
            if module := modules.get((linear.path, layer)):
                _, rank, scale = targets[module]
                value = pairs[module]["B"].read().T
                b[:rank] = value if scale == added.scale else value.astype(np.float32) * (scale / added.scale)
            return b

        factors[f"{linear.path}/adapter/lora_a"] = dtype, lora_a, functools.partial(tensor, linear.path, "A")
        factors[f"{linear.path}/adapter/lora_b"] = dtype, lora_b, functools.partial(tensor, linear.path, "B")
    return factors


def merge(config: LlavaConfig, parameters: ParameterSource, name: str = "") -> tuple[LlavaConfig, ParameterSource]:
    """Merges the adapters of a model into its kernels when they are read: K + scale * lora_a @ lora_b, in float32.

    `name` is that of the adapters, which the configuration keeps.
    """

    def read(path: str, layer: int | None) -> np.ndarray:
        x, factor = parameters.read(path, layer), path.removesuffix("kernel") + "adapter/lora_"
        if f"{factor}a" not in parameters.shapes or not path.endswith("/kernel"):
            return x
        a, b = (parameters.read(factor + half, layer).astype(np.float32) for half in "ab")
        return x.astype(np.float32) + config.lora.scale * (a @ b).reshape(x.shape)

    kept = {path: shape for path, shape in parameters.shapes.items() if not lora.is_adapter(path)}
    # No `tensor`, because nothing but a conversion reads a merged model.
    return (lora.without_adapters(config, name),
            ParameterSource(kept, {path: parameters.dtypes[path] for path in kept}, read))
