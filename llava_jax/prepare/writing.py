"""Rows written to data files as they are stored: JSON, JSON lines or parquet; a file appears when it is whole."""

import contextlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llava_jax.data.parquet_rows import ParquetRows
from llava_jax.data.sources import Source
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError
from llava_jax.files import making

FORMATS = ("json", "jsonl", "parquet")
ROW_GROUP = 100  # rows of parquet that are read together: as few as Hugging Face has for rows with images


def check_outputs(outputs: Sequence[str], inputs: Sequence[str], overwrite: bool) -> None:
    """UserError, one line, for an output of no known format, that is an input or within one, or that exists."""
    for output in outputs:
        if _suffix(output) not in FORMATS:
            raise UserError(f"{output}: the name must end in {', '.join('.' + name for name in FORMATS)}")
        for given in inputs:
            folder = given if os.path.isdir(given) else given.rpartition(":")[0]
            within = os.path.isdir(folder) and _is_within(output, folder)
            if within or (os.path.exists(output) and os.path.exists(given) and os.path.samefile(output, given)):
                raise UserError(f"{output}: is read as part of {given}; write to another place")
        if os.path.isdir(output):
            raise UserError(f"{output}: is a folder; name a file")
        if os.path.lexists(output) and not overwrite:
            raise UserError(f"{output}: exists already; add --overwrite to replace it")


Rows = Callable[[], Iterable[tuple[int, Any]]]  # a row, and the number of the output that it is for


def write_rows(rows: Rows, outputs: Sequence[str], sources: Sequence[Source]) -> None:
    """Writes each of `rows()` to its output. All outputs appear at the end, or none.

    For parquet the rows are gone through once before, to find the types of the columns, unless the `sources` that they
    come from are all parquet. Raises UserError, one line, for rows that the format cannot hold.
    """
    made, writers, stack = [], [], contextlib.ExitStack()
    try:
        schema = _schema(sources, rows) if any(_suffix(output) == "parquet" for output in outputs) else None
        for output in outputs:
            os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
            made.append(stack.enter_context(making(output)))
            writers.append(_WRITERS[_suffix(output)](made[-1], schema))
        for which, row in rows():
            writers[which].write(row)
        for writer in writers:
            writer.close()
        for temporary, output in zip(made, outputs, strict=True):
            os.replace(temporary, output)
    except BaseException:
        for writer in writers:
            with contextlib.suppress(Exception):
                writer.close()
        raise
    finally:
        stack.close()


def common_root(sources: Sequence[Source]) -> str:
    """The folder that holds the image roots of all sources; "" if these are TFDS data sets, which hold their images."""
    roots = [source.image_root for source in sources if not isinstance(source.rows, TfdsRows)]
    return os.path.commonpath(roots) if roots else ""


def move_images(row: Any, source: Source, root: str) -> Any:
    """The row with its image paths relative to `root`, the common root of its source and others."""
    if source.image_root == root or isinstance(source.rows, TfdsRows):
        return row
    prefix = os.path.relpath(source.image_root, root).replace(os.sep, "/")
    return map_images(row, lambda image: posixpath.join(prefix, image) if is_path(image) else image)


def is_path(image: str | bytes) -> bool:
    """Whether an image of a row is a path, and neither the image itself nor on the network."""
    return isinstance(image, str) and not re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+://", image, re.IGNORECASE)


def map_images(row: Any, change: Callable[[str | bytes], str | bytes]) -> Any:
    """A copy of a row of any format, valid or not, in which `change` has replaced each image: a path, URL, or bytes."""
    if not isinstance(row, Mapping):
        return row
    row = dict(row)
    for key in ("image", "images"):
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
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return part
    if isinstance(part.get("base64"), str):  # goes before all else, as in records.py
        change(f"data:;base64,{part['base64']}")
        return part
    return {key: _map_value(value, change) if key in ("image_url", "url", "path", "image") else value
            for key, value in part.items()}


def _map_value(value: Any, change: Callable) -> Any:
    if isinstance(value, list | tuple):
        return [_map_one(one, change) for one in value]
    return _map_one(value, change)


def _map_one(value: Any, change: Callable) -> Any:
    if isinstance(value, Mapping):
        used = next((key for key in ("bytes", "path", "url") if value.get(key)), None)
        return {key: _map_one(one, change) if key == used and isinstance(one, str | bytes) else one
                for key, one in value.items()}
    return change(value) if value and isinstance(value, str | bytes) else value


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _is_within(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


class _JsonList:
    before, between, after = b"[\n", b",\n", b"\n]\n"

    def __init__(self, path: str, _: Any):
        self.file, self.separator = open(path, "wb"), self.before  # noqa: SIM115

    def write(self, row: Any) -> None:
        self.file.write(self.separator + _dump(row))
        self.separator = self.between

    def close(self) -> None:
        if not self.file.closed:
            self.file.write(self.after)
            self.file.close()


class _JsonLines(_JsonList):
    before, between, after = b"", b"\n", b"\n"


class _Parquet:
    def __init__(self, path: str, schema: Any):
        import pyarrow.parquet

        self.schema, self.rows = schema, []
        with _one_line():
            self.writer = pyarrow.parquet.ParquetWriter(path, schema)

    def write(self, row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(_table(self.rows, self.schema))
        self.rows = []


_WRITERS = {"json": _JsonList, "jsonl": _JsonLines, "parquet": _Parquet}


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
        # Not Table.from_pylist, which takes the columns from the first row and drops what others have besides.
        structs = pyarrow.array(rows, pyarrow.struct(list(schema)) if schema else None)
        return pyarrow.Table.from_struct_array(structs).replace_schema_metadata(schema.metadata if schema else None)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns what pyarrow raises into one line."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OverflowError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the rows do not fit the columns of a parquet file ({reason}); write .jsonl") from None
