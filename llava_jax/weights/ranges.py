"""Reads ranges of the bytes of local files and of files in a bucket (gs://...)."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_jax.errors import UserError, user_path
from llava_jax.files import is_remote

REQUEST_BYTES = 2**25
"""Largest size of one request to a bucket. Requests for a larger range run in parallel."""


def file_size(file: Path) -> int:
    """Returns the size of a file in bytes. Raises UserError if it is missing."""
    with user_path(file), file.open("rb") as opened:
        return opened.seek(0, io.SEEK_END)


def read_range(file: Path, start: int, size: int) -> np.ndarray:
    """Reads `size` bytes. Raises UserError if the file ends before."""
    if not is_remote(file):
        content = np.empty(size, np.uint8)
        with user_path(file), open(file, "rb") as opened:
            opened.seek(start)
            content = content[: opened.readinto(content)]
    else:
        pieces = [(at, min(REQUEST_BYTES, start + size - at)) for at in range(start, start + size, REQUEST_BYTES)]
        content = np.frombuffer(b"".join(read_ranges(file, pieces)), np.uint8)
    if len(content) != size:
        raise UserError(f"{file}: {size:,} bytes at {start:,} are missing: truncated, or replaced while it was read")
    return content


def read_ranges(file: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Reads several ranges (start, size), from a bucket in parallel. A range that ends beyond the file is shorter."""
    with user_path(file):
        if is_remote(file):
            import fsspec

            filesystem, name = fsspec.core.url_to_fs(str(file))
            starts, stops = [start for start, _ in ranges], [start + size for start, size in ranges]
            return filesystem.cat_ranges([name] * len(ranges), starts, stops, on_error="raise")
        pieces = []
        with open(file, "rb") as opened:
            for start, size in ranges:
                opened.seek(start)
                pieces.append(opened.read(size))
        return pieces
