"""Every answer that was paid for: a file of JSON lines that only grows."""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llava_jax.endpoint.request import Reply
from llava_jax.errors import FULL, UserError

LOCK_TRIES, LOCK_SECONDS = 10, 0.05  # `is_written` holds the lock for a moment, which must not refuse a writer
SYNC_SECONDS = 5.0  # between calls of fsync: what a crash of the machine, not of the process, can lose


class AnswerLog:
    """Replies by the keys of their requests, on disk; in memory is where each begins.

    A line is {"key": str, "reply": {...}, "note": {...}}. It is written at once and whole: the process may be killed at
    any moment and loses nothing that `append` returned from. What was asked is not in it: keys find it again.

    Attributes:
      path: of the file, which is made if it is not there.
      mended: bytes of a broken last line that were cut off on opening (a reader leaves and ignores it).
      damaged: numbers, from 1, of lines that cannot be read; they are passed over, so that their requests are asked
        again.

    Raises UserError if another process has the log open to write, UserError for a reader without a file.
    """

    def __init__(self, path: str, read_only: bool = False):
        self.path, self.mended, self.damaged = path, 0, list[int]()
        self._starts: dict[bytes, int] = {}
        self._file = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._reader = open(path, "rb")  # with a place of its own: appending moves the other's
        self._read_only = read_only
        self._synced = time.monotonic()
        try:
            if not read_only:
                self._lock()
            self._end = self._scan()
            if not read_only:
                self._mend()
        except BaseException:
            self._release()
            raise

    def append(self, key: str, reply: Reply, note: Mapping[str, Any] | None = None) -> None:
        """Writes a reply before anything else is done with it; `note` is for people who read the file.

        Raises OSError (a full disk) with the log as it was before, and UserError if the key is there or is none.
        """
        if key in self:
            raise UserError(f"{self.path}: holds {key} already")
        if len(key) != 64:
            raise UserError(f"{self.path}: {key!r:.80} is no key")
        record = {"key": key, "reply": dataclasses.asdict(reply)} | ({"note": dict(note)} if note else {})
        line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._end)
            if error.errno in FULL:
                raise UserError(f"{self.path}: {error.strerror}; an answer could not be kept; make room") from error
            raise
        self._starts[bytes.fromhex(key)] = self._end
        self._end += len(line)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def items(self) -> Iterator[tuple[str, Reply]]:
        """Keys and replies in the order in which they were written."""
        for key, start in list(self._starts.items()):
            yield key.hex(), self._read(start)

    def close(self) -> None:
        if not self._reader.closed:
            if not self._read_only:
                self._sync()
            self._release()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._starts

    def __getitem__(self, key: str) -> Reply:
        return self._read(self._starts[bytes.fromhex(key)])

    def __len__(self) -> int:
        return len(self._starts)

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _lock(self) -> None:
        for left in reversed(range(LOCK_TRIES)):
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not left:
                    raise UserError(f"{self.path}: another process is writing to it; wait until it ends") from None
            time.sleep(LOCK_SECONDS)

    def _scan(self) -> int:
        """Finds the records; returns where the last whole line ends."""
        end = 0
        for number, line in enumerate(self._reader, 1):
            key = _key(line)
            if key is not None:
                self._starts.setdefault(key, end)
            elif line.endswith(b"\n"):
                self.damaged.append(number)
            if key is None and not line.endswith(b"\n"):
                break
            end += len(line)
        return end

    def _mend(self) -> None:
        """Cuts a broken last line off, and ends one that only lacks its newline."""
        self.mended = os.fstat(self._file).st_size - self._end
        if self.mended:
            os.ftruncate(self._file, self._end)
        if self._end and os.pread(self._file, 1, self._end - 1) != b"\n":
            self._end += os.write(self._file, b"\n")

    def _read(self, start: int) -> Reply:
        self._reader.seek(start)
        return Reply.from_json(json.loads(self._reader.readline())["reply"])

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _release(self) -> None:
        self._reader.close()
        os.close(self._file)


def is_written(path: str) -> bool:
    """Whether a process has the log at `path` open to write."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _key(line: bytes) -> bytes | None:
    """The key of a line, or None if it is no whole record."""
    try:
        record = json.loads(line)
        Reply.from_json(record["reply"])
        key = bytes.fromhex(record["key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if len(key) == 32 else None
