"""Reads parameters by path, from files of either layout or from memory, one layer at a time."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.models import llava, lora
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import VisionConfig
from llava_jax.weights import files, tables
from llava_jax.weights.tables import Shape

Config = LlavaConfig | VisionConfig | LlamaConfig

OLD_NAMES = re.compile(r".*/(attention/(query|key|value|out)|mlp/(gate|up|down))/\w+|decoder/head/kernel")
"""Parameter names in native checkpoints of version 1."""


Stored = tuple[files.TensorInfo, tables.Transform]
"""A tensor of a file, of which rows can be read alone, and the layout in which it contains a parameter."""


@dataclass(frozen=True)
class ParameterSource:
    """Shapes and dtypes of parameters, and functions that read them.

    `read(path, layer)` returns one layer of a stacked parameter, or another parameter (layer None), on the host.
    `tensor(path, layer)` returns the tensor that contains it, or None if it is computed from several.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str, int | None], np.ndarray]
    tensor: Callable[[str, int | None], Stored | None] = lambda path, layer: None


def shapes(config: Config) -> dict[str, Shape]:
    """Returns shapes by path of the parameters of a model, or of a vision tower or decoder."""
    part, model = "", config
    if isinstance(config, VisionConfig):
        part, model = "vision/", LlavaConfig(vision=config, feature_layer=0)
    elif isinstance(config, LlamaConfig):
        part, model = "decoder/", LlavaConfig(text=config)
    parameters = llava.abstract_params(model)[1]
    return {path: parameter.shape for path, parameter in parameters.items() if path.startswith(part)}


def fresh_paths(model: Model, paths: Collection[str]) -> set[str]:
    """Returns the paths that a recipe initialises. Raises UserError if an expression matches no parameter."""
    if model.adapter:
        return set()
    adapters = {path for path in paths if lora.is_adapter(path)} if model.lora else set()
    if model.fresh is None:
        new = "image_newline$" if model.projector_weights else "projector/|image_newline$"
        joined = {path for path in paths if re.match(new, path)}
        return adapters if model.llava else adapters | joined
    matches = {pattern: {path for path in paths if re.fullmatch(pattern, path)} for pattern in model.fresh}
    if unused := [pattern for pattern, matched in matches.items() if not matched]:
        raise UserError(f"model.fresh: {', '.join(unused)}: matches no parameter")
    return adapters.union(*matches.values())


def from_native_files(directory: Path, config: Config, fresh: Collection[str] = ()) -> ParameterSource:
    """Opens a native checkpoint: one stacked tensor for every parameter, named by the parameter's path.

    `fresh`: paths of parameters that the checkpoint must not have.
    """
    expected = {path: shape for path, shape in shapes(config).items() if path not in fresh}
    stored = files.list_tensors(directory)
    if old := sorted(filter(OLD_NAMES.fullmatch, stored)):
        raise UserError(f"{directory}: a native checkpoint with parameter names of an earlier version ({old[0]}); "
                        "convert the model again from its hf layout (python -m llava_jax.convert)")
    _check(directory, {path: tensor.shape for path, tensor in stored.items()}, expected, [])

    def tensor(path: str, layer: int | None) -> Stored:
        x = stored[path] if layer is None else stored[path].layer(layer)
        if len(x.shape) < 2 or x.file.suffix != ".safetensors":
            return x, tables.same(len(x.shape))
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
        return dataclasses.replace(x, shape=(rows, columns), strides=(columns, 1)), tables.ROWS

    return _from_stored(expected, {path: stored[path].dtype for path in expected}, tensor)


def from_hf_files(directory: Path, config: Config, fresh: Collection[str] = ()) -> ParameterSource:
    """Opens a checkpoint in any spelling of Hugging Face's layout.

    `fresh`: paths of parameters that the checkpoint must not have. Raises UserError that lists the tensors which are
    missing, left over or of another shape than `config` asks for.
    """
    return _from_tensors(directory, config, files.list_tensors(directory), fresh, _second_linear_shapes)


def from_original_files(directory: Path, config: Config, tensors: Mapping[str, files.TensorInfo],
                        fresh: Collection[str], spell: Callable[[str], str]) -> ParameterSource:
    """Opens a checkpoint in the original layout, whose `tensors` have their names of the hf layout already.

    `spell` returns the original name of a tensor, for messages.
    """
    return _from_tensors(directory, config, tensors, fresh, lambda shapes: {}, spell)


def _from_tensors(directory: Path, config: Config, tensors: Mapping[str, files.TensorInfo], fresh: Collection[str],
                  second_linear_shapes: Callable, spell: Callable[[str], str] = str) -> ParameterSource:
    wanted = {path: shape for path, shape in shapes(config).items() if path not in fresh}
    mappings = tables.tensor_mappings(wanted)
    expected = {name: mapping.hf_shape for name, mapping in mappings.items()}
    expected |= second_linear_shapes(wanted)
    tied = "decoder/embedding" in wanted and "decoder/lm_head/kernel" not in wanted

    stored, unused = {}, []
    names = [tables.hf_name(original) for original in tensors]
    for name, tensor in zip(names, tensors.values(), strict=True):
        if tables.IGNORED.fullmatch(name):
            continue
        if tied and name == tables.HEAD:
            if tables.EMBEDDING in names:  # `has_own_head` has compared the two
                continue
            name = tables.EMBEDDING
        if name in expected and name not in stored:
            stored[name] = tensor
        else:
            unused.append(tensor.name)
    _check(directory, {name: tensor.shape for name, tensor in stored.items()}, expected, unused, spell)

    for name, x in second_linear(wanted, np.dtype(np.float32)).items():
        if name in expected and not np.array_equal(stored[name].read().astype(np.float32), x):
            raise UserError(f"{directory}/config.json: projector_hidden_act linear is read where linear_2 is the "
                            f"identity (LLaVA's one-layer projector), but {name} is not")

    tensor_names = {(mapping.path, mapping.layer): name for name, mapping in mappings.items()}
    dtypes: dict[str, set[np.dtype]] = {path: set() for path in wanted}
    for name, mapping in mappings.items():
        dtypes[mapping.path].add(stored[name].dtype)

    def tensor(path: str, layer: int | None) -> Stored:
        name = tensor_names[path, layer]
        return stored[name], mappings[name].transform

    return _from_stored(wanted, {path: _common(kinds) for path, kinds in dtypes.items()}, tensor)


def _from_stored(shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype],
                 tensor: Callable[[str, int | None], Stored]) -> ParameterSource:
    def read(path: str, layer: int | None) -> np.ndarray:
        stored, transform = tensor(path, layer)
        return transform.from_hf(stored.read(), shapes[path] if layer is None else shapes[path][1:])

    return ParameterSource(shapes, dtypes, read, tensor)


def has_own_head(tensors: Mapping[str, files.TensorInfo]) -> bool:
    """Returns whether Hugging Face's files contain a head that differs from the embedding."""
    by_hf_name = {tables.hf_name(name): tensor for name, tensor in tensors.items()}
    head, embedding = by_hf_name.get(tables.HEAD), by_hf_name.get(tables.EMBEDDING)
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape:
        return True
    slices = [slice(start, min(start + 1024, head.shape[0])) for start in range(0, head.shape[0], 1024)]
    return any(not np.array_equal(head.read(rows).astype(np.float32), embedding.read(rows).astype(np.float32))
               for rows in slices)


def from_memory(parameters: llava.Parameters) -> ParameterSource:
    """Wraps parameters on devices. If several processes share them, all of these must read the same parameters."""

    def read(path: str, layer: int | None) -> np.ndarray:
        x = parameters[path] if layer is None else parameters[path][layer]
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            from jax.experimental import multihost_utils
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return ParameterSource({path: x.shape for path, x in parameters.items()},
                           {path: np.dtype(x.dtype) for path, x in parameters.items()}, read)


def join(*sources: ParameterSource) -> ParameterSource:
    """Joins the parameters of several sources, whose paths differ."""
    owner = {path: source for source in sources for path in source.shapes}
    return ParameterSource({path: source.shapes[path] for path, source in owner.items()},
                           {path: source.dtypes[path] for path, source in owner.items()},
                           lambda path, layer: owner[path].read(path, layer),
                           lambda path, layer: owner[path].tensor(path, layer))


def replace(base: ParameterSource, other: ParameterSource) -> ParameterSource:
    """Replaces parameters of `base` by those of `other`, which has the same shapes for them."""
    joined = join(base, other)
    return ParameterSource(base.shapes, joined.dtypes, joined.read, joined.tensor)


def second_linear(shapes: Mapping[str, Shape], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns an identity as second layer of a one-layer projector, because Hugging Face's layout has two layers."""
    return {name: np.eye(*shape, dtype=dtype) if len(shape) == 2 else np.zeros(shape, dtype)
            for name, shape in _second_linear_shapes(shapes).items()}


def _second_linear_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    if "projector/layers_0/kernel" not in shapes or "projector/layers_1/kernel" in shapes:
        return {}
    size = shapes["projector/layers_0/kernel"][1]
    return {f"{tables.PROJECTOR}linear_2.weight": (size, size), f"{tables.PROJECTOR}linear_2.bias": (size,)}


def _common(dtypes: set[np.dtype]) -> np.dtype:
    """Returns the dtype of a stack of layers. float32 represents all values of float16 and bfloat16."""
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _check(directory: Path, actual: Mapping[str, Shape], expected: Mapping[str, Shape], unused: list[str],
           spell: Callable[[str], str] = str) -> None:
    unused = unused + [name for name in actual if name not in expected]
    missing = [name for name in expected if name not in actual]
    wrong = [f"{spell(name)} {list(actual[name])} instead of {list(shape)}" for name, shape in expected.items()
             if name in actual and actual[name] != shape]
    problems = [f"{title}: {files.shorten(names)}" for title, names in
                [("missing", [*map(spell, missing)]), ("of another shape", wrong), ("left over", unused)] if names]
    if problems:
        raise UserError(f"{directory}: the tensors do not match config.json; {'; '.join(problems)}")
