"""Files that are whole or not there, and that take nothing else's place."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

DOCTYPE = b"<!doctype html>"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when it is whole; nothing is left of it after an error.

    An OSError for want of room names `path`.
    """
    folder, name = os.path.split(os.path.realpath(path))
    part = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, os.path.join(folder, name))
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            error.filename = path
        raise


def check_page(path: str) -> None:
    """Raises ValueError, one line, if an HTML page at `path` would take the place of something else."""
    if not os.path.exists(path):
        return
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(len(DOCTYPE)).lower() in (b"", DOCTYPE):
                return
    raise ValueError(f"{path}: there is something else than a page; give --output another name")
