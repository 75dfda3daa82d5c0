"""Stores the numbers of tokens and tiles of all records, which is all that packing needs, beside the data.

With several processes each measures its share of the records, and process 0 alone reads and writes the files.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from llava_jax.data.examples import DataSpec
from llava_jax.data.records import REASONS
from llava_jax.data.sources import Source
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError
from llava_jax.files import atomic_write
from llava_jax.text import agreement

VERSION = 1
"""Version of the files. It changes when a conversation gets other tokens, or an image other tiles."""
EXCHANGED_RECORDS = 2**18
"""Largest number of records whose lengths one message contains."""
TRANSIENT = ("missing_image", "broken_image", "too_long", "malformed")
"""Reasons that are not stored, because they can change without a change that the hash notices. Image files can be
mended or made smaller, and damaged shards of a TFDS data set replaced."""

Allgather = Callable[[str, Any], list]
"""Function that returns the value of every process, as `parallel.processes.allgather_object` does."""


class Lengths:
    """Lengths of the records of a mixture: numbers of tokens and tiles, or the reason why a record cannot be used.

    `lengths[numbers]` is int32 [records, 2]. Instead of tokens it has -1 - i for the reason REASONS[i], and 0 for a
    record that is not measured. With `allgather` all processes call the methods in the same order; without it
    a process measures all records that it needs.

    The lengths of a source are stored in `.NAME.lengths-SETTINGS` beside its first file. That starts with a hash over
    them, size and time of the data files, tokenizer, template, processor and all other settings. A file with another
    hash is damaged or of other data, so it is ignored and replaced. If it cannot be written, stderr gets one line.
    """

    def __init__(self, spec: DataSpec, process_index: int = 0, process_count: int = 1,
                 allgather: Allgather | None = None):
        self.spec, self.allgather = spec, allgather
        self.index, self.count = (process_index, process_count) if allgather else (0, 1)
        self._starts = spec.mixture.starts
        self._table = np.zeros((self._starts[-1], 2), np.int32)
        self._fingerprints = [_fingerprint(spec, source) for source in spec.mixture.sources]
        self._changed: set[int] = set()
        for number in range(len(self._fingerprints)) if self.index == 0 else ():
            self._load(number)
        if self.count > 1:
            self._exchange()

    def _exchange(self) -> None:
        """Sends what process 0 has loaded to all processes. Raises UserError if they have other data files."""
        files = json.dumps([stamp[:2] for _, *stamps in self._fingerprints for stamp in stamps]).encode()
        files = self.allgather("the data files", hashlib.sha256(files).hexdigest())
        if wrong := [index for index, theirs in enumerate(files) if theirs != files[0]]:
            raise UserError(f"{self.spec.mixture.name}: the data files of process {wrong[0]} have other names or sizes "
                            "than those of process 0")
        for first in range(0, len(self._table), EXCHANGED_RECORDS):
            part = self._table[first : first + EXCHANGED_RECORDS]
            part[:] = _decode(self.allgather("the stored lengths", _encode(part) if self.index == 0 else None)[0])

    def __getitem__(self, numbers: Sequence[int]) -> np.ndarray:
        return self._table[numbers]

    def unknown(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns those of the records, ascending, that are not measured."""
        numbers = np.unique(np.asarray(numbers, np.int64))
        return numbers[self._table[numbers, 0] == 0]

    def share(self, numbers: np.ndarray) -> list[int]:
        """Returns the records that this process measures."""
        bounds = [len(numbers) * i // self.count for i in (self.index, self.index + 1)]
        return numbers[slice(*bounds)].tolist()

    def add(self, numbers: np.ndarray, found: Sequence[tuple[int, int] | str]) -> None:
        """Adds the lengths of records, of which `found` has this process's share: tokens and tiles, or the reason."""
        if not len(numbers):
            return
        rows = [(-1 - REASONS.index(row), 0) if isinstance(row, str) else row for row in found]
        own = np.array(rows, np.int32).reshape(-1, 2)
        if self.count > 1:
            own = np.concatenate([*map(_decode, self.allgather("the lengths of the records", _encode(own)))])
        self._table[numbers] = own
        self._changed |= {*(np.searchsorted(self._starts, numbers, "right") - 1).tolist()}

    def save(self) -> None:
        """Writes the lengths of sources that have new ones."""
        for number in sorted(self._changed) if self.index == 0 else ():
            table = self._rows(number).copy()
            table[np.isin(table[:, 0], [-1 - REASONS.index(reason) for reason in TRANSIENT])] = 0
            try:
                _write(self.path(number), self._hash(number, table.tobytes()) + table.tobytes())
            except Exception as error:  # gcsfs has its own; training needs no file
                line = " ".join(str(error).split())[:200]
                agreement.say(f"the lengths of the records stay in memory alone: {line}")
        self._changed.clear()

    def describe_change(self, number: int) -> str:
        """Returns a message for a record that has another length now."""
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        where = self.spec.mixture.sources[part].where(number - self._starts[part])
        return (f"{where}: has other numbers of tokens or tiles than when it was measured, as after a change of its "
                f"images; remove {self.path(part)}, if it is there, and run again")

    def path(self, number: int) -> str:
        """Returns the path of the file with the lengths of a source."""
        folder, name = os.path.split(self.spec.mixture.sources[number].files[0])
        return os.path.join(folder, f".{name}.lengths-{self._fingerprints[number][0][:8]}")

    def _load(self, number: int) -> None:
        table = self._rows(number)
        with contextlib.suppress(Exception):  # a missing or damaged file; gcsfs has errors of its own
            content = epath.Path(self.path(number)).read_bytes()
            if content[:32] == self._hash(number, content[32:]):
                table[:] = np.frombuffer(content[32:], np.int32).reshape(table.shape)
        if self.spec.bad_rows == "error":
            table[table[:, 0] < 0] = 0  # measured again, which raises their error

    def _rows(self, number: int) -> np.ndarray:
        return self._table[self._starts[number] : self._starts[number + 1]]

    def _hash(self, number: int, content: bytes) -> bytes:
        return hashlib.sha256(json.dumps(self._fingerprints[number]).encode() + content).digest()


def _fingerprint(spec: DataSpec, source: Source) -> tuple:
    """Returns a hash of the settings that lengths depend on, and name, size and time of every data file."""
    settings = {field.name: repr(getattr(spec, field.name)) for field in dataclasses.fields(spec)
                if field.name not in ("mixture", "tokenizer", "bad_rows")}
    folder = os.path.dirname(source.files[0])
    root = os.path.relpath(source.image_root, os.path.abspath(folder))
    hashed = hashlib.sha256(json.dumps([VERSION, root, spec.tokenizer.fingerprint, settings]).encode()).hexdigest()
    # TFDS writes dataset_info.json last, and a set may have thousands of shards in a bucket.
    files = [f"{folder}/dataset_info.json"] if isinstance(source.rows, TfdsRows) else source.files
    return hashed, *map(_stamp, files)


def _stamp(file: str) -> tuple[str, int, int]:
    """Returns name, size and time of a data file."""
    if "://" in file:
        status = epath.Path(file).stat()
        return os.path.basename(file), status.length, status.mtime
    status = os.stat(file)
    return os.path.basename(file), status.st_size, status.st_mtime_ns


def _write(path: str, content: bytes) -> None:
    if "://" in path:
        epath.Path(path).write_bytes(content)  # a bucket shows a file when it is complete
        return
    with atomic_write(path) as file:
        file.write(content)


def _encode(lengths: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(lengths).tobytes(), 1)).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int32).reshape(-1, 2)
