"""Safetensors files, read and written one piece of a tensor at a time, and directories that appear whole or not at all.

A safetensors file is eight bytes with the header's length, the header (JSON: name -> dtype, shape, first and last
byte), and the tensors' bytes, row-major and little-endian. Large models are cut into several files; an index names
the file of every tensor.
"""

import contextlib
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

from llava_jax.errors import UserError, user_path
from llava_jax.files import check_fetched, making, parse_json, read_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
        "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}
"""Bits of an element of every type of the format, read here or not."""
EXPONENTS = {DTYPES["F32"]: np.uint32(0x7F800000), DTYPES["F16"]: np.uint16(0x7C00), DTYPES["BF16"]: np.uint16(0x7F80)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 10**8  # bytes; the library's limit
CHUNK = 2**22  # bytes that a write copies at a time


@dataclass(frozen=True)
class TensorInfo:
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
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def find(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a directory's `model.safetensors`, or of the files that its index names.

    UserError with one line if there are none, or if one is missing, damaged, outside the directory or lacks a tensor.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return _header(single)
    if not index.exists():
        raise UserError(other_kind(directory) or f"{single}: no such file, nor an index of several beside it")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map; download it again")
    tensors = {}
    for name in {name: None for name in weight_map.values() if _is_inside(directory, name, index)}:
        file = directory / name
        if not file.exists():
            raise UserError(f"{file} is missing, which {index.name} names; download it")
        tensors |= _header(file)
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(f"{directory / file} lacks the tensor {name}, which {index.name} names; "
                             "download both again")
    return tensors


def _is_inside(directory: Path, name: Any, index: Path) -> bool:
    """Whether an index names a file of its directory. Raises UserError otherwise: an index must open no other files.

    Links are followed only into the `blobs` of Hugging Face's cache, where its snapshots are made of links.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w .+=-]{1,200}", name, re.ASCII) or not name.strip("."):
        raise UserError(f"{index}: weight_map names {name!r}, which is not the name of a file beside it")
    real, cache = (directory / name).resolve(), directory.resolve().parent.parent
    if real.parent not in (directory.resolve(), cache / "blobs"):
        raise UserError(f"{directory / name}: a link out of the directory; put the file itself there")
    return True


def other_kind(directory: Path) -> str:
    """What a directory is that holds no model for this project, and how to mend that; "" if nothing is known of it."""
    if (directory / "adapter_config.json").exists():
        return (f"{directory}: a LoRA (PEFT) adapter, which holds changes to another model; merge it into that one "
                "with PEFT's merge_and_unload, save_pretrained the result, and name its directory")
    if any(directory.glob("*.gguf")):
        return f"{directory}: a GGUF model, llama.cpp's format, is not read; take the model's safetensors"
    if any(directory.glob("pytorch_model*")) or any(directory.glob("*.bin")):
        return (f"{directory} holds pytorch_model.bin, a torch pickle, which is not read here: open it with "
                "transformers and save_pretrained it, which writes safetensors")
    if found := sorted([*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]):
        return f"{directory}: no model, but one is in {found[-1].parent}"
    return ""


def _header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file. UserError unless they fill it from the header's end to its own, without gap or overlap."""
    with user_path(file), open(file, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        begin = f.read(8)
        check_fetched(file, begin + f.read(32))
        length = int.from_bytes(begin, "little")
        broken = f"{file}: truncated or not a safetensors file ({size:,} bytes); download it again"
        if len(begin) < 8 or 8 + length > size or length > LARGEST_HEADER:
            raise UserError(broken)
        f.seek(8)
        text = f.read(length)
    try:
        header = parse_json(text.decode(), str(file))
    except ValueError:
        raise UserError(broken) from None
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        spans.append((*_span(file, name, entry), name))
        tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + spans[-1][0])
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise UserError(f"{file}: damaged: {name} begins at byte {first:,} of the data, where {end:,} is expected; "
                            "download it again")
        end = last
    if 8 + length + end != size:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise UserError(f"{file}: {kind}: {size:,} of {8 + length + end:,} bytes; download it again")
    return tensors


def _span(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """The first byte of a tensor's data, and the one behind it. UserError unless they suit its type and shape."""
    damaged = f"{file}: damaged: the header's entry of {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{damaged} is not dtype, shape and data_offsets; download it again")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = (shape, offsets) if isinstance(shape, list) and isinstance(offsets, list) else ([None],)
    if any(type(number) is not int or number < 0 for numbers in numbers for number in numbers) or len(offsets) != 2:
        raise UserError(f"{damaged} has no numbers as shape and data_offsets; download it again")
    if not isinstance(kind, str) or kind not in BITS:
        raise UserError(f"{damaged} has dtype {kind!r}, which is none of {', '.join(BITS)}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[kind]:
        raise UserError(f"{damaged} has {offsets[1] - offsets[0]:,} bytes for {kind} {shape}; download it again")
    return offsets[0], offsets[1]


class NotFinite(NamedTuple):
    """Names of tensors with values that are not finite: as they were given, or made so by a dtype of less range."""

    stored: list[str]
    overflowed: list[str]

    def message(self) -> str:
        """What is wrong, and how to mend it; "" if all is finite."""
        lines = []
        if self.overflowed:
            lines.append(f"values beyond the range of the dtype, which bfloat16 holds: {some(self.overflowed)}")
        if self.stored:
            lines.append(f"values that are not finite (NaN or infinite): {some(self.stored)}")
        return "; ".join(lines)


def some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_json(file: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode(errors="backslashreplace"))  # half a surrogate pair stays the escape that it was


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: `blocks` yields it in pieces of whole slices of its first axis, or of one slice each."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path | None, entries: Sequence[TensorSpec], shard_bytes: int) -> NotFinite:
    """Writes `model.safetensors`, or numbered files of at most `shard_bytes` (or one tensor) each and their index.

    The memory that it needs is that of one block. With None nothing is written, but every block is made: processes
    that share the parameters must all take part in gathering them. Returns what was not finite in what it wrote.
    """
    shards = _shards(entries, shard_bytes)
    total = sum(entry.nbytes for entry in entries)
    weight_map, found = {}, NotFinite([], [])
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:  # on a terminal only
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
            weight_map |= {entry.name: name for entry in shard}
            with open(directory / name, "wb") if directory else contextlib.nullcontext() as file:
                if file:
                    file.write(_make_header(shard))
                for entry in shard:
                    written = sum(_write_block(file, block, entry, found) for block in entry.blocks())
                    assert written == math.prod(entry.shape), f"{entry.name}: {written} elements for {entry.shape}"
                    bar.update(entry.nbytes)
    if directory and len(shards) > 1:
        write_json(directory / INDEX,
                   {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return found


def _shards(entries: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards, room = [[]], shard_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def _make_header(entries: Sequence[TensorSpec]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without the format
    for entry in entries:
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape),
                              "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # readers that map the file want the tensors aligned
    return len(data).to_bytes(8, "little") + data


def _write_block(file: BinaryIO | None, block: np.ndarray, entry: TensorSpec, found: NotFinite) -> int:
    # A transposed view is made contiguous, and its dtype changed, a few rows at a time.
    rows = max(1, CHUNK // max(1, block[0].size * entry.dtype.itemsize))
    for start in range(0, len(block) if file else 0, rows):
        piece = block[start : start + rows]
        with np.errstate(over="ignore"):  # it is looked for below
            stored = piece.astype(entry.dtype, order="C", copy=False)
        if not is_finite(stored):
            names = found.overflowed if is_finite(np.ascontiguousarray(piece)) else found.stored
            if entry.name not in names:
                names.append(entry.name)
        file.write(stored.view(np.uint8).data)
    return block.size


def is_finite(x: np.ndarray) -> bool:
    """Whether no element of a contiguous array of DTYPES is NaN or infinite: an exponent of ones is either."""
    mask = EXPONENTS[x.dtype]
    bits = x.reshape(-1).view(mask.dtype)
    return all((bits[at : at + CHUNK] & mask).max() != mask for at in range(0, bits.size, CHUNK))


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends, and vanishes if the block fails.

    UserError if `target` exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another place or remove it")
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with making(str(target), folder=True) as temporary:
        yield Path(temporary)
        os.rename(temporary, target)
