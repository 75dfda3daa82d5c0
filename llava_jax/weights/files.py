"""Safetensors files, read and written one piece of a tensor at a time, and directories that appear whole or not at all.

A safetensors file is eight bytes with the header's length, the header (JSON: name -> dtype, shape, first and last
byte), and the tensors' bytes, row-major and little-endian. Large models are cut into several files; an index names
the file of every tensor.
"""

import contextlib
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llava_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**22  # bytes that a write copies at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        if self.kind not in DTYPES:
            raise UserError(f"{self.file}: tensors of type {self.kind} cannot be read; {', '.join(DTYPES)} can")
        return DTYPES[self.kind]

    def read(self, layer: int | None = None) -> np.ndarray:
        """The tensor, or the slice `layer` of its first axis."""
        shape = self.shape if layer is None else self.shape[1:]
        count = math.prod(shape)
        with open(self.file, "rb") as file:
            file.seek(self.offset + (layer or 0) * count * self.dtype.itemsize)
            return np.fromfile(file, self.dtype, count).reshape(shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """The elements in their order, in pieces of at most CHUNK bytes."""
        left = math.prod(self.shape)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            while left:
                piece = np.fromfile(file, self.dtype, min(left, CHUNK // self.dtype.itemsize))
                left -= piece.size
                yield piece


def has_tensors(directory: Path) -> bool:
    """Whether a directory has files for `find`, which may still be broken."""
    return any((directory / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def find(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's `model.safetensors`, or of the files that its index names.

    UserError with one line if there are none, one is missing, truncated or lacks a tensor.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return _header(single)
    if not index.exists():
        if any(directory.glob("pytorch_model*")):
            raise UserError(f"{directory} holds pytorch_model.bin, a torch pickle, which is not read here: "
                             "open it with transformers and save_pretrained it, which writes safetensors")
        raise UserError(f"{single}: no such file, nor an index of several beside it")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map; download it again")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        file = directory / name
        if not file.exists():
            raise UserError(f"{file} is missing, which {index.name} names; download it")
        tensors |= _header(file)
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(f"{directory / file} lacks the tensor {name}, which {index.name} names; "
                             "download both again")
    return tensors


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        broken = f"{file}: truncated or not a safetensors file ({size:,} bytes); download it again"
        if 8 + length > size:
            raise UserError(broken)
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(broken) from None
    if 8 + length + end > size:
        raise UserError(f"{file}: truncated: {size:,} of {8 + length + end:,} bytes; download it again")
    return tensors


def read_json(file: Path) -> dict:
    """A JSON object; UserError with one line that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object")
    return value


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: `blocks` yields it in pieces of whole slices of its first axis, or of one slice each."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path | None, entries: Sequence[Entry], shard_bytes: int) -> None:
    """Writes `model.safetensors`, or numbered files of at most `shard_bytes` (or one tensor) each and their index.

    The memory that it needs is that of one block. With None nothing is written, but every block is made: processes
    that share the parameters must all take part in gathering them.
    """
    shards = _shards(entries, shard_bytes)
    total = sum(entry.nbytes for entry in entries)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # on a terminal only
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= {entry.name: name for entry in shard}
            with open(directory / name, "wb") if directory else contextlib.nullcontext() as file:
                if file:
                    file.write(_make_header(shard))
                for entry in shard:
                    written = sum(_write_block(file, block, entry.dtype) for block in entry.blocks())
                    assert written == math.prod(entry.shape), f"{entry.name}: {written} elements for {entry.shape}"
                    bar.update(entry.nbytes)
    if directory and len(shards) > 1:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards, room = [[]], shard_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def _make_header(entries: Sequence[Entry]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without the format
    for entry in entries:
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape),
                              "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # readers that map the file want the tensors aligned
    return len(data).to_bytes(8, "little") + data


def _write_block(file: BinaryIO | None, block: np.ndarray, dtype: np.dtype) -> int:
    # A transposed view is made contiguous, and its dtype changed, a few rows at a time.
    rows = max(1, CHUNK // max(1, block[0].size * dtype.itemsize))
    for start in range(0, len(block) if file else 0, rows):
        file.write(block[start : start + rows].astype(dtype, order="C", copy=False).view(np.uint8).data)
    return block.size


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends, and vanishes if the block fails.

    UserError if `target` exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another place or remove it")
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
