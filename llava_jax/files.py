"""Files that are complete or absent, and small files of a user, read with errors that name them."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from llava_jax.errors import FULL, UserError, user_path

LARGEST_SMALL_FILE = 2**28
"""Bytes of a small file (a configuration, an index, a table of prices) at most; a larger one is a wrong file."""


HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
"""Part of the names of temporary files: whose they are."""

ABANDONED = 24 * 3600.0
"""Seconds after which what another host was writing, and has not touched, is a leftover: its locks are unseen here."""

_cleaned: set[str] = set()


@contextlib.contextmanager
def making(path: str, folder: bool = False) -> Iterator[str]:
    """Makes a hidden file or folder beside `path`, for the caller to rename; what is still there at the end is removed.

    What killed processes have left of `path` goes first, never that of a process which lives.
    """
    remove_leftovers(path)
    place, name = os.path.split(os.path.realpath(path))
    lock = None
    while lock is None:
        temporary = os.path.join(place, f".{_short(name)}.{HOST}.{secrets.token_hex(4)}.tmp")
        if folder:
            os.mkdir(temporary)
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        lock = _lock(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


def remove_leftovers(path: str) -> None:
    """Removes what killed processes have left of a file or folder that they were making at `path`.

    It looks once for each path, since some folders are large.
    """
    place, name = os.path.split(os.path.realpath(path))
    if os.path.join(place, name) in _cleaned:
        return
    _cleaned.add(os.path.join(place, name))
    pattern = re.compile(re.escape(f".{_short(name)}.") + r"([0-9a-f]{6})\.[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.listdir(place):
            if match := pattern.fullmatch(entry):
                _remove_if_left(os.path.join(place, entry), match[1])


def _remove_if_left(temporary: str, host: str) -> None:
    with contextlib.suppress(OSError):
        if host != HOST and time.time() - _newest(temporary) < ABANDONED:
            return
        held = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its process lives
            _remove(temporary)
        finally:
            os.close(held)


def _lock(temporary: str) -> int | None:
    """Locks a temporary file or folder as long as the number that is returned is open; the kernel drops the lock of a
    process that is killed. None if another process has taken it for a leftover just before."""
    held = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:  # a file system without locks
        pass
    if os.path.exists(temporary) and os.path.samestat(os.stat(temporary), os.fstat(held)):
        return held
    os.close(held)
    return None


def _remove(temporary: str) -> None:
    if os.path.isdir(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _newest(temporary: str) -> float:
    """The time of the last change of a file, or of any in a folder."""
    entries = [os.path.join(temporary, name) for name in os.listdir(temporary)] if os.path.isdir(temporary) else []
    return max(os.stat(path).st_mtime for path in (temporary, *entries))


def _short(name: str) -> str:
    """The beginning of a name, which leaves room for what is put around it."""
    return name.encode()[:200].decode(errors="ignore")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Opens a file to write that appears at `path` when it is complete; after an error nothing is left of it.

    Raises UserError that names `path` if its folder is missing or may not be written, or if the disk is full.
    """
    try:
        with contextlib.ExitStack() as stack:
            with user_path(path, missing="no such folder"):
                part = stack.enter_context(making(path))
                file = open(part, "wb")  # noqa: SIM115
            with file:
                yield file
            with user_path(path):  # a folder of that name
                os.replace(part, os.path.realpath(path))
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise UserError(f"{path}: {error.strerror}; make room") from error
        raise


def read_text(path: str | os.PathLike, missing: str = "no such file", encoding: str = "utf-8") -> str:
    """Reads a small text file. Raises UserError that names it if it is missing, forbidden, too large or no UTF-8."""
    with user_path(path, missing):
        # epath's paths open gs:// as well.
        with path.open("rb") if hasattr(path, "open") else open(path, "rb") as file:
            content = file.read(LARGEST_SMALL_FILE + 1)
    check_fetched(path, content)
    if len(content) > LARGEST_SMALL_FILE:
        raise UserError(f"{path}: more than {LARGEST_SMALL_FILE:,} bytes; this is another file than is needed here")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is no UTF-8: damaged, or no text file") from None


def check_fetched(path: str | os.PathLike, content: bytes) -> None:
    """Raises UserError if a file that begins with `content` is a Git LFS pointer, which stands for the file."""
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch that by `git lfs pull` or hf download")


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = dict, missing: str = "no such file") -> Any:
    """Reads a small JSON file whose top level is of `kind`.

    Raises UserError that names it if it is missing, no UTF-8, no JSON, nested without end, or of another kind.
    """
    return parse_json(read_text(path, missing, "utf-8-sig"), str(path), kind)


def parse_json(text: str, name: str, kind: type | tuple[type, ...] = dict) -> Any:
    """Reads JSON whose top level is of `kind`. Raises UserError that begins with `name` for any other text."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or a number of too many digits
        raise UserError(f"{name}: not JSON ({error})") from None
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join({dict: "an object", list: "a list", str: "a text"}.get(k, k.__name__) for k in kinds)
        raise UserError(f"{name}: must be {names}, and is {json_type(value)}")
    return value


def require_fields(row: Any, kinds: Mapping[str, type | tuple[type, ...]], name: str) -> None:
    """Raises UserError that begins with `name` unless `row` is an object whose fields are of these kinds.

    A number must be below 2**63, and true and false are none. Other fields than those of `kinds` are not looked at.
    """
    if not isinstance(row, dict):
        raise UserError(f"{name}: must be an object, and is {json_type(row)}")
    for field, kind in kinds.items():
        kind = kind if isinstance(kind, tuple) else (kind,)
        if field not in row and type(None) not in kind:
            raise UserError(f"{name}: {field!r} is missing")
        value = row.get(field)
        fits = isinstance(value, kind) and (not isinstance(value, bool) or bool in kind)
        absurd = isinstance(value, int | float) and not abs(value) < 2.0**63  # nan too
        if not fits or absurd:
            shown = f"{value!r:.60}" if isinstance(value, int | float | str) else json_type(value)
            raise UserError(f"{name}: {field!r} is {shown}, which it cannot be")


def show_json(value: Any, most: int = 60) -> str:
    """A JSON value for a message: as it would be written, safe for a terminal and cut where it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # nested without end; a number of too many digits
        return json_type(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def json_type(value: Any) -> str:
    """The name of a JSON value's type, for messages: "an object", "a list", "a text", "a number", ..."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), "a number")


def matches_schema(value: Any, schema: Any) -> bool:
    """Whether a JSON value matches a schema.

    A schema is a type, a list with the schema of all items, or an object with the schemas of required keys. True and
    False match `bool` alone.
    """
    if isinstance(schema, list):
        return isinstance(value, list) and all(matches_schema(item, schema[0]) for item in value)
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(
            key in value and matches_schema(value[key], item) for key, item in schema.items())
    return isinstance(value, schema) and (schema is bool or not isinstance(value, bool))


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number, from 1, and the object of every line that is not blank. Raises UserError for other lines."""
    with user_path(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise UserError(f"{path}, line {number}: broken JSON (nested too deeply)") from None
            except ValueError as error:  # invalid UTF-8 as well
                raise UserError(f"{path}, line {number}: broken JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, row


def write_file(path: str, content: bytes | str) -> None:
    """Writes a whole file at once. Halves of surrogate pairs, which UTF-8 cannot hold, are escaped as JSON does it."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def write_json_lines(path: str, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, all of them at once."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_folder(path: str) -> None:
    """Creates a folder and its parents. Raises UserError if that is forbidden, or if a file has the name."""
    with user_path(path):
        os.makedirs(path, exist_ok=True)
