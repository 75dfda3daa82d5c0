"""Reads checkpoints onto devices, and writes them in the native layout or in Hugging Face's (hf).

The native layout is a directory with config.json ("model_type": "llava_jax"), the stacked parameters under their paths
in model.safetensors (or numbered files and an index), and the tokenizer's files unchanged.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import Model
from llava_jax.errors import UserError
from llava_jax.files import show_json, to_path
from llava_jax.models.llava import LlavaConfig, Parameters, fresh_params
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.weights import configs, files, original, peft, projector_files, source, tables, tokenizer_files
from llava_jax.weights.files import TensorSpec
from llava_jax.weights.sharded import load_source
from llava_jax.weights.source import Config, ParameterSource

SHARD_BYTES = 5 * 10**9
"""Default largest size of a file of tensors, as in transformers."""


def read_config(path: str | Path, template: str | None = None, vision: str | Path | None = None,
                adapter: str | Path | None = None) -> Config:
    """Reads the configuration of a checkpoint of any layout, and corrects a wrong `tie_word_embeddings`.

    `template` replaces a LLaVA's conversation template. `vision` is the folder of the vision tower that an original
    LLaVA names but does not contain. `adapter` is the folder of an adapter, whose configuration is added.

    Some configurations tie embeddings although the files have a separate head, because LLaVA has two flags and one is
    often left at its default. As in transformers, a head in the files is used if it differs from the embedding.
    """
    if adapter:
        return open_checkpoint(path, template, vision=vision, adapter=adapter)[0]
    directory = to_path(path)
    raw = configs.read_raw(directory)
    if original.is_original(directory, raw):
        config = original.read_config(directory, raw, template, vision)
    elif vision:
        raise UserError(f"{path} is no LLaVA in the original layout, so it takes no vision tower from {vision}")
    else:
        config = configs.read_config(path, template)
    text = getattr(config, "text", config)
    if not getattr(text, "tie_word_embeddings", False) or not files.has_tensors(directory):
        return config
    if not source.has_own_head(files.list_tensors(directory)):
        return config
    text = dataclasses.replace(text, tie_word_embeddings=False)
    return dataclasses.replace(config, text=text) if isinstance(config, LlavaConfig) else text


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str | Callable[[str], str] = "float32",
    template: str | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    vision: str | Path | None = None,
    adapter: str | Path | None = None,
) -> tuple[Config, Parameters]:
    """Reads a checkpoint directory of any supported layout onto devices.

    Args:
      path: a directory, local or in a bucket (gs://...), of a LLaVA (Hugging Face's layout as any transformers wrote
        it, the original or the native one), or of a CLIP, SigLIP, LLaMA, Mistral or Qwen2, which is detected from its
        files. The text tower of a CLIP is left out.
      dtype: of the parameters, "float32" or "bfloat16", or a function from a path to one of them. The files may be
        either, or float16.
      template, vision, adapter: see `open_checkpoint`.
      sharding: function from a parameter's path and shape to its sharding; the default device if None.

    Returns the configuration (LlavaConfig; VisionConfig or LlamaConfig of a part) and the parameters by path. Paths of
    a part start with `vision/` or `decoder/`. The host needs the memory of one stacked parameter, or of its part if
    several processes share it (`sharded.py`).
    Raises UserError if a file is missing, damaged or does not match, or if a value is not finite.
    """
    config, parameters = open_checkpoint(path, template, vision=vision, adapter=adapter)
    return config, load_source(path, parameters, dtype, sharding)


def load_model(
    sources: Model,
    model: LlavaConfig,
    seed: int,
    *,
    dtype: str | Callable[[str], str] = "float32",
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    store: Callable[[str, jax.Array], Any] = lambda path, x: x,
) -> Parameters:
    """Loads the parameters of a recipe's model, and initialises those that its table of fresh parameters names.

    `dtype` and `sharding` are as in `load_checkpoint`. `store` converts each parameter of a checkpoint to the value
    that is returned for its path, before the next is read. Raises UserError if a parameter is missing or left over.
    """
    shapes = source.shapes(model)
    fresh = source.fresh_paths(sources, shapes)
    parameters = {}
    if fresh:
        dtype_of = dtype if callable(dtype) else lambda path: dtype

        def initialise() -> Parameters:
            return {path: x.astype(dtype_of(path)) for path, x in fresh_params(model, fresh, seed).items()}

        shardings = sharding and {path: sharding(path, shapes[path]) for path in fresh}
        parameters = jax.jit(initialise, out_shardings=shardings)()
    for path, part in _open_parts(sources, model, fresh).items():
        parameters |= load_source(path, part, dtype, sharding, store)
    if missing := sorted(shapes.keys() - parameters.keys()):
        raise UserError(f"model.fresh: no checkpoint has {files.shorten(missing)}, and no row names it")
    return parameters


def open_model(sources: Model, model: LlavaConfig, seed: int) -> ParameterSource:
    """Opens the parameters of a recipe's model as `load_model` loads them, but reads no more than headers."""
    fresh = source.fresh_paths(sources, source.shapes(model))
    initial = source.from_memory(jax.jit(lambda: fresh_params(model, fresh, seed))())
    return source.join(initial, *_open_parts(sources, model, fresh).values())


def _open_parts(sources: Model, model: LlavaConfig, fresh: Collection[str]) -> dict[str, ParameterSource]:
    """Opens the checkpoints of a recipe's model, by their paths."""
    if sources.adapter:
        base = sources.llava or sources.language
        return {sources.adapter: open_checkpoint(base, sources.template, vision=sources.vision,
                                                 adapter=sources.adapter)[1]}
    if sources.llava:
        return {sources.llava: _open(to_path(sources.llava), model, fresh, vision=sources.vision or None)}
    parts = {sources.vision: _open(to_path(sources.vision), model.vision, fresh),
             sources.language: _open(to_path(sources.language), model.text, fresh)}
    if path := sources.projector_weights:
        parts[path] = projector_files.open_projector(path, model)
        parts[sources.language] = projector_files.with_marks(
            path, parts[sources.language], model, Tokenizer.load(sources.language))
    return parts


def open_checkpoint(path: str | Path, template: str | None = None, *, vision: str | Path | None = None,
                    base: str | Path | None = None,
                    adapter: str | Path | None = None) -> tuple[Config, ParameterSource]:
    """Opens a checkpoint: its configuration and its parameters, of which only the headers are read.

    `template` and `vision` are those of `read_config`. `base` is the decoder to which a delta is added. `adapter` is
    the folder of an adapter of PEFT or of the original LLaVA, whose parameters are added unmerged. Its base may be a
    decoder alone if the folder has the projector and the configuration. The tower is then that of `vision`.
    """
    directory = to_path(path)
    if adapter:
        folder = peft.Adapter(adapter)
        opened = _open_decoder(directory, folder, template, vision) or open_checkpoint(
            directory, template, vision=vision, base=base)
        return peft.attach(folder, *opened, directory)
    config = read_config(directory, template, vision)
    return config, _open(directory, config, vision=vision, base=base)


def _open_decoder(directory: Path, adapter: peft.Adapter, template: str | None,
                  vision: str | Path | None) -> tuple[LlavaConfig, ParameterSource] | None:
    """Opens the decoder of an adapter, with the tower and the configuration that the adapter's folder names.

    Returns None if `directory` is not a decoder alone.
    """
    raw = configs.read_raw(directory)
    if raw.get("model_type") not in configs.TEXT_MODELS or original.is_original(directory, raw):
        return None
    file, note = adapter.directory / "config.json", adapter.note.get("config")
    own = files.read_json(file) if file.exists() else {}
    if note is None and not original.is_original(adapter.directory, own):
        raise UserError(f"{directory} is a decoder alone, and {adapter.directory} has no config.json of a LLaVA; name "
                        "a finished LLaVA as base, or the adapter's folder from the end of its training")
    tower = original.find_tower(adapter.directory, own, vision)
    if tower is None:
        name = f" ({show_json(own['mm_vision_tower'])})" if own.get("mm_vision_tower") else ""
        raise UserError(f"{directory} is a decoder alone; name the folder of its vision tower{name} by --vision DIR "
                        "(vision= in Python, model.vision in a recipe)")
    if note is None:
        config = original.read_config(directory, own, template, tower, file)
    else:
        config = configs.read_native(note | ({"template": template} if template else {}), adapter.directory / peft.NOTE)
    config = dataclasses.replace(config, text=read_config(directory), lora=None)
    own_parameters = {path for path in source.shapes(config) if not path.startswith(("vision/", "decoder/"))}
    tensors = original.open_tensors(directory, own, config, tower, None)
    return config, source.from_original_files(directory, config, tensors, own_parameters, original.speller(config))


def _open(directory: Path, config: Config, fresh: Collection[str] = (), *, vision: str | Path | None = None,
          base: str | Path | None = None) -> ParameterSource:
    raw = configs.read_raw(directory)
    if original.is_original(directory, raw):
        tensors = original.open_tensors(directory, raw, config, vision, base)
        return source.from_original_files(directory, config, tensors, fresh, original.speller(config))
    if base:
        raise UserError(f"{directory} is no LLaVA in the original layout, so it is no delta to add to {base}")
    native = raw["model_type"] == configs.MODEL_TYPE
    return (source.from_native_files if native else source.from_hf_files)(directory, config, fresh)


def save_native(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    tokenizer_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the native layout. The arguments are those of `save_hf`."""

    def write(target: Path | None, parameters: ParameterSource) -> files.NotFinite:
        if target:
            tokenizer_files.copy(to_path(tokenizer_dir), target, config.template)
            files.write_json(target / "config.json", configs.native_config(config))
        return files.write(target, [_native_spec(parameters, path, dtype) for path in parameters.shapes], shard_bytes)

    save_directory(Path(directory), parameters, write)


def save_hf(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    tokenizer_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers opens: as llava, llava_next or llava_onevision, with its processor.

    Args:
      directory: path of a missing or empty directory. It appears when it is complete.
      config, parameters: of the model. Arrays that several processes share are gathered one layer at a time. Every
        process must call this function, and the first process writes.
      tokenizer_dir: a checkpoint with the tokenizer's files. Missing `<image>` and `<pad>` tokens are added. If their
        ids need it, the embedding and the head are padded with their mean row to a multiple of 64.
      dtype: "float32", "bfloat16" or "float16" for all tensors; unchanged if None.
      shard_bytes: largest size of a file of tensors.

    Raises UserError if `directory` is not empty, if Hugging Face's model cannot compute the same function, or if a
    value is not finite.
    """

    def write(target: Path | None, parameters: ParameterSource) -> files.NotFinite:
        rows = config.text.vocab_size
        if target:
            tokens = tokenizer_files.export(to_path(tokenizer_dir), target, config)
            rows = padded_rows(rows, max(tokens[name] for name in ("image", "pad", "video") if name in tokens))
            dtypes = [stored_dtype(parameters, path, dtype) for path in parameters.shapes]
            widest = max(dtypes, key=lambda dtype: dtype.itemsize).name
            files.write_json(target / "config.json", configs.hf_config(config, tokens, rows, widest))
        return files.write(target, _hf_specs(parameters, rows, dtype), shard_bytes)

    save_directory(Path(directory), parameters, write)


def check_export(config: LlavaConfig, tokenizer_dir: str | Path) -> None:
    """Raises UserError if `save_hf` could not write this model, whatever its parameters are.

    It is a NoHfForm if `save_native` could.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenizer_files.export(to_path(tokenizer_dir), Path(folder), config)
    configs.hf_config(config, tokens, config.text.vocab_size, "float32")


def padded_rows(rows: int, largest_id: int) -> int:
    """Returns the number of rows of an embedding that includes `largest_id`: unchanged, or else a multiple of 64."""
    return rows if largest_id < rows else -(-(largest_id + 1) // 64) * 64


def save_directory(directory: Path, parameters: Parameters | ParameterSource,
                   write: Callable[[Path | None, ParameterSource], files.NotFinite]) -> None:
    """Calls `write` with a temporary directory that becomes `directory`. All processes call it; the first one writes.

    The others call `write` with None, to gather the parameters. Raises UserError if a value is not finite.
    """
    if not isinstance(parameters, ParameterSource):
        parameters = source.from_memory(parameters)
    if jax.process_index() == 0:
        with files.new_directory(directory) as target:
            if message := write(target, parameters).message():
                raise UserError(f"{directory}: not written: {message}")
    else:
        write(None, parameters)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        from llava_jax.parallel.processes import WORK_TIMEOUT, allgather_object
        allgather_object(f"{directory} is complete", None, WORK_TIMEOUT)
        multihost_utils.sync_global_devices(f"{directory} is complete")  # for processes that JAX joined without a group


def _native_spec(parameters: ParameterSource, path: str, dtype: str | None) -> TensorSpec:
    shape = parameters.shapes[path]
    layers = range(shape[0]) if tables.is_stacked(path) else [None]

    def blocks() -> Iterator[np.ndarray]:
        return (parameters.read(path, layer) for layer in layers)

    return TensorSpec(path, stored_dtype(parameters, path, dtype), shape, blocks)


def _hf_specs(parameters: ParameterSource, rows: int, dtype: str | None) -> list[TensorSpec]:
    """Lists the tensors of Hugging Face's layout, with `rows` rows of the embedding and the head."""
    specs = []
    for name, mapping in tables.tensor_mappings(parameters.shapes).items():
        shape = mapping.hf_shape
        new_rows = rows - shape[0] if name in (tables.EMBEDDING, tables.HEAD) else 0

        def blocks(mapping: tables.TensorMapping = mapping, new_rows: int = new_rows) -> Iterator[np.ndarray]:
            x = mapping.transform.to_hf(parameters.read(mapping.path, mapping.layer))
            yield x
            if new_rows:
                yield np.broadcast_to(_mean_row(x), (new_rows, x.shape[1]))

        padded_shape = (shape[0] + new_rows, *shape[1:])
        specs.append(TensorSpec(name, stored_dtype(parameters, mapping.path, dtype), padded_shape, blocks))
    projector = stored_dtype(parameters, "projector/layers_0/kernel", dtype)
    for name, x in source.second_linear(parameters.shapes, projector).items():
        specs.append(TensorSpec(name, projector, x.shape, lambda x=x: [x]))
    return specs


def mapped_spec(name: str, parameters: ParameterSource, mapping: tables.TensorMapping, dtype: str | None) -> TensorSpec:
    """Returns the tensor `name` of the parameter, or layer, that a mapping of the hf layout names."""

    def blocks() -> Iterator[np.ndarray]:
        yield mapping.transform.to_hf(parameters.read(mapping.path, mapping.layer))

    return TensorSpec(name, stored_dtype(parameters, mapping.path, dtype), mapping.hf_shape, blocks)


def _mean_row(x: np.ndarray) -> np.ndarray:
    # Summed in float64, 256 rows at a time, because that needs little memory and cannot overflow the dtype.
    total = sum(x[start : start + 256].astype(np.float64).sum(0) for start in range(0, len(x), 256))
    return (total / len(x)).astype(x.dtype)


def stored_dtype(parameters: ParameterSource, path: str, dtype: str | None) -> np.dtype:
    """Returns the dtype in which a parameter is written: its own if `dtype` is None."""
    return parameters.dtypes[path] if dtype is None else np.dtype(jnp.dtype(dtype))
