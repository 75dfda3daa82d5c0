"""Reads projectors that LLaVA's first stage saved alone: mm_projector.bin, or a folder checkpoint-N with it."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from llava_jax.errors import UserError
from llava_jax.files import to_path
from llava_jax.models import projector
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.weights import files, original, source, tables
from llava_jax.weights.files import TensorInfo
from llava_jax.weights.source import ParameterSource

NAME = "mm_projector.bin"


def list_tensors(path: str | Path) -> tuple[Path, dict[str, TensorInfo]]:
    """Lists the tensors of a projector file by their names in the hf layout, and returns the file's path with them.

    Rows of the embedding are among them if `<im_start>` and `<im_end>` were trained. Raises UserError for any other
    tensor.
    """
    file = to_path(path)
    file = file / NAME if file.is_dir() else file
    tensors = {original.hf_name(name): tensor for name, tensor in files.tensors_in_file(file).items()}
    known = (tables.PROJECTOR, "image_newline", tables.EMBEDDING)
    if other := [tensor.name for name, tensor in tensors.items() if not name.startswith(known)]:
        raise UserError(f"{file}: not a projector alone: it has {files.shorten(other, 3)}")
    if not any(name.startswith(tables.PROJECTOR) for name in tensors):
        raise UserError(f"{file}: it has no projector (mm_projector.*)")
    return file, tensors


def kind(path: str | Path) -> str:
    """Returns the type of a projector file: linear, or mlpNx_gelu."""
    file, tensors = list_tensors(path)
    depth = sum(bool(re.fullmatch(r".*linear_\d+\.weight", name)) for name in tensors)
    names = [tensor.name for name, tensor in tensors.items() if name.startswith(tables.PROJECTOR)]
    return "linear" if depth == 1 and not any(re.search(r"\.0\.\w+$", name) for name in names) else f"mlp{depth}x_gelu"


def open_projector(path: str | Path, config: LlavaConfig) -> ParameterSource:
    """Opens the projector, and the newline if the file has it, for a model of `config`."""
    file, tensors = list_tensors(path)
    if projector.depth(kind(path)) != projector.depth(config.projector):
        raise UserError(f"{file}: a projector of type {kind(path)}, but {config.projector} is named (--projector, "
                        "model.projector); leave it out")
    own = {name: tensor for name, tensor in tensors.items() if name != tables.EMBEDDING}
    absent = [name for name in source.shapes(config) if not name.startswith("projector/")
              and (name != "image_newline" or name not in own)]
    return source.from_original_files(file, config, own, absent, original.speller(config))


def with_marks(path: str | Path, decoder: ParameterSource, config: LlavaConfig, tokenizer: Tokenizer
               ) -> ParameterSource:
    """Returns the decoder with the file's rows of `<im_start>` and `<im_end>`; the same decoder if the file has none.

    The file has the two rows alone, or an embedding that ends with them. Raises UserError if the tokenizer does not
    have these tokens, or if the template does not write them.
    """
    file, tensors = list_tensors(path)
    rows = tensors.get(tables.EMBEDDING)
    if rows is None:
        return decoder
    marks, start_end = original.MARKS, sorted(original.START_END.values())
    ids = [tokenizer.special_id(mark) for mark in marks]
    if None in ids or max(ids) >= decoder.shapes["decoder/embedding"][0]:
        raise UserError(f"{file} was trained with the tokens {' and '.join(marks)}, which the decoder does not have; "
                        "add them to its tokenizer and its embedding")
    if config.template not in start_end:
        raise UserError(f"{file} was trained with the tokens {' and '.join(marks)}, which template {config.template} "
                        f"does not write; name {' or '.join(start_end)} (--template, model.template)")
    if len(rows.shape) != 2 or rows.shape[0] < 2 or rows.shape[1:] != decoder.shapes["decoder/embedding"][1:]:
        raise UserError(f"{file}: {rows.name} has shape {list(rows.shape)}, the decoder's embedding "
                        f"{list(decoder.shapes['decoder/embedding'])}")

    def read(name: str, layer: int | None) -> np.ndarray:
        x = decoder.read(name, layer)
        if name == "decoder/embedding":
            x = np.array(x)
            x[ids] = rows.read(slice(rows.shape[0] - 2, rows.shape[0]))
        return x

    tensor = lambda name, layer: None if name == "decoder/embedding" else decoder.tensor(name, layer)  # noqa: E731
    return dataclasses.replace(decoder, read=read, tensor=tensor)
