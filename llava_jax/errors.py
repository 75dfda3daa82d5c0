"""UserError: what a user can mend. Every other error is a fault of the machine or of this code."""

import contextlib
import errno
import os
from collections.abc import Iterator

MISTAKES = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
            errno.EEXIST, errno.EROFS, errno.EINVAL, errno.ENXIO)
"""Codes of OSErrors that a wrong path causes. EIO, ESTALE, ENOMEM and their like are no mistake of the user."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of OSErrors that ask for more room."""


class UserError(ValueError):
    """Raised with one line that names the file, row or field, and how to mend it.

    A command prints that line and exits with code 2, and no launcher tries again. Raise it where the mistake is known;
    never wrap an error whose cause is not known in it.
    """


@contextlib.contextmanager
def user_path(path: str | os.PathLike, missing: str = "no such file") -> Iterator[None]:
    """Raises UserError that names `path` if the block fails because the path is missing, forbidden, a folder or full.

    Use it where a user's path is opened for the first time. An OSError of another kind (EIO, ESTALE, ...) passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise UserError(f"{path}: {missing}") from error
        if error.errno in FULL:
            raise UserError(f"{path}: {error.strerror}; make room") from error
        if error.errno in MISTAKES:
            raise UserError(f"{path}: {error.strerror}") from error
        raise
    except ValueError as error:
        if isinstance(error, UserError) or _is_possible(str(path)):
            raise
        raise UserError(f"{str(path)!r}: no file can have this name") from error


def _is_possible(path: str) -> bool:
    """Whether a file can have this path: it has no NUL and no half of a surrogate pair, which JSON can write."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
