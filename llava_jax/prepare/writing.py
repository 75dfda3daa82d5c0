"""Writes stored rows to JSON, JSON-lines or parquet files, which are complete or absent."""

import contextlib
import functools
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from llava_jax.data.fields import VIDEOS
from llava_jax.data.parquet_rows import ParquetRows
from llava_jax.data.sources import Source
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError
from llava_jax.files import temporary_path

PART_KEYS = ("image", "image_url", "video", "video_url")
"""Types of parts with an image or a video, which is under a key of the same name, or under url or path."""
FORMATS = ("json", "jsonl", "parquet")
ROW_GROUP = 100
"""Number of parquet rows that are read together; Hugging Face uses 100 for rows with images."""

Rows = Callable[[], Iterable[tuple[int, Any]]]
"""Function that yields every row with the index of its output."""


def check_outputs(outputs: Sequence[str], inputs: Sequence[str], overwrite: bool) -> None:
    """Raises UserError for an output of unknown format, that is an input or inside one, or that exists."""
    for output in outputs:
        if _suffix(output) not in FORMATS:
            raise UserError(f"{output}: the name must end in {', '.join('.' + name for name in FORMATS)}")
        for path in inputs:
            folder = path if os.path.isdir(path) else path.rpartition(":")[0]
            inside = os.path.isdir(folder) and _is_inside(output, folder)
            if inside or (os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path)):
                raise UserError(f"{output}: is read as part of {path}; write to another place")
        check_absent(output, overwrite)


def check_absent(path: str, overwrite: bool) -> None:
    """Raises UserError if `path` is a folder, or a file that may not be overwritten."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: exists already; add --overwrite to replace it")


def write_rows(rows: Rows, outputs: Sequence[str], sources: Sequence[Source]) -> None:
    """Writes every row of `rows()` to its output. All outputs appear at the end, or none.

    For parquet outputs `rows()` is iterated twice, first to find the types of the columns, unless all `sources` are
    parquet. Raises UserError for rows that the format cannot hold.
    """
    temporaries, writers = [], []
    schema = _schema(sources, rows) if any(_suffix(output) == "parquet" for output in outputs) else None
    with contextlib.ExitStack() as stack:
        for output in outputs:
            os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
            temporaries.append(stack.enter_context(temporary_path(output)))
            file = stack.enter_context(open(temporaries[-1], "wb"))
            writers.append(_WRITERS[_suffix(output)](file, schema))
            stack.push(writers[-1].abort)
        for index, row in rows():
            writers[index].write(row)
        for writer in writers:
            writer.close()
        for temporary, output in zip(temporaries, outputs, strict=True):
            os.replace(temporary, output)


def common_root(sources: Sequence[Source]) -> str:
    """Returns the common folder of the image roots of all sources, or "" if all are TFDS sets, which hold images."""
    roots = [source.image_root for source in sources if not isinstance(source.rows, TfdsRows)]
    return os.path.commonpath(roots) if roots else ""


def move_images(row: Any, source: Source, root: str) -> Any:
    """Returns the row with image paths relative to `root`, the common root of several sources."""
    if source.image_root == root or isinstance(source.rows, TfdsRows):
        return row
    prefix = os.path.relpath(source.image_root, root).replace(os.sep, "/")
    return map_images(row, lambda image: posixpath.join(prefix, image) if is_path(image) else image)


def is_path(image: str | bytes) -> bool:
    """Returns whether an image of a row is a path, not the image itself or a URL."""
    return isinstance(image, str) and not re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+://", image, re.IGNORECASE)


def map_images(row: Any, change: Callable[[str | bytes], str | bytes]) -> Any:
    """Returns a copy of a row with `change(image)` for every image or video, which is a path, a URL or bytes.

    The row may be of any format, and may be invalid.
    """
    if not isinstance(row, Mapping):
        return row
    row = dict(row)
    for key in ("image", "images", *VIDEOS):
        if key in row:
            row[key] = _map_value(row[key], change)
    for key in ("messages", "conversations", "conversation"):
        if isinstance(row.get(key), list):
            row[key] = [_map_turn(turn, change) for turn in row[key]]
    return row


def _map_turn(turn: Any, change: Callable) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    return {key: [_map_part(part, change) for part in value] if isinstance(value, list) else value
            for key, value in turn.items()}


def _map_part(part: Any, change: Callable) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in PART_KEYS:
        return part
    if isinstance(part.get("base64"), str):  # has priority, as in records.py
        change(f"data:;base64,{part['base64']}")
        return part
    return {key: _map_value(value, change) if key in (*PART_KEYS, "url", "path") else value
            for key, value in part.items()}


def _map_value(value: Any, change: Callable) -> Any:
    if isinstance(value, list | tuple):
        return [_map_one(item, change) for item in value]
    return _map_one(value, change)


def _map_one(value: Any, change: Callable) -> Any:
    if isinstance(value, Mapping):
        used = next((key for key in ("bytes", "path", "url") if value.get(key)), None)
        return {key: _map_one(item, change) if key == used and isinstance(item, str | bytes) else item
                for key, item in value.items()}
    return change(value) if value and isinstance(value, str | bytes) else value


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _is_inside(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


class _JsonWriter:
    def __init__(self, before: bytes, between: bytes, after: bytes, file: BinaryIO, schema: Any):
        self.file, self.separator, self.between, self.after = file, before, between, after

    def write(self, row: Any) -> None:
        self.file.write(self.separator + _dump(row))
        self.separator = self.between

    def close(self) -> None:
        self.file.write(self.after)
        self.file.close()

    def abort(self, *_: Any) -> None:
        """Does nothing: an incomplete file needs no more text."""


class _ParquetWriter:
    def __init__(self, file: BinaryIO, schema: Any):
        import pyarrow.parquet

        self.file, self.schema, self.rows = file, schema, []
        with _one_line():
            self.writer = pyarrow.parquet.ParquetWriter(file, schema)

    def write(self, row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.writer.close()
        self.file.close()

    def abort(self, *_: Any) -> None:
        """Closes pyarrow's writer, which would otherwise write to a closed file when it is deleted."""
        with contextlib.suppress(Exception):
            self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(_table(self.rows, self.schema))
        self.rows = []


_WRITERS = {"json": functools.partial(_JsonWriter, b"[\n", b",\n", b"\n]\n"),
            "jsonl": functools.partial(_JsonWriter, b"", b"\n", b"\n"), "parquet": _ParquetWriter}


def _dump(row: Any) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a UTF-16 pair, which only an escape can hold
        return json.dumps(row).encode()
    except TypeError:
        raise UserError("the rows hold images themselves, dates or other values that JSON cannot: write to a .parquet "
                         "file (split: --format parquet), or make a TFDS data set with prepare pack") from None


def _schema(sources: Sequence[Source], rows: Rows) -> Any:
    import pyarrow
    import pyarrow.parquet

    if all(isinstance(source.rows, ParquetRows) for source in sources):
        found = [pyarrow.parquet.read_schema(file) for source in sources for file in source.files]
    else:
        found, batch = [], []
        for _, row in rows():
            batch.append(row)
            if len(batch) == ROW_GROUP:
                found, batch = [_unify([*found, _table(batch).schema])], []
        found += [_table(batch).schema] if batch else []
    return _unify(found)


def _unify(schemas: list[Any]) -> Any:
    import pyarrow

    with _one_line():
        return pyarrow.unify_schemas(schemas, promote_options="permissive")


def _table(rows: list[Any], schema: Any = None) -> Any:
    import pyarrow

    with _one_line():
        # Table.from_pylist would take the columns from the first row and drop those that come later.
        structs = pyarrow.array(rows, pyarrow.struct(list(schema)) if schema else None)
        return pyarrow.Table.from_struct_array(structs).replace_schema_metadata(schema.metadata if schema else None)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns an error of pyarrow into a UserError of one line."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OverflowError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the rows do not fit the columns of a parquet file ({reason}); write .jsonl") from None
