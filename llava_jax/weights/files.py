"""Reads tensors of safetensors and torch files by ranges of their bytes, and writes safetensors files block by block.

Large models are cut into several files; an index names the file of each tensor. The safetensors library maps the files
that it reads, which must be local, and writes tensors that are all in memory. So this module does both by itself.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llava_jax.errors import UserError
from llava_jax.files import check_fetched, is_remote, matches_schema, read_json, temporary_path
from llava_jax.weights import torch_files
from llava_jax.weights.ranges import file_size, read_range

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
EXPONENTS = {DTYPES["F32"]: np.uint32(0x7F800000), DTYPES["F16"]: np.uint16(0x7C00), DTYPES["BF16"]: np.uint16(0x7F80)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of a single file, and of the index of several files."""
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The same of torch files, which are read where there are no safetensors files."""
RUN_CHECKPOINT = "_CHECKPOINT_METADATA"
"""Name of a file that Orbax writes in every checkpoint of a run."""
WRITE_BYTES = 2**22
"""Number of bytes that a write copies at a time."""
HEADER_BYTES = 2**20
"""Number of bytes of a safetensors file that are read first. The header of a 7B model has about 80 kB."""
MAX_HEADER_BYTES = 10**8
"""Maximum size in bytes of a header, as in the safetensors library."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors or torch file. Its data is read on demand.

    Attributes:
      kind: name of its type in safetensors files.
      strides: distance in elements between neighbours on each axis.
      start: byte of the file at which the tensor starts.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype. Raises UserError for a type that cannot be read."""
        if self.kind not in DTYPES:
            raise UserError(f"{self.file}: tensors of type {self.kind} cannot be read; {', '.join(DTYPES)} can")
        return DTYPES[self.kind]

    def layer(self, index: int) -> "TensorInfo":
        """Returns the tensor at an index of the first axis."""
        start = self.start + index * self.strides[0] * self.dtype.itemsize
        return dataclasses.replace(self, shape=self.shape[1:], strides=self.strides[1:], start=start)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Reads the tensor, or a range of its first axis: the bytes from its first to its last element."""
        first, stop, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (max(0, stop - first), *self.shape[1:]) if self.shape else ()
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        itemsize = self.dtype.itemsize
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        start = self.start + first * self.strides[0] * itemsize if shape else self.start
        content = read_range(self.file, start, elements * itemsize)
        strides = [stride * itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(content.view(self.dtype), shape, strides)


def has_tensors(directory: Path) -> bool:
    """Returns whether a directory has files for `list_tensors`, which may still be damaged."""
    return any((directory / name).exists() for name in (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX))


def list_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of a directory's `model.safetensors`, of the files that its index names, or of torch files.

    Raises UserError if there is no such file, or if one is missing, damaged, outside the directory or lacks a tensor.
    """
    found = [directory / name for name in (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX) if (directory / name).exists()]
    if not found:
        raise UserError(other_format(directory) or f"{directory / SINGLE}: no such file, nor an index of several "
                        "beside it")
    index = found[0]
    if index.suffix != ".json":
        return tensors_in_file(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map; download it again")
    tensors = {}
    for name in {name: None for name in weight_map.values() if _is_inside(directory, name, index)}:
        file = directory / name
        if not file.exists():
            raise UserError(f"{file} is missing, which {index.name} names; download it")
        tensors |= tensors_in_file(file)
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(f"{directory / file} lacks the tensor {name}, which {index.name} names; "
                             "download both again")
    return tensors


def tensor_names(directory: Path) -> list[str]:
    """Returns the names of a directory's tensors. An index is enough, so its files may be missing."""
    if not has_tensors(directory):
        return []
    index = next((directory / name for name in (INDEX, TORCH_INDEX) if (directory / name).exists()), None)
    single = any((directory / name).exists() for name in (SINGLE, TORCH_SINGLE))
    weight_map = None if single or index is None else read_json(index).get("weight_map")
    return [*weight_map] if isinstance(weight_map, dict) else [*list_tensors(directory)]


def _is_inside(directory: Path, name: Any, index: Path) -> bool:
    """Returns True if `name` is a file of the index's directory. Raises UserError otherwise.

    An index must not open other files. Links are followed only into `blobs` of Hugging Face's cache, because its
    snapshots consist of links.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w .+=-]{1,200}", name, re.ASCII) or not name.strip("."):
        raise UserError(f"{index}: weight_map names {name!r}, which is not the name of a file beside it")
    if is_remote(directory):  # buckets have no links
        return True
    real, cache = (directory / name).resolve(), directory.resolve().parent.parent
    if real.parent not in (directory.resolve(), cache / "blobs"):
        raise UserError(f"{directory / name}: a link out of the directory; put the file itself there")
    return True


def other_format(directory: Path) -> str:
    """Describes which other format a directory contains and how to convert it; "" if the format is unknown."""
    if (directory / "adapter_config.json").exists():
        return (f"{directory}: LoRA adapters (PEFT), which change another model; name that model, and this folder by "
                "--adapter (adapter= in Python, model.adapter in a recipe)")
    if (directory / RUN_CHECKPOINT).exists():
        return (f"{directory}: a checkpoint of a run, with its trained parameters alone; to write a model of it: "
                f"python -m llava_jax.convert {directory} DST --to hf (--merge, if it has adapters)")
    if any(directory.glob("*.gguf")):
        return f"{directory}: a GGUF model, llama.cpp's format, is not read; take the model's safetensors"
    if (directory / "mm_projector.bin").exists():
        return (f"{directory}: a projector alone, trained in stage 1; name it as model.projector_weights of a recipe, "
                "or by --projector-weights, beside a vision tower and a decoder")
    if any(directory.glob("pytorch_model*")) or any(directory.glob("*.bin")):
        return f"{directory} has torch files, but neither {TORCH_SINGLE} nor {TORCH_INDEX}; download what is missing"
    if found := sorted([*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]):
        return f"{directory}: no model, but one is in {found[-1].parent}"
    return ""


def tensors_in_file(file: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of a file. Raises UserError if the file is missing, truncated or damaged."""
    if file.suffix != ".safetensors":
        return {name: TensorInfo(file, name, *tensor) for name, tensor in torch_files.list_tensors(file).items()}
    size = file_size(file)
    start = read_range(file, 0, min(size, HEADER_BYTES)).tobytes()
    check_fetched(file, start)
    first = 8 + int.from_bytes(start[:8], "little")
    try:
        if len(start) < 8 or not first <= min(size, MAX_HEADER_BYTES):
            raise ValueError("its header ends beyond it")
        header = start[8:first] + read_range(file, len(start), max(0, first - len(start))).tobytes()
        return {name: TensorInfo(file, name, *tensor) for name, tensor in _parse_header(header, first, size).items()}
    except (ValueError, RecursionError) as error:  # those of JSON and of UTF-8 are ValueErrors
        raise UserError(f"{file}: truncated, damaged or not a safetensors file ({size:,} bytes: "
                        f"{' '.join(str(error).split())[:200]}); download it again") from None


def _parse_header(header: bytes, first: int, size: int) -> dict[str, tuple[str, tuple, tuple, int]]:
    """Returns type, shape, strides and start of each tensor by name. The data are the bytes from `first` to `size`.

    Raises ValueError if the header is damaged, or if its tensors are not those bytes without gap or overlap.
    """
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        if not matches_schema(entry, {"dtype": str, "shape": [int], "data_offsets": [int]}):
            raise ValueError(f"no type, shape and offsets of {name!r:.100}")
        kind, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        elements = math.prod(shape)
        if len(offsets) != 2 or any(axis < 0 for axis in shape):
            raise ValueError(f"invalid shape or offsets of {name!r:.100}")
        if kind in DTYPES and elements * DTYPES[kind].itemsize != offsets[1] - offsets[0]:
            raise ValueError(f"{name!r:.100} has {offsets[1] - offsets[0]} bytes, not {elements} elements of {kind}")
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors[name] = kind, shape, strides, first + offsets[0]
        spans.append(tuple(offsets))
    last = 0
    for start, stop in sorted(spans):
        if start != last or stop < start:
            raise ValueError(f"a gap or an overlap at byte {last} of its data")
        last = stop
    if first + last != size:
        raise ValueError(f"its tensors have {last} bytes, and it {size - first}")
    return tensors


class NotFinite(NamedTuple):
    """Names of tensors with non-finite values: in the source, or after a cast to a dtype with less range."""

    stored: list[str]
    overflowed: list[str]

    def message(self) -> str:
        """Describes the tensors and the remedy; "" if all values are finite."""
        lines = []
        if self.overflowed:
            lines.append(f"values beyond the range of the dtype (bfloat16 has enough): {shorten(self.overflowed)}")
        if self.stored:
            lines.append(f"values that are not finite (NaN or infinite): {shorten(self.stored)}")
        return "; ".join(lines)


def shorten(names: Sequence[str], limit: int = 10) -> str:
    """Joins names for a message, at most `limit` of them."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def write_json(file: Path, value: dict) -> None:
    """Writes an indented JSON file in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode(errors="backslashreplace"))  # a lone surrogate stays an escape


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write. `blocks` yields it in order: several slices of its first axis at a time, or one slice."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path | None, tensors: Sequence[TensorSpec], shard_bytes: float = math.inf,
          single: str = SINGLE) -> NotFinite:
    """Writes the file `single`, or an index and numbered files of at most `shard_bytes` (or one tensor).

    It needs the memory of one block. With `directory` None it computes every block and writes nothing: processes that
    share the parameters must all gather them. Returns the tensors that were not finite.
    """
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map, not_finite = {}, NotFinite([], [])
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # on a terminal only
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else single
            weight_map |= {tensor.name: name for tensor in shard}
            with open(directory / name, "wb") if directory else contextlib.nullcontext() as file:
                if file:
                    file.write(_make_header(shard))
                for tensor in shard:
                    written = sum(write_block(file, block, tensor, not_finite) for block in tensor.blocks())
                    assert written == math.prod(tensor.shape), f"{tensor.name}: {written} elements for {tensor.shape}"
                    bar.update(tensor.nbytes)
    if directory and len(shards) > 1:
        write_json(directory / INDEX,
                   {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return not_finite


def _shards(tensors: Sequence[TensorSpec], shard_bytes: float) -> list[list[TensorSpec]]:
    shards, free_bytes = [[]], shard_bytes
    for tensor in tensors:
        if tensor.nbytes > free_bytes and shards[-1]:
            shards.append([])
            free_bytes = shard_bytes
        shards[-1].append(tensor)
        free_bytes -= tensor.nbytes
    return shards


def _make_header(tensors: Sequence[TensorSpec]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without the format
    for tensor in tensors:
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # readers that map the file want aligned tensors
    return len(data).to_bytes(8, "little") + data


def write_block(file: BinaryIO | None, block: np.ndarray, tensor: TensorSpec, not_finite: NotFinite) -> int:
    """Writes a block of a tensor in the tensor's dtype, unless `file` is None. Returns its number of elements."""
    # A transposed view becomes contiguous, and its dtype changes, a few rows at a time, which saves memory.
    rows = max(1, WRITE_BYTES // max(1, block[0].size * tensor.dtype.itemsize))
    for start in range(0, len(block) if file else 0, rows):
        piece = block[start : start + rows]
        with np.errstate(over="ignore"):  # reported below
            stored = piece.astype(tensor.dtype, order="C", copy=False)
        if not is_finite(stored):
            names = not_finite.overflowed if is_finite(np.ascontiguousarray(piece)) else not_finite.stored
            if tensor.name not in names:
                names.append(tensor.name)
        file.write(stored.view(np.uint8).data)
    return block.size


def is_finite(x: np.ndarray) -> bool:
    """Returns whether a contiguous array of DTYPES has no NaN or infinity: their exponents have all bits set."""
    mask = EXPONENTS[x.dtype]
    bits = x.reshape(-1).view(mask.dtype)
    return all((bits[at : at + WRITE_BYTES] & mask).max() != mask for at in range(0, bits.size, WRITE_BYTES))


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `target` when the block ends, and is removed if the block fails.

    Raises UserError if `target` exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another path or remove it")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(str(target), folder=True) as temporary:
        yield Path(temporary)
        os.rename(temporary, target)
