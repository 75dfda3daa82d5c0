"""Whole checkpoints: told apart, opened, loaded onto devices, and written in our own layout or Hugging Face's.

Our own layout is a directory with config.json ("model_type": "llava_jax"), the stacked parameters under their paths
in model.safetensors (or numbered files and an index), and the tokenizer's files as they came.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig, Parameters
from llava_jax.weights import configs, files, source, tables, tokenizer_files
from llava_jax.weights.files import TensorSpec
from llava_jax.weights.source import Config, ParameterSource

SHARD_BYTES = 5 * 10**9


def read_config(path: str | Path, template: str | None = None) -> Config:
    """`configs.read_config`, and whether the head is tied as the tensors say, where config.json says otherwise.

    A config may tie a head that the files hold apart (of LLaVA's two flags one is often left at its default). As in
    transformers, the stored head then counts if it differs from the embedding.
    """
    config, directory = configs.read_config(path, template), Path(path)
    text = getattr(config, "text", config)
    if not getattr(text, "tie_word_embeddings", False) or not files.has_tensors(directory):
        return config
    if not source.has_own_head(files.find(directory)):
        return config
    text = dataclasses.replace(text, tie_word_embeddings=False)
    return dataclasses.replace(config, text=text) if isinstance(config, LlavaConfig) else text


def load_checkpoint(
    path: str | Path,
    *,
    dtype: str | Callable[[str], str] = "float32",
    template: str | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> tuple[Config, Parameters]:
    """Reads a checkpoint directory of any supported layout onto devices.

    Args:
      path: a directory of LLaVA (Hugging Face's layout as any transformers wrote it, or our own), or of a CLIP or a
        LLaMA, Mistral or Qwen2 alone; told from its files. A CLIP's text tower is left out.
      dtype: of the parameters, "float32" or "bfloat16", or a function from a path to one of them; the files may be
        either, or float16.
      template: see `read_config`.
      sharding: where the parameter of a path and shape goes; the default device if None.

    Returns the configuration (LlavaConfig; VisionConfig or LlamaConfig of a part) and the parameters by path; those
    of a part begin with `vision/` or `decoder/`. The host holds one stacked parameter at a time.
    UserError with one line if a file is missing or broken or does not fit, and for a value that is not finite: such a
    model answers nothing, and to look at its tensors the safetensors library is enough.
    """
    config, parameters = open_checkpoint(Path(path), template)
    dtype_of = dtype if callable(dtype) else lambda path: dtype
    return config, {name: _to_devices(path, parameters, name, dtype_of(name), sharding) for name in parameters.shapes}


def open_checkpoint(directory: Path, template: str | None = None) -> tuple[Config, ParameterSource]:
    """The configuration and the parameters of a checkpoint, of which nothing but the headers is read yet."""
    config = read_config(directory, template)
    own = files.read_json(directory / "config.json")["model_type"] == configs.MODEL_TYPE
    return config, (source.from_native_files if own else source.from_hf_files)(directory, config)


def _to_devices(name: str | Path, parameters: ParameterSource, path: str, dtype: str,
                sharding: Callable | None) -> jax.Array:
    shape = parameters.shapes[path]
    host = np.empty(shape, jnp.dtype(dtype))
    for layer in range(shape[0]) if tables.is_stacked(path) else [...]:
        host[layer] = parameters.read(path, None if layer is ... else layer)
        if not files.is_finite(host[layer]):
            number = "" if layer is ... else f" of layer {layer}"
            raise UserError(f"{name}: {path}{number} has values that are not finite (NaN or infinite); the model is "
                            "damaged, or was written in a dtype of too little range")
    if sharding is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(shape, sharding(path, shape), lambda index: host[index])


def save_native(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    tokenizer_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes our own layout; the arguments are those of `save_hf`."""

    def write(target: Path | None, parameters: ParameterSource) -> files.NotFinite:
        if target:
            tokenizer_files.copy(Path(tokenizer_dir), target, config.template)
            files.write_json(target / "config.json", configs.native_config(config))
        return files.write(target, [_own_entry(parameters, path, dtype) for path in parameters.shapes], shard_bytes)

    _save(Path(directory), parameters, write)


def save_hf(
    directory: str | Path,
    config: LlavaConfig,
    parameters: Parameters | ParameterSource,
    tokenizer_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers' LlavaForConditionalGeneration and AutoProcessor open, named as on the hub.

    Args:
      directory: must not exist or be empty; it appears when it is complete.
      config, parameters: of the model. Arrays that are spread over processes are gathered one layer at a time, for
        which every process must make this call; the first one writes.
      tokenizer_dir: a checkpoint with the tokenizer's files; `<image>` and `<pad>` are added where they are missing,
        and the embedding and head get further rows, their mean, up to a multiple of 64 where the new ids need them.
      dtype: "float32", "bfloat16" or "float16" for all tensors; as they are if None.
      shard_bytes: largest size of a file of tensors.

    UserError if `directory` holds something, if Hugging Face's model cannot compute what ours does, and for values
    that are not finite.
    """

    def write(target: Path | None, parameters: ParameterSource) -> files.NotFinite:
        rows = config.text.vocab_size
        if target:
            tokens = tokenizer_files.export(Path(tokenizer_dir), target, config)
            rows = padded_rows(rows, max(tokens["image"], tokens["pad"]))
            widest = max((_dtype(parameters, path, dtype) for path in parameters.shapes), key=lambda d: d.itemsize)
            files.write_json(target / "config.json", configs.hf_config(config, tokens, rows, widest.name))
        return files.write(target, _hub_entries(parameters, rows, dtype), shard_bytes)

    _save(Path(directory), parameters, write)


def check_export(config: LlavaConfig, tokenizer_dir: str | Path) -> None:
    """Raises UserError if `save_hf` could not write this model, whatever its parameters are."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenizer_files.export(Path(tokenizer_dir), Path(folder), config)
    configs.hf_config(config, tokens, config.text.vocab_size, "float32")


def padded_rows(rows: int, largest_id: int) -> int:
    """Rows of an embedding that has a place for `largest_id`: as it is, or else a multiple of 64."""
    return rows if largest_id < rows else -(-(largest_id + 1) // 64) * 64


def _save(directory: Path, parameters: Parameters | ParameterSource,
          write: Callable[[Path | None, ParameterSource], files.NotFinite]) -> None:
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


def _own_entry(parameters: ParameterSource, path: str, dtype: str | None) -> TensorSpec:
    shape = parameters.shapes[path]
    layers = range(shape[0]) if tables.is_stacked(path) else [None]

    def blocks() -> Iterator[np.ndarray]:
        return (parameters.read(path, layer) for layer in layers)

    return TensorSpec(path, _dtype(parameters, path, dtype), shape, blocks)


def _hub_entries(parameters: ParameterSource, rows: int, dtype: str | None) -> list[TensorSpec]:
    """The tensors of Hugging Face's layout, embedding and head with `rows` rows."""
    entries = []
    for name, place in tables.tensor_mappings(parameters.shapes).items():
        shape = place.hf_shape
        more = rows - shape[0] if name in (tables.EMBEDDING, tables.HEAD) else 0

        def blocks(place: tables.TensorMapping = place, more: int = more) -> Iterator[np.ndarray]:
            x = place.transform.to_hf(parameters.read(place.path, place.layer))
            yield x
            if more:
                yield np.broadcast_to(_mean_row(x), (more, x.shape[1]))

        entries.append(TensorSpec(name, _dtype(parameters, place.path, dtype), (shape[0] + more, *shape[1:]), blocks))
    projector = _dtype(parameters, "projector/layers_0/kernel", dtype)
    for name, x in source.second_linear(parameters.shapes, projector).items():
        entries.append(TensorSpec(name, projector, x.shape, lambda x=x: [x]))
    return entries


def _mean_row(x: np.ndarray) -> np.ndarray:
    # Summed in float64 a part at a time, so that neither the memory nor the result depends on the dtype's range.
    total = sum(x[start : start + 256].astype(np.float64).sum(0) for start in range(0, len(x), 256))
    return (total / len(x)).astype(x.dtype)


def _dtype(parameters: ParameterSource, path: str, dtype: str | None) -> np.dtype:
    return parameters.dtypes[path] if dtype is None else np.dtype(jnp.dtype(dtype))
