"""Stores every answer that was paid for in a log."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llava_jax.endpoint.request import Response
from llava_jax.errors import UserError
from llava_jax.json_lines import JsonLinesFile


class AnswerLog:
    """Maps keys of requests to their responses, on disk. Memory keeps the offset of each line.

    A line is {"key": str, "reply": {...}, "note": {...}}. The log does not store requests, because a key finds its
    response again.

    Attributes:
      path: Path of the file, which is created if it is missing.
      dropped: Number of bytes of an incomplete last line, which opening to write removes.
      damaged: Numbers, from 1, of lines that cannot be read. Their requests are asked again.

    Raises UserError if another process has the log open to write, or if a reader finds no file.
    """

    def __init__(self, path: str, read_only: bool = False):
        self.path, self.damaged = path, list[int]()
        self._offsets: dict[bytes, int] = {}
        self._file = JsonLinesFile(path, read_only)
        self.dropped = self._file.dropped
        for number, (offset, line) in enumerate(self._file.lines(), 1):
            key = _key(line)
            if key is None:
                self.damaged.append(number)
            else:
                self._offsets.setdefault(key, offset)

    def append(self, key: str, reply: Response, note: Mapping[str, Any] | None = None) -> None:
        """Writes a response; `note` is for people who read the file.

        Raises UserError if the disk is full, which leaves the log as it was, and for a key that is invalid or known.
        """
        if key in self:
            raise UserError(f"{self.path}: holds {key} already")
        if len(key) != 64:
            raise UserError(f"{self.path}: {key!r:.80} is no key")
        record = {"key": key, "reply": dataclasses.asdict(reply)} | ({"note": dict(note)} if note else {})
        self._offsets[bytes.fromhex(key)] = self._file.append(record)

    def items(self) -> Iterator[tuple[str, Response]]:
        """Yields keys and responses in the order in which they were written."""
        for key in list(self._offsets):
            yield key.hex(), self[key.hex()]

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._offsets

    def __getitem__(self, key: str) -> Response:
        return Response.from_json(self._file.read(self._offsets[bytes.fromhex(key)])["reply"])

    def __len__(self) -> int:
        return len(self._offsets)

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _key(line: bytes) -> bytes | None:
    """Returns the key of a line, or None if the line is no complete record."""
    try:
        record = json.loads(line)
        Response.from_json(record["reply"])
        key = bytes.fromhex(record["key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if len(key) == 32 else None
