"""Writes tensors as torch.save does, without torch: a zip archive with a pickle of a dict and raw storages."""

import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.weights.files import NotFinite, TensorSpec, write_block

STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage",
            np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"}
ALIGNMENT = 64
"""Multiple of the bytes at which storages start, as in torch's own files."""


def write(file: Path | None, tensors: Sequence[TensorSpec]) -> NotFinite:
    """Writes a file for torch.load(weights_only=True): a dict of contiguous tensors by name, each with its storage.

    It needs the memory of one block. With `file` None it computes every block and writes nothing. Returns the tensors
    that were not finite.
    """
    not_finite = NotFinite([], [])
    if file is None:
        for tensor in tensors:
            for block in tensor.blocks():
                write_block(None, block, tensor, not_finite)
        return not_finite
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{file.stem}/data.pkl", _pickle(tensors))
        archive.writestr(f"{file.stem}/byteorder", "little")
        for key, tensor in enumerate(tensors):
            entry = zipfile.ZipInfo(f"{file.stem}/data/{key}")
            entry.file_size = tensor.nbytes  # decides whether zip64 is needed
            start = archive.fp.tell() + 30 + len(entry.filename) + 4
            entry.extra = struct.pack("<HH", 0x4246, -start % ALIGNMENT) + bytes(-start % ALIGNMENT)
            with archive.open(entry, "w") as opened:
                for block in tensor.blocks():
                    write_block(opened, block, tensor, not_finite)
        archive.writestr(f"{file.stem}/version", "3\n")
    return not_finite


def _pickle(tensors: Sequence[TensorSpec]) -> bytes:
    """Returns a pickle, protocol 2, of a dict of tensors: calls of torch's `_rebuild_tensor_v2`."""
    items = b""
    for key, tensor in enumerate(tensors):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = _tuple(_text("storage"), _name("torch", STORAGES[tensor.dtype]), _text(str(key)), _text("cpu"),
                         _int(math.prod(tensor.shape))) + b"Q"  # a persistent id
        hooks = _name("collections", "OrderedDict") + b")R"
        items += _text(tensor.name) + _name("torch._utils", "_rebuild_tensor_v2") + _tuple(
            storage, _int(0), _tuple(*map(_int, tensor.shape)), _tuple(*map(_int, strides)), b"\x89", hooks) + b"R"
    return b"\x80\x02}(" + items + b"u."


def _tuple(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
