"""Writes and reads a log of JSON lines: one process appends complete lines, any number of processes read."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from llava_jax.errors import DISK_FULL_ERRNOS, UserError, user_path

LOCK_TRIES, LOCK_SECONDS = 10, 0.05
"""Number of tries to lock a file, and seconds between them, because `is_written` has the lock for a moment."""

SYNC_SECONDS = 5.0
"""Seconds between calls of fsync. A crash of the machine, not of the process, can lose the lines of that time."""

BLOCK_BYTES = 2**16
"""Number of bytes that are read at once."""


class JsonLinesFile:
    """Appends JSON lines to a file as its only writer, or reads them while another process writes.

    A killed process loses no line that `append` has returned from. Opening to write drops an incomplete last line.

    Attributes:
      path: Path of the file. Opening to write creates a missing file.
      size: Number of bytes of the complete lines.
      dropped: Number of bytes of an incomplete last line. A reader ignores them and leaves them in the file.

    Raises UserError if another process has the file open to write, or if the path is missing or forbidden.
    """

    def __init__(self, path: str, read_only: bool = False):
        self.path, self.size, self.dropped = path, 0, 0
        self._read_only, self._synced = read_only, time.monotonic()
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND
        with user_path(path, "no such file" if read_only else "no such folder"):
            self._file: int | None = os.open(path, flags, 0o666)
        try:
            if not read_only:
                self._lock()
            self._check_end()
        except BaseException:
            self.close()
            raise

    def append(self, value: Any) -> int:
        """Writes one line and returns its offset. Raises UserError if the disk is full; the file is then as before."""
        line = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        offset, written = self.size, 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, offset)
            if error.errno in DISK_FULL_ERRNOS:
                raise UserError(f"{self.path}: {error.strerror}; a line could not be written, the lines before it are "
                                "kept; make room") from error
            raise
        self.size += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()
        return offset

    def read(self, offset: int) -> Any:
        """Returns the value of the line at an offset."""
        line = b""
        while b"\n" not in line and (block := os.pread(self._file, BLOCK_BYTES, offset + len(line))):
            line += block
        return json.loads(line.partition(b"\n")[0])

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the offset and the bytes of every complete line, without its newline."""
        offset, rest = 0, b""
        while block := os.pread(self._file, min(BLOCK_BYTES, self.size - offset - len(rest)), offset + len(rest)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield offset, line
                offset += len(line) + 1
        if rest:
            yield offset, rest

    def truncate(self, offset: int) -> None:
        """Drops the line at an offset and all lines after it."""
        os.ftruncate(self._file, offset)
        self.size = offset

    def close(self) -> None:
        if self._file is not None:
            if self.size and not self._read_only:
                os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "JsonLinesFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self) -> None:
        for remaining in reversed(range(LOCK_TRIES)):
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not remaining:
                    raise UserError(f"{self.path}: another process is writing to it; wait until it ends") from None
            time.sleep(LOCK_SECONDS)

    def _check_end(self) -> None:
        """Drops an incomplete last line, and completes a line that lacks only its newline."""
        size, tail = os.fstat(self._file).st_size, b""
        while len(tail) < size and b"\n" not in tail:
            length = min(size, max(BLOCK_BYTES, 4 * len(tail)))
            tail = os.pread(self._file, length, size - length)
        last = tail[tail.rfind(b"\n") + 1 :]
        self.dropped = 0 if is_json(last) else len(last)
        self.size = size - self.dropped
        if not self._read_only and self.dropped:
            os.ftruncate(self._file, self.size)
        elif not self._read_only and last:
            self.size += os.write(self._file, b"\n")


def is_json(line: bytes) -> bool:
    """Returns whether a line is JSON of any type."""
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def is_written(path: str) -> bool:
    """Returns whether a process has the file open to write."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
