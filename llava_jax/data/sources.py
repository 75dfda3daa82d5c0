"""Random access to the rows of a data file, without holding them as Python objects."""

import dataclasses
import json
import mmap
import os
import re
from array import array

import numpy as np

from llava_jax.data.records import BadRow, Record, parse_row


class Source:
    """The rows of a LLaVA JSON file (one list) or of JSON lines, told apart by the content; `source[i]` is a Record.

    The file is read once, to find where each row starts, and mapped into memory after that; rows are parsed when asked
    for. A pickled Source holds the row positions (24 bytes a row) and opens the file again where it arrives.

    Image paths are joined to `image_root` (the file's own folder if empty). A path that leaves it is refused; symbolic
    links are followed.

    Raises FileNotFoundError or ValueError, one line that names the file and where possible the line, if the file is
    missing, empty, or not JSON. `source[i]` raises BadRow if that row is malformed.
    """

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike = ""):
        self.path = os.fspath(path)
        self.image_root = os.path.abspath(image_root or os.path.dirname(self.path))
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such data file")
        if not os.path.getsize(self.path):
            raise ValueError(f"{self.path}: the file is empty")
        self._file = None
        self._rows = _find_rows(self._bytes(), self.path)
        if not len(self._rows):
            raise ValueError(f"{self.path}: the file has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        start, stop, line = self._rows[index].tolist()
        where = f"{self.path}, row {index + 1} (line {line})"
        try:
            row = json.loads(self._bytes()[start:stop].decode())
        except ValueError as error:  # broken JSON or broken UTF-8
            raise BadRow("malformed", f"{where}: broken JSON ({error})") from None
        record = parse_row(row, where)
        return dataclasses.replace(record, images=tuple(self._resolve(path, record) for path in record.images))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def _bytes(self) -> mmap.mmap:
        if self._file is None:
            with open(self.path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._file

    def _resolve(self, path: str, record: Record) -> str:
        full = os.path.normpath(os.path.join(self.image_root, path))
        if not full.startswith(self.image_root.rstrip(os.sep) + os.sep):
            raise BadRow("malformed", f"{record.source}: image {path} is outside the image root {self.image_root}")
        return full


_blank = re.compile(r"[ \t\r\n]*")


def _find_rows(content: mmap.mmap, path: str) -> np.ndarray:
    """int64 [rows, 3]: first byte, end, and line (from 1) of every row."""
    # As Latin-1 every byte is one character: positions in the text are positions in the file, and no byte of a longer
    # UTF-8 sequence can be mistaken for one of JSON's own characters.
    text = str(content, "latin-1")
    start = 3 if text.startswith("\xef\xbb\xbf") else 0  # a byte order mark
    start = _blank.match(text, start).end()
    found = _find_in_list(text, start, path) if text[start : start + 1] == "[" else _find_lines(text, start, path)
    return np.frombuffer(found, np.int64).reshape(-1, 3)


def _find_in_list(text: str, start: int, path: str) -> array:
    """Rows of `[row, row, ...]`; a row is decoded only to learn where it ends."""
    decode, found, line, counted = json.JSONDecoder().raw_decode, array("q"), 1, 0
    try:
        at = _blank.match(text, start + 1).end()
        closed = text[at : at + 1] == "]"
        while not closed:
            line, counted = line + text.count("\n", counted, at), at
            stop = decode(text, at)[1]
            found.extend((at, stop, line))
            at = _blank.match(text, stop).end()
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("a comma or the end of the list is missing", text, at)
            at = _blank.match(text, at + 1).end()
        if at < len(text) and found:
            raise json.JSONDecodeError("there is more after the end of the list", text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    return found


def _find_lines(text: str, start: int, path: str) -> array:
    """Rows of JSON lines. Only the first is decoded here, to tell a file of another kind; blank lines are no rows."""
    found, line = array("q"), text.count("\n", 0, start) + 1
    while start < len(text):
        stop = text.find("\n", start)
        stop = len(text) if stop < 0 else stop
        if _blank.match(text, start).end() < stop:
            if not found:
                _check_first_line(text[start:stop], line, path)
            found.extend((start, stop, line))
        start, line = stop + 1, line + 1
    return found


def _check_first_line(text: str, line: int, path: str) -> None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{path}, line {line}: the file is neither a JSON list of rows nor JSON lines ({error.msg})"
        raise ValueError(message) from None
