"""Files with one caption per row: JSON list, JSON lines or TSV, detected by content. Rows are copied unchanged."""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data.json_rows import UNREADABLE, JsonRows
from llava_jax.errors import UserError
from llava_jax.files import atomic_write

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 20
"""Number of bytes that are read to detect the form."""


class CaptionFile:
    """Iterates over the bytes of every row, lines with their newline. `caption(row)` reads the caption of a row.

    `form` is "list", "lines" or "tsv". In TSV, captions are the first column, or the column "caption" if the first line
    names columns. Blank lines are no rows. A pickled CaptionFile is small, and only `caption` works.

    Raises UserError, one line that names the file, if it is missing, empty or of another form.
    """

    def __init__(self, path: str):
        self.path = path
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        self.size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        for magic, what in UNREADABLE:
            if head.startswith(magic):
                raise UserError(f"{path}: the file {what}")
        head = head.removeprefix(BOM).lstrip(b" \r\n")
        if not head:
            raise UserError(f"{path}: the file is empty")
        first, _, rest = head.partition(b"\n")
        self.form = _form(head, first, path)
        names = [name.strip().lower() for name in first.decode("utf-8", "replace").split("\t")]
        self._header = self.form == "tsv" and "caption" in names
        self._column = names.index("caption") if self._header else 0
        if self._header and not rest.strip():
            raise UserError(f"{path}: the file has no rows, only the names of its columns")
        self._list = _ListRows(path) if self.form == "list" else None

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._list) if self._list else itertools.islice(self._all_lines(), int(self._header), None)

    def caption(self, row: bytes) -> str:
        """Returns the caption of a row. Raises UserError with the fault of the row."""
        try:
            text = row.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"it is not UTF-8 ({error.reason} at byte {error.start + 1})") from None
        if self.form == "tsv":
            fields = text.rstrip("\r\n").split("\t")
            if len(fields) < max(2, self._column + 1):
                raise UserError("there is no tab between caption and URL")
            found = fields[self._column]
        else:
            try:
                found = _caption(json.loads(text))
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"broken JSON ({error})") from None
        if not found.strip():
            raise UserError("the caption is empty")
        return found

    def where(self, index: int) -> str:
        """Returns file, row and line of a row, for messages."""
        if self._list:
            return self._list.where(index)
        with open(self.path, "rb") as file:
            full = (number for number, line in enumerate(file, 1) if line.removeprefix(BOM).strip())
            line = next(itertools.islice(full, index + self._header, None))
        return f"{self.path}, row {index + 1} (line {line})"

    def write(self, path: str, kept: np.ndarray) -> None:
        """Writes the rows where `kept`, bool [rows], in this file's form and order, all or nothing."""
        rows = itertools.compress(self, kept)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path) as file:
            if self.form == "list":
                file.write(b"[\n")
                for number, row in enumerate(rows):
                    file.write(b",\n" + row if number else row)
                file.write(b"\n]\n")
            else:
                file.writelines(itertools.islice(self._all_lines(), int(self._header)))
                file.writelines(rows)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_list": None}

    def _all_lines(self) -> Iterator[bytes]:
        """Yields the lines that are not blank."""
        with open(self.path, "rb") as file:
            file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
            yield from (line for line in file if line.strip())


class _ListRows(JsonRows):
    """Iterates over the rows of a JSON list as bytes."""

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            for start, stop, _ in self._offsets:
                file.seek(start)
                yield file.read(stop - start)


def _form(head: bytes, first: bytes, path: str) -> str:
    if head[:1] == b"[" and head[1:].lstrip()[:1] in (b"{", b"]", b""):
        return "list"
    if head[:1] == b"{":
        try:
            json.loads(first.decode("latin-1"))
            return "lines"
        except (ValueError, RecursionError):
            if len(first) == len(head) == HEAD_BYTES:  # the line goes on
                return "lines"
    if b"\t" in first:
        return "tsv"
    raise UserError(f"{path}: neither a JSON list of rows, nor JSON lines, nor lines of caption, tab and URL")


def _caption(row: Any) -> str:
    if not isinstance(row, dict):
        raise UserError("a row must be an object")
    turns = row.get("conversations")
    if turns is not None:
        turns = turns if isinstance(turns, list) else []
        found = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
        if len(found) != 1:
            raise UserError(f"the conversation has {len(found)} answers from gpt; the caption must be the only one")
        what, found = "the answer", found[0]
    else:
        what, found = "caption", row.get("caption")
    if not isinstance(found, str):
        raise UserError(f"{what} must be text" if found is not None else "it has neither caption nor conversations")
    return found
