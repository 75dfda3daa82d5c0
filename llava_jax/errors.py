"""Defines UserError, an error that a user can fix. Other errors are faults of the machine or of this code."""

import contextlib
import errno
import os
from collections.abc import Iterator

USER_ERRNOS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
               errno.EEXIST, errno.EROFS, errno.EINVAL, errno.ENXIO)
"""OSError codes that a wrong path causes. EIO, ESTALE and ENOMEM are not among them: they are the machine's."""

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""OSError codes of a full disk or quota."""


class UserError(ValueError):
    """Raised with one line that names the file, row or field, and how to fix it.

    A command prints that line and exits with code 2, and no launcher retries. Raise it only if the cause is known.
    """


class NoHfForm(UserError):
    """Raised if no model of transformers computes the same function, so that Hugging Face's layout has no form for it.

    The native layout has one.
    """


@contextlib.contextmanager
def user_path(path: str | os.PathLike, missing: str = "no such file") -> Iterator[None]:
    """Raises UserError that names `path` if the block fails because of the path or a full disk.

    Use it where a user's path is opened for the first time. Other OSErrors (EIO, ESTALE, ...) pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT or isinstance(error, FileNotFoundError):  # those of buckets have no number
            raise UserError(f"{path}: {missing}") from error
        if error.errno in DISK_FULL_ERRNOS:
            raise UserError(f"{path}: {error.strerror}; make room") from error
        if error.errno in USER_ERRNOS:
            raise UserError(f"{path}: {error.strerror}") from error
        raise
    except ValueError as error:
        if isinstance(error, UserError) or _is_possible(str(path)):
            raise
        raise UserError(f"{str(path)!r}: no file can have this name") from error


def _is_possible(path: str) -> bool:
    """Returns whether a file can have this path. NUL and lone surrogates, which JSON can contain, are impossible."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
