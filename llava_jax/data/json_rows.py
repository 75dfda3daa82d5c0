"""Random access to the rows of a JSON file, one list or JSON lines; and the members of one big object, in turn.

For random access the file is read once, in pieces, to find where each row starts; the positions are kept in a file
beside it. Rows are parsed when they are asked for.
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

PIECE = 1 << 26  # bytes of the file that are looked at together
SMALL_PIECE = 1 << 20  # the same, where nothing but the item at hand is kept
CACHED = 1 << 20  # files smaller than this are indexed faster than an index is read
VERSION = 2  # of the index file
TRIED = 100  # first lines of which one must be a JSON object

UNREADABLE = ((b"version https://git-lfs", "is a Git LFS pointer in the place of the data; fetch them: git lfs pull"),
              (b"BZh", "is packed with bzip2; unpack it"), (b"\xfd7zXZ\0", "is packed with xz; unpack it"),
              (b"(\xb5/\xfd", "is packed with zstd; unpack it"), (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
              (b"<!doctype html", "is a web page, so its download failed"),
              (b"<!DOCTYPE html", "is a web page, so its download failed"),
              (b"ARROW1", "is Arrow; write it as parquet"), (b"SQLite format", "is a SQLite data base"),
              (b"\x1f\x8b", "is packed with gzip; unpack it"), (b"PK\x03\x04", "is a zip archive; unpack it"),
              (b"\xff\xfe", "is UTF-16; convert it to UTF-8"), (b"\xfe\xff", "is UTF-16; convert it to UTF-8"))


class JsonRows:
    """The rows of `path`; `rows[i]` is the row as stored.

    A pickled JsonRows opens its files again where it arrives. The index file (`.NAME.index.npy`, 24 bytes a row) is
    made anew when size or time of the data file have changed; where it cannot be written, the index stays in memory.

    Raises UserError, one line that names the file and where possible the line, if the file is empty, of another kind,
    or a list that is broken. `rows[i]` raises BadRow ("malformed") if that row is no JSON.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = None
        if not os.path.getsize(path):
            raise UserError(f"{path}: the file is empty")
        self._places = self._index()
        if not len(self._places):
            raise UserError(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        start, stop, _ = self._places[index].tolist()
        try:
            return json.loads(self._bytes()[start:stop].decode())
        except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, or nested without end
            raise BadRow("malformed", f"{self.where(index)}: broken JSON ({error})") from None

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1} (line {self._places[index, 2]})"

    def __getstate__(self) -> dict:
        on_disk = isinstance(self._places, np.memmap)
        return {**self.__dict__, "_file": None, "_places": None if on_disk else self._places}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._places is None:
            self._places = self._index()

    def _bytes(self) -> mmap.mmap:
        if self._file is None:
            with open(self.path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._file

    def _index(self) -> np.ndarray:
        """int64 [rows, 3]: first byte, end, and line (from 1) of every row."""
        about = os.stat(self.path)
        if about.st_size < CACHED:
            return _find_rows(self._bytes(), self.path)
        mark = [about.st_size, about.st_mtime_ns]
        folder, name = os.path.split(self.path)
        cache = os.path.join(folder, f".{name}.index.npy")
        with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # there is none, or a damaged one
            stored = np.load(cache, mmap_mode="r")
            if stored.dtype == np.int64 and stored.ndim == 2 and stored[0].tolist() == [*mark, _seal(stored[1:])]:
                return stored[1:]
        found = _find_rows(self._bytes(), self.path)
        with contextlib.suppress(OSError, ValueError):  # a folder that is full or not ours
            with atomic_write(cache) as file:
                np.save(file, np.concatenate([np.array([[*mark, _seal(found)]], np.int64), found]))
            return np.load(cache, mmap_mode="r")[1:]
        return found


def _seal(places: np.ndarray) -> int:
    """The version of an index and its checksum: a flipped bit would move a row's bounds."""
    return VERSION << 32 | zlib.crc32(np.ascontiguousarray(places))


def read_members(path: str) -> Iterator[tuple[str, Any]]:
    """The members of the one object that a JSON file holds as (key, value), a list's items one by one as (key, item).

    The file is read in pieces: memory is that of the largest item, whatever the file's size. An empty list gives
    nothing. Raises UserError, one line that names the file and where possible the line, if the file is empty, of
    another kind or broken.
    """
    with open(path, "rb") as file:
        content = _FileBytes(file)
        start = _find_start(content, path)
        if start == len(content):
            raise UserError(f"{path}: the file is empty")
        if content[start : start + 1] != b"{":
            raise UserError(f"{path}: the file must hold one JSON object, and it begins otherwise")
        text, at = _Text(content, start, SMALL_PIECE, json.JSONDecoder()), 0
        try:
            at, closed = text.first_item(0, "}")
            while not closed:
                at, stop = text.skip_value(at)
                key = text.value(at, stop)
                at = text.skip_blank(stop)
                if not isinstance(key, str) or not text.startswith(at, ":"):
                    raise json.JSONDecodeError("a key or its colon is missing", text.text, at)
                at = text.skip_blank(at + 1)
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
    """Slices of a file by reading them: the pages of a map would count as this process's memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: slice) -> bytes:
        start, stop, _ = places.indices(self._size)
        self._file.seek(start)
        return self._file.read(max(0, stop - start))


def _find_start(content: mmap.mmap | _FileBytes, path: str) -> int:
    """The first byte that is no blank."""
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
    """Rows of JSON lines. Of the lines only the first good one is decoded, to tell a file of another kind; blank ones
    are no rows."""
    starts, firsts = [np.array([start])], [np.frombuffer(content[start : start + 1], np.uint8)]
    with open(path, "rb") as file:  # not through the map: its pages would count as this process's memory
        for at in range(start, len(content), PIECE):
            file.seek(at)
            piece = np.frombuffer(file.read(PIECE + 1), np.uint8)  # a byte more, which may be a line's first
            ends = np.flatnonzero(piece[:PIECE] == ord("\n")) + 1
            ends = ends[ends < len(piece)]
            starts.append(ends + at)
            firsts.append(piece[ends])
    starts, first = np.concatenate(starts), np.concatenate(firsts)
    line = content[:start].count(b"\n") + 1
    places = np.stack([starts, np.append(starts[1:] - 1, len(content)), np.arange(line, line + len(starts))], axis=1)
    suspects = np.flatnonzero(np.isin(first, np.frombuffer(b" \t\r\n", np.uint8)))  # a blank line begins with a blank
    blank = [row for row in suspects if not content[places[row, 0] : places[row, 1]].strip()]
    places = np.delete(places, blank, axis=0)
    _require_json(content, places[:TRIED], path)
    return places


def _require_json(content: mmap.mmap, places: np.ndarray, path: str) -> None:
    problem = ""
    for start, stop, number in places:
        line = content[start:stop]
        try:
            if isinstance(json.loads(line.decode("latin-1")), dict):
                return
            reason = "a line is no object"
        except (ValueError, RecursionError) as error:
            reason = "it holds NUL bytes" if b"\0" in line else getattr(error, "msg", error)
        problem = problem or f"line {number}: the file is neither a JSON list of rows nor JSON lines ({reason})"
    if problem:
        raise UserError(f"{path}, {problem}")


_blank = re.compile(r"[ \t\r\n]*")


def _find_in_list(content: mmap.mmap, start: int, path: str) -> np.ndarray:
    """Rows of `[row, row, ...]`; a row is decoded only to learn where it ends."""
    text, found = _Text(content, start), array("q")
    try:
        at, closed = text.first_item(0, "]")
        while not closed:
            at, stop = text.skip_value(at)
            found.extend((text.base + at, text.base + stop, text.line_of(at)))
            at, closed = text.next_item(stop, "]")
        at = text.skip_blank(at + 1)
        if text.base + at < len(content) and found:
            raise json.JSONDecodeError("there is more after the end of the list", text.text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        line = text.line_of(getattr(error, "pos", at))
        whole = f"; the {len(found) // 3:,} rows before are whole" if found else ""
        raise UserError(f"{path}, line {line}: broken JSON ({reason}){whole}") from None
    return np.frombuffer(found, np.int64).reshape(-1, 3)


# Python refuses to read integers of thousands of digits; where rows are only passed over, they are no matter.
PASSING = json.JSONDecoder(parse_int=str)


class _Text:
    """A piece of a file, from `base` on, that moves along with what is read from it.

    As Latin-1 every byte is one character: positions in the text are positions in the file, and no byte of a longer
    UTF-8 sequence can be mistaken for one of JSON's own characters.
    """

    def __init__(
        self, content: mmap.mmap | _FileBytes, base: int, piece: int = 0, decoder: json.JSONDecoder = PASSING
    ):
        self.piece = piece or PIECE
        self.content, self.base, self.size = content, base, self.piece
        self.text = content[base : base + self.size].decode("latin-1")
        self.line, self.counted = content[:base].count(b"\n") + 1, 0
        self.decode, self.passed = decoder.raw_decode, None

    def line_of(self, at: int) -> int:
        """The line of a place, from 1; `at` does not fall behind that of an earlier call."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, at), max(at, self.counted)
        return self.line

    def startswith(self, at: int, character: str) -> bool:
        return self.text.startswith(character, at)

    def skip_blank(self, at: int) -> int:
        stop = _blank.match(self.text, at).end()
        return stop if stop < len(self.text) or self._ended() else self.skip_blank(self._move(at))

    def first_item(self, at: int, close: str) -> tuple[int, bool]:
        """From an opening bracket: the place of the first item, or of the closing bracket and True."""
        at = self.skip_blank(at + 1)
        return at, self.startswith(at, close)

    def next_item(self, at: int, close: str) -> tuple[int, bool]:
        """From the end of an item: the place of the next one, or of the closing bracket and True."""
        at = self.skip_blank(at)
        if self.startswith(at, close):
            return at, True
        if not self.startswith(at, ","):
            what = "list" if close == "]" else "object"
            raise json.JSONDecodeError(f"a comma or the end of the {what} is missing", self.text, at)
        return self.skip_blank(at + 1), False

    def value(self, at: int, stop: int) -> Any:
        """What `skip_value` passed over last."""
        return self.passed if self.text.isascii() else json.loads(self.text[at:stop].encode("latin-1").decode())

    def skip_value(self, at: int) -> tuple[int, int]:
        """First and end place of the JSON value at `at`."""
        try:
            self.passed, stop = self.decode(self.text, at)
            if stop < len(self.text) - 2 or self._ended():  # in the next piece a number may go on, as 1 does in 1e-7
                return at, stop
        except json.JSONDecodeError as error:
            # What is broken far from the end is broken; a string without an end is told by its start.
            if self._ended() or (error.pos < len(self.text) - 64 and not error.msg.startswith("Unterminated")):
                raise
        return self.skip_value(self._move(at))

    def _ended(self) -> bool:
        return self.base + len(self.text) >= len(self.content)

    def _move(self, at: int) -> int:
        """Lets the text begin at `at` and, if it does already, makes it longer; returns where `at` is now."""
        self.line_of(at)
        self.size = self.piece if at else 2 * self.size
        self.base += at
        self.text, self.counted = self.content[self.base : self.base + self.size].decode("latin-1"), 0
        return 0
