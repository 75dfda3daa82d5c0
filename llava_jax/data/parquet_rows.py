"""Reads the rows of Hugging Face data sets in parquet files."""

import bisect
import itertools
import os
import re
from collections.abc import Container
from typing import Any

from llava_jax.data.records import BadRow
from llava_jax.errors import UserError


class ParquetRows:
    """Reads the rows of a parquet file, or of the files in a folder and its subfolders, in order of their names.

    A folder with several splits, by the files' names (train-00000-of-00002.parquet), needs `FOLDER:SPLIT`. Parquet has
    no access to single rows: a row is read with its row group, which is kept for the next rows. Random access reads a
    row group each time; `prepare pack` writes a data set without that cost.

    Raises UserError, one line, for a file that is no parquet or has no rows; `rows[i]` BadRow if it cannot be read.
    """

    def __init__(self, path: str):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        self.files = _find_files(path)
        self._groups = []  # (file, row group)
        counts = []
        for file in self.files:
            try:
                metadata = pyarrow.parquet.read_metadata(file)
                rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                _raise_unless_damaged(error)
                raise UserError(f"{file}: not a readable parquet file ({_line(error)})") from None
            self._groups += [(file, group) for group in range(len(rows))]
            counts += rows
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._read: tuple[int, Any] | None = None
        if not len(self):
            raise UserError(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, columns: Container[str] | None = None) -> dict[str, Any]:
        """Returns a row, or only its fields in `columns`: other columns may have values that Python cannot express."""
        import pyarrow

        try:
            table, row = self._table(index)
            names = [name for name in table.column_names if columns is None or name in columns]
            return {name: table[name][row].as_py() for name in names}
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:  # KeyError: an unknown time zone
            _raise_unless_damaged(error)
            raise BadRow("malformed", f"{self.where(index)}: cannot be read ({_line(error)})") from None

    def columns(self, index: int) -> list[str]:
        """Returns the columns in which a row has a value."""
        table, row = self._table(index)
        return [name for name in table.column_names if table[name][row].is_valid]

    def _table(self, index: int) -> tuple[Any, int]:
        """Returns the row group of a row, and the row's number in it."""
        import pyarrow.parquet

        number = bisect.bisect_right(self._starts, index) - 1
        if self._read is None or self._read[0] != number:
            file, group = self._groups[number]
            self._read = number, pyarrow.parquet.ParquetFile(file).read_row_group(group)
        return self._read[1], index - self._starts[number]

    def where(self, index: int) -> str:
        """Returns file and number of a row, for messages."""
        file, _ = self._groups[bisect.bisect_right(self._starts, index) - 1]
        first = next(start for start, (name, _) in zip(self._starts, self._groups, strict=False) if name == file)
        return f"{file}, row {index - first + 1}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_read": None}


def find_parquet(folder: str) -> list[str]:
    """Returns the parquet files in a folder and its subfolders. Linked folders are skipped: they may be loops."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path.endswith(".parquet"))


_NUMBER = re.compile(r"(^|[-_./])\d+(?=[-_.]|$)")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})[^/]*\.parquet")


def _find_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    folder, wanted = (path, "") if os.path.isdir(path) else path.rsplit(":", 1)
    splits: dict[str, list[str]] = {}
    for file in find_parquet(folder):
        name = os.path.relpath(file, folder)
        shard = _SHARD.fullmatch(name)
        # Files of one split have names that differ in numbers alone: train-00000-of-00002, train/0000, part-1.
        split = shard[1] if shard else _NUMBER.sub(r"\1", name.removesuffix(".parquet")).rstrip("-_./")
        splits.setdefault(split, []).append(file)
    chosen = [split for split in splits if wanted in (split, os.path.basename(split))] if wanted else list(splits)
    if len(chosen) != 1:
        problem = f"{'no' if not chosen else 'more than one'} split {wanted}" if wanted else "several splits"
        raise UserError(f"{folder}: has {problem}; there are {', '.join(splits)}; name one as {folder}:SPLIT")
    files = splits[chosen[0]]
    shards = [match for match in map(_SHARD.fullmatch, files) if match]
    expected = {(f"{number:05}", match[3]) for match in shards for number in range(int(match[3]))}
    if missing := sorted(expected - {(match[2], match[3]) for match in shards}):
        raise UserError(f"{folder}: shard {missing[0][0]} of {int(missing[0][1])} of split {chosen[0]} is missing")
    return files


def _raise_unless_damaged(error: Exception) -> None:
    """Raises the error if the machine causes it and not the file: no memory, or a disk that does not answer."""
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:
        raise error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
