"""The rows of Hugging Face data sets in parquet files."""

import bisect
import glob
import itertools
import os
import re
from typing import Any

from llava_jax.data.records import BadRow


class ParquetRows:
    """The rows of a parquet file, or of those in a folder and its subfolders, in the order of their names.

    Files that are named as shards of several splits (train-00000-of-00002.parquet) need `FOLDER:SPLIT`. Parquet knows
    no access to single rows: a row is read with its whole row group, which is kept for the rows that follow. Reading at
    random costs a row group each time; `prepare pack` makes a data set without that cost.

    Raises ValueError, one line, for a file that is no parquet or has no rows; `rows[i]` BadRow if it cannot be read.
    """

    def __init__(self, path: str):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        self.files = _find_files(path)
        self._groups = []  # (file, row group) of each
        counts = []
        for file in self.files:
            try:
                about = pyarrow.parquet.read_metadata(file)
                rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"{file}: not a readable parquet file ({_line(error)})") from None
            self._groups += [(file, group) for group in range(len(rows))]
            counts += rows
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._read: tuple[int, Any] | None = None
        if not len(self):
            raise ValueError(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow
        import pyarrow.parquet

        number = bisect.bisect_right(self._starts, index) - 1
        try:
            if self._read is None or self._read[0] != number:
                file, group = self._groups[number]
                self._read = number, pyarrow.parquet.ParquetFile(file).read_row_group(group)
            return self._read[1].slice(index - self._starts[number], 1).to_pylist()[0]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadRow("malformed", f"{self.where(index)}: cannot be read ({_line(error)})") from None

    def where(self, index: int) -> str:
        file, _ = self._groups[bisect.bisect_right(self._starts, index) - 1]
        first = next(start for start, (name, _) in zip(self._starts, self._groups, strict=False) if name == file)
        return f"{file}, row {index - first + 1}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_read": None}


def _find_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    folder, split = (path, "") if os.path.isdir(path) else path.rsplit(":", 1)
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "**/*.parquet"), recursive=True))
    shard = re.compile(r"(?:.*/)?([^/]+?)-\d{5}-of-\d{5}[^/]*\.parquet")
    splits = {match[1] for match in map(shard.fullmatch, files) if match}
    if split or len(splits) > 1:
        if split not in splits:
            problem = f"has no split {split}" if split else "has several splits"
            there = ", ".join(sorted(splits)) or "none"
            raise ValueError(f"{folder}: {problem}; there are {there}; name one as {folder}:SPLIT")
        return [file for file in files if (match := shard.fullmatch(file)) and match[1] == split]
    return files


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
