"""Writes files atomically, and reads small files with errors that name them."""

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
from pathlib import Path
from typing import Any, BinaryIO

from llava_jax.errors import DISK_FULL_ERRNOS, UserError, user_path

LARGEST_SMALL_FILE = 2**28
"""Maximum size in bytes of a small file, such as a configuration or an index."""

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
"""Part of the names of temporary files: a hash of the host that wrote them."""

ABANDONED_SECONDS = 24 * 3600.0
"""Seconds without a change after which a temporary file of another host is a leftover. Its locks are not seen here."""

_cleaned: set[str] = set()


@contextlib.contextmanager
def temporary_path(path: str, folder: bool = False) -> Iterator[str]:
    """Creates a hidden file or folder beside `path`, for the caller to rename. It is removed at the end if it exists.

    Temporary files that killed processes have left of `path` are removed first, never those of a living process.
    """
    remove_leftovers(path)
    parent, name = os.path.split(os.path.realpath(path))
    lock = None
    while lock is None:
        temporary = os.path.join(parent, f".{_short(name)}.{HOST}.{secrets.token_hex(4)}.tmp")
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
    """Removes temporary files and folders that killed processes have left of `path`.

    It lists the folder once for each path, because some folders are large.
    """
    parent, name = os.path.split(os.path.realpath(path))
    if os.path.join(parent, name) in _cleaned:
        return
    _cleaned.add(os.path.join(parent, name))
    pattern = re.compile(re.escape(f".{_short(name)}.") + r"([0-9a-f]{6})\.[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.listdir(parent):
            if match := pattern.fullmatch(entry):
                _remove_if_left(os.path.join(parent, entry), match[1])


def _remove_if_left(temporary: str, host: str) -> None:
    with contextlib.suppress(OSError):
        if host != HOST and time.time() - _newest(temporary) < ABANDONED_SECONDS:
            return
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process is alive
            _remove(temporary)
        finally:
            os.close(handle)


def _lock(temporary: str) -> int | None:
    """Locks a temporary file or folder, and returns the handle that keeps the lock while it is open.

    The kernel drops the lock of a process that is killed. Returns None if another process has just removed the file.
    """
    try:
        handle = os.open(temporary, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        pass
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(temporary), os.fstat(handle)):
            return handle
    os.close(handle)
    return None


def _remove(temporary: str) -> None:
    if os.path.isdir(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _newest(temporary: str) -> float:
    """Returns the time of the last change of a file, or of any file in a folder."""
    entries = [os.path.join(temporary, name) for name in os.listdir(temporary)] if os.path.isdir(temporary) else []
    return max(os.stat(path).st_mtime for path in (temporary, *entries))


def _short(name: str) -> str:
    """Returns the start of a name, short enough that a prefix and a suffix can be added."""
    return name.encode()[:200].decode(errors="ignore")


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears at `path` when it is complete. After an error `path` is as before.

    Raises UserError that names `path` if its folder is missing or not writable, or if the disk is full.
    """
    try:
        with contextlib.ExitStack() as stack:
            with user_path(path, missing="no such folder"):
                temporary = stack.enter_context(temporary_path(path))
                file = open(temporary, "wb")  # noqa: SIM115
            with file:
                yield file
            with user_path(path):  # a folder of that name
                os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS and error.filename is None:
            raise UserError(f"{path}: {error.strerror}; make room") from error
        raise


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is one of a bucket (gs://...)."""
    return "://" in str(path)


def to_path(path: str | os.PathLike) -> Path:
    """Returns a local path, or the path-like object of a bucket (gs://...).

    Raises UserError if the package that reads from there is not installed.
    """
    if not is_remote(path):
        return Path(path)
    from etils import epath

    try:
        epath.Path(path).exists()  # the first call looks for the package
    except ImportError:
        raise UserError(f"{path}: reading from there needs one more package: pip install gcsfs") from None
    return epath.Path(path)


def read_text(path: str | os.PathLike, missing: str = "no such file", encoding: str = "utf-8") -> str:
    """Reads a small text file. Raises UserError that names it if it is missing, forbidden, too large or not UTF-8."""
    with user_path(path, missing):
        # epath's paths open gs:// as well.
        with path.open("rb") if hasattr(path, "open") else open(path, "rb") as file:
            content = file.read(LARGEST_SMALL_FILE + 1)
    check_fetched(path, content)
    if len(content) > LARGEST_SMALL_FILE:
        raise UserError(f"{path}: more than {LARGEST_SMALL_FILE:,} bytes, so it is not the file that is expected here")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8: damaged, or not a text file") from None


def check_fetched(path: str | os.PathLike, content: bytes) -> None:
    """Raises UserError if `content`, the start of a file, is a Git LFS pointer."""
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: a Git LFS pointer, not the file; fetch it with `git lfs pull` or `hf download`")


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = dict, missing: str = "no such file") -> Any:
    """Reads a small JSON file whose top level is of `kind`.

    Raises UserError that names it if it is missing, not UTF-8, not JSON, nested too deeply, or of another kind.
    """
    return parse_json(read_text(path, missing, "utf-8-sig"), str(path), kind)


def parse_json(text: str, name: str, kind: type | tuple[type, ...] = dict) -> Any:
    """Parses JSON whose top level is of `kind`. Raises UserError that starts with `name` for any other text."""
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
    """Raises UserError that starts with `name` unless `row` is an object whose fields are of these kinds.

    Numbers must be below 2**63. True and false are not numbers. Further fields of `row` are ignored.
    """
    if not isinstance(row, dict):
        raise UserError(f"{name}: must be an object, and is {json_type(row)}")
    for field, kind in kinds.items():
        kind = kind if isinstance(kind, tuple) else (kind,)
        if field not in row and type(None) not in kind:
            raise UserError(f"{name}: {field!r} is missing")
        value = row.get(field)
        matches = isinstance(value, kind) and (not isinstance(value, bool) or bool in kind)
        too_large = isinstance(value, int | float) and not abs(value) < 2.0**63  # nan too
        if not matches or too_large:
            shown = f"{value!r:.60}" if isinstance(value, int | float | str) else json_type(value)
            raise UserError(f"{name}: {field!r} cannot be {shown}")


def show_json(value: Any, limit: int = 60) -> str:
    """Returns a JSON value as text for a message: safe for a terminal, and cut if it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return json_type(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def json_type(value: Any) -> str:
    """Returns the name of a JSON value's type for messages: "an object", "a list", "a text", "a number", ..."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), "a number")


def matches_schema(value: Any, schema: Any) -> bool:
    """Returns whether a JSON value matches a schema.

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
    """Yields line number, from 1, and object of every line that is not blank. Raises UserError for invalid lines."""
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


def sha256_of(path: str) -> str:
    """Returns the SHA-256 digest of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: str, content: bytes | str) -> None:
    """Writes a file atomically. Lone surrogates, which UTF-8 does not encode, are escaped as in JSON."""
    with atomic_write(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def write_json(path: str, value: Any, indent: int = 1) -> None:
    """Writes one JSON value, indented, atomically."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_json_lines(path: str, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, atomically."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_folder(path: str) -> None:
    """Creates a folder and its parents. Raises UserError if that is forbidden, or if a file has the name."""
    with user_path(path):
        os.makedirs(path, exist_ok=True)
