"""Parameters by path, wherever they are: in files of either layout, or in memory. Read one layer at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from llava_jax.errors import UserError
from llava_jax.models import llava
from llava_jax.models.llama import Llama, LlamaConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import Projector
from llava_jax.models.vit import VisionConfig, Vit
from llava_jax.weights import files, tables
from llava_jax.weights.tables import Shape

Config = LlavaConfig | VisionConfig | LlamaConfig


@dataclass(frozen=True)
class ParameterSource:
    """Shapes and dtypes of parameters, and `read(path, layer)`, which brings one layer of a stacked parameter, or a
    whole other one (layer None), to the host."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str, int | None], np.ndarray]


def shapes(config: Config) -> dict[str, Shape]:
    """Every parameter of a model, or of its vision tower or decoder alone, by path."""
    if isinstance(config, LlavaConfig):
        parameters = llava.abstract_params(config)[1]
    else:
        part, module = ("vision", Vit) if isinstance(config, VisionConfig) else ("decoder", Llama)
        parameters = llava.to_params(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))[1]
        parameters = {f"{part}/{path}": parameter for path, parameter in parameters.items()}
    return {path: parameter.shape for path, parameter in parameters.items()}


def from_native_files(directory: Path, config: Config) -> ParameterSource:
    """A checkpoint of our own layout: one stacked tensor for each parameter, under its path."""
    wanted = shapes(config)
    stored = files.find(directory)
    _check(directory, {path: tensor.shape for path, tensor in stored.items()}, wanted, [])
    dtypes = {path: stored[path].dtype for path in wanted}
    return ParameterSource(wanted, dtypes, lambda path, layer: stored[path].read(layer))


def from_hf_files(directory: Path, config: Config) -> ParameterSource:
    """A checkpoint in any of Hugging Face's spellings.

    UserError that lists the tensors that are left over, missing or of another shape than `config` asks for.
    """
    wanted = shapes(config)
    places = tables.tensor_mappings(wanted)
    expected = {name: place.hf_shape for name, place in places.items()}
    expected |= _second_linear_shapes(wanted)
    tied = "decoder/embedding" in wanted and "decoder/lm_head/kernel" not in wanted

    found, stored, unused = files.find(directory), {}, []
    names = [tables.hf_name(original) for original in found]
    for name, (original, tensor) in zip(names, found.items(), strict=True):
        if tables.IGNORED.fullmatch(name):
            continue
        if tied and name == tables.HEAD:
            if tables.EMBEDDING in names:  # `has_own_head` has compared the two
                continue
            name = tables.EMBEDDING
        if name in expected and name not in stored:
            stored[name] = tensor
        else:
            unused.append(original)
    _check(directory, {name: tensor.shape for name, tensor in stored.items()}, expected, unused)

    for name, x in second_linear(wanted, np.dtype(np.float32)).items():
        if not np.array_equal(stored[name].read().astype(np.float32), x):
            raise UserError(f"{directory}/config.json: projector_hidden_act linear is read where linear_2 is the "
                             f"identity (LLaVA's one-layer projector), but {name} is not")

    names = {(place.path, place.layer): name for name, place in places.items()}
    dtypes: dict[str, set[np.dtype]] = {path: set() for path in wanted}
    for name, place in places.items():
        dtypes[place.path].add(stored[name].dtype)

    def read(path: str, layer: int | None) -> np.ndarray:
        name = names[path, layer]
        return places[name].transform.from_hf(stored[name].read(), places[name].shape)

    return ParameterSource(wanted, {path: _common(found) for path, found in dtypes.items()}, read)


def has_own_head(tensors: Mapping[str, files.TensorInfo]) -> bool:
    """Whether Hugging Face's files hold a head that differs from the embedding."""
    found = {tables.hf_name(name): tensor for name, tensor in tensors.items()}
    head, embedding = found.get(tables.HEAD), found.get(tables.EMBEDDING)
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape:
        return True
    pairs = zip(head.pieces(), embedding.pieces(), strict=True)
    return any(not np.array_equal(one.astype(np.float32), other.astype(np.float32)) for one, other in pairs)


def from_memory(parameters: llava.Parameters) -> ParameterSource:
    """Parameters on devices; if they are spread over several processes, all of them must read the same."""

    def read(path: str, layer: int | None) -> np.ndarray:
        x = parameters[path] if layer is None else parameters[path][layer]
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            from jax.experimental import multihost_utils
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return ParameterSource({path: x.shape for path, x in parameters.items()},
                  {path: np.dtype(x.dtype) for path, x in parameters.items()}, read)


def new_projector(config: LlavaConfig, seed: int) -> ParameterSource:
    """A projector as it is before training."""
    projector = Projector(config.projector, config.vision.hidden_size, config.text.hidden_size, rngs=nnx.Rngs(seed))
    return from_memory({f"projector/{path}": x for path, x in llava.to_params(projector)[1].items()})


def join(*sources: ParameterSource) -> ParameterSource:
    """The parameters of all sources, whose paths differ."""
    owner = {path: source for source in sources for path in source.shapes}
    return ParameterSource({path: source.shapes[path] for path, source in owner.items()},
                  {path: source.dtypes[path] for path, source in owner.items()},
                  lambda path, layer: owner[path].read(path, layer))


def second_linear(shapes: Mapping[str, Shape], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The second layer of a one-layer projector in Hugging Face's layout, which always has two: it changes nothing."""
    return {name: np.eye(*shape, dtype=dtype) if len(shape) == 2 else np.zeros(shape, dtype)
            for name, shape in _second_linear_shapes(shapes).items()}


def _second_linear_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    if "projector/layers_0/kernel" not in shapes or "projector/layers_1/kernel" in shapes:
        return {}
    width = shapes["projector/layers_0/kernel"][1]
    return {f"{tables.PROJECTOR}linear_2.weight": (width, width), f"{tables.PROJECTOR}linear_2.bias": (width,)}


def _common(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype of a stack of layers; float32 holds what float16 and bfloat16 hold."""
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _check(directory: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], unused: list[str]) -> None:
    unused = unused + [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    wrong = [f"{name} {list(found[name])} instead of {list(shape)}" for name, shape in expected.items()
             if name in found and found[name] != shape]
    problems = [f"{title}: {files.some(names)}" for title, names in
                [("missing", missing), ("of another shape", wrong), ("left over", unused)] if names]
    if problems:
        raise UserError(f"{directory}: the tensors do not fit config.json; {'; '.join(problems)}")

