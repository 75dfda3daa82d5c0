"""Opens data files of any format as sequences of Records, and mixtures of several files."""

import bisect
import dataclasses
import functools
import itertools
import os
import stat
from collections.abc import Callable
from typing import Any

from llava_jax.data import fields
from llava_jax.data.json_rows import JsonRows
from llava_jax.data.parquet_rows import ParquetRows, find_parquet
from llava_jax.data.records import FORMATS, BadRow, Medium, Record, check_text, parse_row, turns_key
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError, user_path
from llava_jax.files import parse_json, read_text
from llava_jax.video import Video

PROBE_ROWS = 100
"""Number of first rows from which the format of a file is detected."""
NEEDED = {*FORMATS, *fields.READ}
"""Keys from which a record is parsed, or by which a row is refused."""
MAX_MIXTURE_BYTES = 1 << 20
"""Largest size of a mixture file."""


class Source:
    """Reads the rows of one data file; `source[i]` is a Record. Small when pickled: unpickling opens the files again.

    Image paths are joined to `image_root`. A path outside of it is refused; symbolic links are followed.
    Raises UserError, one line, if the first rows have no known format or several. `source[i]` raises BadRow.
    """

    def __init__(self, rows: JsonRows | ParquetRows | TfdsRows, image_root: str):
        self.rows, self.path, self.image_root = rows, rows.path, os.path.abspath(image_root)
        self.key = _find_format(rows)
        self.format = FORMATS[self.key]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row, where = _needed(self.rows, index), self.where(index)
        record = parse_row(row, where)
        if row.get(self.key) is None:
            raise BadRow("malformed", f"{record.source}: has {turns_key(row)}, the rows before it have {self.key}")
        if unread := self._unread(index):
            record = dataclasses.replace(record, unknown=(*unread, *record.unknown))
        if not record.images:
            return record
        return dataclasses.replace(record, images=tuple(self._resolve(image, record) for image in record.images))

    @property
    def files(self) -> list[str]:
        """Paths of the files of the rows."""
        return [self.path] if isinstance(self.rows, JsonRows) else self.rows.files

    def row(self, index: int) -> Any:
        """Returns the row as stored. Raises BadRow if it cannot be read."""
        return self.rows[index]

    def where(self, index: int) -> str:
        """Returns file and number of a row, for messages."""
        return self.rows.where(index)

    def _unread(self, index: int) -> list[str]:
        """Returns the fields that were not read from the file."""
        match self.rows:
            case ParquetRows():
                return sorted({*self.rows.columns(index)} - NEEDED)
            case TfdsRows():
                return self.rows.skipped
        return []

    def _resolve(self, image: Medium, record: Record) -> Medium:
        if isinstance(image, bytes):
            return image
        if isinstance(image, Video):
            return Video(self._resolve(image.path, record))
        full = os.path.normpath(os.path.join(self.image_root, image))
        if not full.startswith(self.image_root.rstrip(os.sep) + os.sep):
            message = f"{record.source}: image {image} is outside the image root {self.image_root}"
            raise BadRow("outside_root", message)
        return full


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources, with the number of rows of each source in an epoch.

    An epoch continues in the shuffled order of a source's rows at the end of the last one, so no row repeats before all
    have been used. Rows have consecutive numbers, source by source.
    """

    sources: tuple[Source, ...]
    counts: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of each source's first row, then the number of all rows."""
        return tuple(itertools.accumulate((len(source) for source in self.sources), initial=0))

    @property
    def name(self) -> str:
        """Paths of all sources, for messages."""
        return ", ".join(source.path for source in self.sources)

    def locate(self, number: int) -> tuple[Source, int]:
        """Returns the source of row `number` of the mixture, and the row's index in that source."""
        index = bisect.bisect_right(self.starts, number) - 1
        return self.sources[index], number - self.starts[index]


def open_source(path: str | os.PathLike, image_root: str | os.PathLike = "") -> Source:
    """Opens a data file and detects its format from the content.

    `path` is a file of LLaVA JSON (a list), JSON lines or parquet, a folder of parquet files, or the folder of a TFDS
    data set in ArrayRecord (which may be on gs://); `FOLDER:SPLIT` names one split of several. Rows are of any format
    that `records.FORMATS` names. Image paths are relative to `image_root`, by default the folder of the file.

    Raises UserError with one line that names what was found.
    """
    path, image_root = os.fspath(path), os.fspath(image_root)
    folder = path if os.path.isdir(path) else path.rpartition(":")[0]
    if path.startswith("gs://") or os.path.isdir(folder):
        return Source(_open_folder(path, folder), image_root or folder)
    with user_path(path, missing="no such data file"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is no regular file")
        with open(path, "rb") as file:
            kind = ParquetRows if file.read(4) == b"PAR1" else JsonRows
    return Source(kind(path), image_root or os.path.dirname(path))


def open_mixture(path: str | os.PathLike, image_root: str | os.PathLike = "") -> Mixture:
    """Opens a data file as a mixture of one, or the files that a mixture file names.

    A mixture file is a JSON object {"mixture": [{"path", "image_root", "epochs" | "count" | "weight"}, ...]}, with
    paths relative to its folder. `epochs` (1 by default) is the number of times that an epoch reads a source, or a
    fraction of it. `count` is the number of rows. With `weight`, for all sources or none, an epoch has as many rows as
    all sources together, divided by weight. Raises what `open_source` raises, and UserError for a bad mixture file.
    """
    parts = _read_mixture(os.fspath(path))
    if parts is None:
        source = open_source(path, image_root)
        return Mixture((source,), (len(source),))
    base = os.path.dirname(os.fspath(path))
    sources = []
    for number, part in enumerate(parts, 1):
        where = part["path"] if "://" in part["path"] else os.path.join(base, part["path"])
        if _read_mixture(where) is not None:
            raise UserError(f"{path}: {part['path']} is a mixture itself; name its parts instead")
        root = os.path.join(base, part["image_root"]) if part.get("image_root") else image_root
        try:
            sources.append(open_source(where, root))
        except UserError as error:
            raise UserError(f"{path}, part {number}: {error}") from None
    sizes = [len(source) for source in sources]
    if any("weight" in part for part in parts):
        total_weight = sum(part["weight"] for part in parts)
        counts = [round(sum(sizes) * part["weight"] / total_weight) for part in parts]
    else:
        shares = zip(parts, sizes, strict=True)
        counts = [part.get("count", round(part.get("epochs", 1) * size)) for part, size in shares]
    for number, count in enumerate(counts, 1):
        if not count:
            raise UserError(f"{path}: part {number} gives no row to an epoch; give it more, or leave it out")
    return Mixture(tuple(sources), tuple(counts))


def _needed(rows: JsonRows | ParquetRows | TfdsRows, index: int) -> Any:
    """Returns the fields of a row that a record needs."""
    return rows.read(index, NEEDED) if isinstance(rows, ParquetRows) else rows[index]


def _find_format(rows: Any) -> str:
    """Returns the key of the turns in the first rows."""
    first_rows, problem, fields_seen = {}, None, []
    for i in range(min(len(rows), PROBE_ROWS)):
        try:
            row = _needed(rows, i)
            key = turns_key(row)
        except BadRow as bad:
            problem = problem or str(bad)
            continue
        except UserError as error:
            raise UserError(f"{rows.where(i)}: {error}") from None
        if key is not None:
            first_rows.setdefault(key, i + 1)
        elif isinstance(row, dict):
            names = rows.columns(i) if isinstance(rows, ParquetRows) else row
            fields_seen.append(", ".join(map(str, names)) or "nothing")
    if len(first_rows) > 1:
        seen = ", ".join(f"row {row} has {key}" for key, row in first_rows.items())
        raise UserError(f"{rows.path}: the file is ambiguous: {seen}; split it into files of one format each")
    if not first_rows:
        seen = f"the first row has {fields_seen[0]:.200}" if fields_seen else problem or "the first rows are no objects"
        raise UserError(f"{rows.path}: of no known format: a row needs {', '.join(FORMATS)}; {seen}")
    return next(iter(first_rows))


def _open_folder(path: str, folder: str) -> ParquetRows | TfdsRows:
    return TfdsRows(path) if path.startswith("gs://") or not find_parquet(folder) else ParquetRows(path)


def _read_mixture(path: str) -> list[dict[str, Any]] | None:
    """Returns the checked parts of a mixture file; None for any other file."""
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_MIXTURE_BYTES:
        return None
    try:
        content = parse_json(read_text(path, encoding="utf-8-sig"), path, (dict, list))
    except UserError:
        return None  # not a mixture, whatever else it is
    if not isinstance(content, dict) or "mixture" not in content:
        return None
    parts = content["mixture"]
    if len(content) > 1 or not isinstance(parts, list) or not parts:
        raise UserError(f'{path}: a mixture file is {{"mixture": [{{"path": ...}}, ...]}} and nothing else')
    for number, part in enumerate(parts, 1):
        problem = "it must be an object with a path" if not isinstance(part, dict) else _problem_of(part)
        if problem:
            raise UserError(f"{path}: part {number} of the mixture: {problem}")
    weighted = ["weight" in part for part in parts]
    if any(weighted) and not all(weighted):
        raise UserError(f"{path}: part {weighted.index(False) + 1} of the mixture has no weight, but others have")
    return parts


def _problem_of(part: dict[str, Any]) -> str | None:
    shares: dict[str, Callable[[Any], bool]] = {
        "epochs": lambda x: isinstance(x, int | float) and 0 < x < 1e6,
        "count": lambda x: isinstance(x, int) and 0 < x < 1e12,
        "weight": lambda x: isinstance(x, int | float) and 0 < x < 1e6,
    }
    if not isinstance(part.get("path"), str) or not part["path"]:
        return "path is missing"
    if not isinstance(part.get("image_root", ""), str):
        return "image_root must be text"
    try:
        check_text(part["path"] + part.get("image_root", ""), "a path")
    except UserError as error:
        return str(error)
    if unknown := set(part) - {"path", "image_root", *shares}:
        return f"{', '.join(sorted(unknown))} is unknown; there are path, image_root, {', '.join(shares)}"
    given = [name for name in shares if name in part]
    if len(given) > 1:
        return f"give one of {' and '.join(given)}"
    if given and (isinstance(part[given[0]], bool) or not shares[given[0]](part[given[0]])):
        return f"{given[0]} must be a positive {'whole number' if given[0] == 'count' else 'number'}"
    return None
