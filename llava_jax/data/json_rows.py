"""Reads the rows of a JSON list or of JSON lines by random access, and the members of one large object in order.

For random access the file is scanned once, in pieces, for the offsets of its rows. An index file in the same folder
stores them. A row is parsed when it is read.
"""

import contextlib
import json
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from llava_jax.data.records import BadRow
from llava_jax.errors import UserError
from llava_jax.files import atomic_write

PIECE_BYTES = 1 << 26
"""Number of bytes scanned at a time."""
SMALL_PIECE_BYTES = 1 << 20
"""Number of bytes read at a time if only the current item is kept."""
MIN_INDEXED_BYTES = 1 << 20
"""Size of the smallest file with an index file. Scanning a smaller one is faster than reading an index."""
VERSION = 2
"""Version of the index file."""
PROBE_LINES = 100
"""Number of first lines of which one must be a JSON object."""

UNREADABLE = ((b"version https://git-lfs", "is a Git LFS pointer in the place of the data; fetch them: git lfs pull"),
              (b"BZh", "is packed with bzip2; unpack it"), (b"\xfd7zXZ\0", "is packed with xz; unpack it"),
              (b"(\xb5/\xfd", "is packed with zstd; unpack it"), (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
              (b"<!doctype html", "is a web page, so its download failed"),
              (b"<!DOCTYPE html", "is a web page, so its download failed"),
              (b"ARROW1", "is Arrow; write it as parquet"), (b"SQLite format", "is a SQLite data base"),
              (b"\x1f\x8b", "is packed with gzip; unpack it"), (b"PK\x03\x04", "is a zip archive; unpack it"),
              (b"\xff\xfe", "is UTF-16; convert it to UTF-8"), (b"\xfe\xff", "is UTF-16; convert it to UTF-8"))


class JsonRows:
    """Reads rows by random access; `rows[i]` is the row as stored.

    An unpickled JsonRows opens its files again. The index file (`.NAME.index.npy`, 24 bytes a row) is replaced when
    size or time of the data file have changed. If it cannot be written, the index stays in memory.

    Raises UserError, one line that names the file and where possible the line, if the file is empty, of another kind,
    or a broken list. `rows[i]` raises BadRow ("malformed") if that row is no JSON.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = None
        if not os.path.getsize(path):
            raise UserError(f"{path}: the file is empty")
        self._offsets = self._index()
        if not len(self._offsets):
            raise UserError(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        start, stop, _ = self._offsets[index].tolist()
        try:
            return json.loads(self._bytes()[start:stop].decode())
        except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, or nested without end
            raise BadRow("malformed", f"{self.where(index)}: broken JSON ({error})") from None

    def where(self, index: int) -> str:
        """Returns file, number and line of a row, for messages."""
        return f"{self.path}, row {index + 1} (line {self._offsets[index, 2]})"

    def __getstate__(self) -> dict:
        on_disk = isinstance(self._offsets, np.memmap)
        return {**self.__dict__, "_file": None, "_offsets": None if on_disk else self._offsets}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._offsets is None:
            self._offsets = self._index()

    def _bytes(self) -> mmap.mmap:
        if self._file is None:
            with open(self.path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._file

    def _index(self) -> np.ndarray:
        """Returns int64 [rows, 3]: first byte, end, and line (from 1) of every row."""
        status = os.stat(self.path)
        if status.st_size < MIN_INDEXED_BYTES:
            return _find_rows(self._bytes(), self.path)
        stamp = [status.st_size, status.st_mtime_ns]
        folder, name = os.path.split(self.path)
        cache = os.path.join(folder, f".{name}.index.npy")
        with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # a missing or damaged index
            stored = np.load(cache, mmap_mode="r")
            if stored.dtype == np.int64 and stored.ndim == 2 and stored[0].tolist() == [*stamp, _checksum(stored[1:])]:
                return stored[1:]
        offsets = _find_rows(self._bytes(), self.path)
        with contextlib.suppress(OSError, ValueError):  # a folder that is full or not writable
            with atomic_write(cache) as file:
                np.save(file, np.concatenate([np.array([[*stamp, _checksum(offsets)]], np.int64), offsets]))
            return np.load(cache, mmap_mode="r")[1:]
        return offsets


def _checksum(offsets: np.ndarray) -> int:
    """Returns version and checksum of an index, because a flipped bit would move a row's bounds."""
    return VERSION << 32 | zlib.crc32(np.ascontiguousarray(offsets))


def read_members(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the members of the object in a JSON file as (key, value), and the items of a list as (key, item).

    The file is read in pieces, so memory is that of the largest item. An empty list yields nothing.

    Raises UserError, one line that names the file and if possible the line, if the file is empty, of another kind or
    damaged.
    """
    with open(path, "rb") as file:
        content = _FileBytes(file)
        start = _find_start(content, path)
        if start == len(content):
            raise UserError(f"{path}: the file is empty")
        if content[start : start + 1] != b"{":
            raise UserError(f"{path}: the file must be one JSON object, and it starts otherwise")
        text, at = _Text(content, start, SMALL_PIECE_BYTES, json.JSONDecoder()), 0
        try:
            at, closed = text.first_item(0, "}")
            while not closed:
                at, stop = text.skip_value(at)
                key = text.value(at, stop)
                at = text.skip_space(stop)
                if not isinstance(key, str) or not text.startswith(at, ":"):
                    raise json.JSONDecodeError("a key or its colon is missing", text.text, at)
                at = text.skip_space(at + 1)
                if text.startswith(at, "["):
                    at, ended = text.first_item(at, "]")
                    while not ended:
                        at, stop = text.skip_value(at)
                        yield key, text.value(at, stop)
                        at, ended = text.next_item(stop, "]")
                    stop = at + 1
                else:
                    at, stop = text.skip_value(at)
                    yield key, text.value(at, stop)
                at, closed = text.next_item(stop, "}")
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            line = text.line_of(getattr(error, "pos", at))
            raise UserError(f"{path}, line {line}: broken JSON ({reason}); copy the file again") from None


class _FileBytes:
    """Slices a file by reading, because the pages of a map would count as this process's memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        self._file.seek(start)
        return self._file.read(max(0, stop - start))


def _find_start(content: mmap.mmap | _FileBytes, path: str) -> int:
    """Returns the offset of the first byte that is no whitespace."""
    bom = 3 if content[:3] == b"\xef\xbb\xbf" else 0
    for magic, what in UNREADABLE:
        if content[bom : bom + len(magic)] == magic:
            raise UserError(f"{path}: the file {what}")
    start = bom
    while content[start : start + 1] in (b" ", b"\t", b"\r", b"\n"):
        start += 1
    return start


def _find_rows(content: mmap.mmap, path: str) -> np.ndarray:
    start = _find_start(content, path)
    if start == len(content):
        return np.zeros((0, 3), np.int64)
    find = _find_in_list if content[start : start + 1] == b"[" else _find_lines
    return find(content, start, path)


def _find_lines(content: mmap.mmap, start: int, path: str) -> np.ndarray:
    """Returns the offsets of JSON lines. Empty lines are no rows. Lines are parsed only until one is valid."""
    starts, firsts = [np.array([start])], [np.frombuffer(content[start : start + 1], np.uint8)]
    with open(path, "rb") as file:  # not through the map: its pages would count as this process's memory
        for at in range(start, len(content), PIECE_BYTES):
            file.seek(at)
            piece = np.frombuffer(file.read(PIECE_BYTES + 1), np.uint8)  # a byte more, which may be a line's first
            ends = np.flatnonzero(piece[:PIECE_BYTES] == ord("\n")) + 1
            ends = ends[ends < len(piece)]
            starts.append(ends + at)
            firsts.append(piece[ends])
    starts, first = np.concatenate(starts), np.concatenate(firsts)
    line = content[:start].count(b"\n") + 1
    stops = np.append(starts[1:] - 1, len(content))
    offsets = np.stack([starts, stops, np.arange(line, line + len(starts))], axis=1)
    # An empty line starts with whitespace.
    suspects = np.flatnonzero(np.isin(first, np.frombuffer(b" \t\r\n", np.uint8)))
    empty = [row for row in suspects if not content[offsets[row, 0] : offsets[row, 1]].strip()]
    offsets = np.delete(offsets, empty, axis=0)
    _require_json(content, offsets[:PROBE_LINES], path)
    return offsets


def _require_json(content: mmap.mmap, offsets: np.ndarray, path: str) -> None:
    problem = ""
    for start, stop, number in offsets:
        line = content[start:stop]
        try:
            if isinstance(json.loads(line.decode("latin-1")), dict):
                return
            reason = "a line is no object"
        except (ValueError, RecursionError) as error:
            reason = "it has NUL bytes" if b"\0" in line else getattr(error, "msg", error)
        problem = problem or f"line {number}: the file is neither a JSON list of rows nor JSON lines ({reason})"
    if problem:
        raise UserError(f"{path}, {problem}")


_SPACE = re.compile(r"[ \t\r\n]*")


def _find_in_list(content: mmap.mmap, start: int, path: str) -> np.ndarray:
    """Returns the offsets of the rows of `[row, row, ...]`. A row is parsed only for the position of its end."""
    text, offsets = _Text(content, start), array("q")
    try:
        at, closed = text.first_item(0, "]")
        while not closed:
            at, stop = text.skip_value(at)
            offsets.extend((text.base + at, text.base + stop, text.line_of(at)))
            at, closed = text.next_item(stop, "]")
        at = text.skip_space(at + 1)
        if text.base + at < len(content) and offsets:
            raise json.JSONDecodeError("there is more after the end of the list", text.text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        line = text.line_of(getattr(error, "pos", at))
        hint = f"; the {len(offsets) // 3:,} rows before are whole" if offsets else ""
        raise UserError(f"{path}, line {line}: broken JSON ({reason}){hint}") from None
    return np.frombuffer(offsets, np.int64).reshape(-1, 3)


# Python refuses integers of thousands of digits, which do not matter while rows are only skipped.
SKIPPING = json.JSONDecoder(parse_int=str)


class _Text:
    """A piece of a file, from offset `base` on, that moves forward as it is read.

    It is decoded as Latin-1, in which every byte is one character. So positions in the text are offsets in the file,
    and no byte of a longer UTF-8 sequence can be mistaken for a character of JSON's syntax.
    """

    def __init__(
        self, content: mmap.mmap | _FileBytes, base: int, piece: int = 0, decoder: json.JSONDecoder = SKIPPING
    ):
        self.piece = piece or PIECE_BYTES
        self.content, self.base, self.size = content, base, self.piece
        self.text = content[base : base + self.size].decode("latin-1")
        self.line, self.counted = content[:base].count(b"\n") + 1, 0
        self.decode, self.skipped = decoder.raw_decode, None

    def line_of(self, at: int) -> int:
        """Returns the line of a position, from 1. `at` must not decrease between calls."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, at), max(at, self.counted)
        return self.line

    def startswith(self, at: int, character: str) -> bool:
        return self.text.startswith(character, at)

    def skip_space(self, at: int) -> int:
        stop = _SPACE.match(self.text, at).end()
        return stop if stop < len(self.text) or self._ended() else self.skip_space(self._move(at))

    def first_item(self, at: int, close: str) -> tuple[int, bool]:
        """Returns the position of the first item after a bracket at `at`; or of the closing bracket, and True."""
        at = self.skip_space(at + 1)
        return at, self.startswith(at, close)

    def next_item(self, at: int, close: str) -> tuple[int, bool]:
        """Returns the position of the item after one that ends at `at`; or of the closing bracket, and True."""
        at = self.skip_space(at)
        if self.startswith(at, close):
            return at, True
        if not self.startswith(at, ","):
            what = "list" if close == "]" else "object"
            raise json.JSONDecodeError(f"a comma or the end of the {what} is missing", self.text, at)
        return self.skip_space(at + 1), False

    def value(self, at: int, stop: int) -> Any:
        """Returns the value that `skip_value` skipped last."""
        return self.skipped if self.text.isascii() else json.loads(self.text[at:stop].encode("latin-1").decode())

    def skip_value(self, at: int) -> tuple[int, int]:
        """Returns start and end of the JSON value at `at`."""
        try:
            self.skipped, stop = self.decode(self.text, at)
            if stop < len(self.text) - 2 or self._ended():  # a number may continue in the next piece, as 1 does in 1e-7
                return at, stop
        except json.JSONDecodeError as error:
            # An error far from the end is an error; a string without an end is reported at its start.
            if self._ended() or (error.pos < len(self.text) - 64 and not error.msg.startswith("Unterminated")):
                raise
        return self.skip_value(self._move(at))

    def _ended(self) -> bool:
        return self.base + len(self.text) >= len(self.content)

    def _move(self, at: int) -> int:
        """Moves the start of the text to `at`, or doubles its length if it starts there. Returns the new `at`, 0."""
        self.line_of(at)
        self.size = self.piece if at else 2 * self.size
        self.base += at
        self.text, self.counted = self.content[self.base : self.base + self.size].decode("latin-1"), 0
        return 0
