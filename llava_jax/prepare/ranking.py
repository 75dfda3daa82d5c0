"""Orders and groups of rows that are reproducible: parts that share no image, samples, mixtures.

Rows are ordered by a hash of a seed and their content, not by their position. A sample of 100 rows is contained in the
sample of 1,000 with the same seed, and rows that are added to a file move only rows at the edges.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, Source
from llava_jax.errors import UserError
from llava_jax.prepare.progress import run_tasks
from llava_jax.prepare.writing import common_root, is_path, map_images

CHUNK_ROWS = 256
"""Number of rows in one task of a worker."""


@dataclasses.dataclass(frozen=True)
class Ranker:
    """Hashes rows with a seed; the hashes give their order."""

    mixture: Mixture
    seed: int
    by: Literal["row", "image"]

    def __call__(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns 64-bit hashes, and the number of the row of each: one hash per row, or one per image of a row.

        Raises UserError for a row that cannot be read.
        """
        rows, hashes, root = [], [], common_root(self.mixture.sources)
        for number, source, row in read_rows(self.mixture, numbers):
            contents = _images(row, source, root) if self.by == "image" else []
            for content in contents or [json.dumps(row, sort_keys=True, default=_plain)]:
                hashes.append(self._hash(content))
                rows.append(number)
        return rows, hashes

    def _hash(self, content: str | bytes) -> int:
        content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=str(self.seed).encode()).digest(), "big")


def rank(mixture: Mixture, numbers: np.ndarray, seed: int, by: Literal["row", "image"], workers: int
         ) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every hash of the rows, its index in `numbers`, and the hashes, uint64."""
    chunks = [numbers[start : start + CHUNK_ROWS] for start in range(0, len(numbers), CHUNK_ROWS)]
    found = list(run_tasks(Ranker(mixture, seed, by), chunks, list(map(len, chunks)), workers))
    rows = [np.searchsorted(numbers, np.array(own, np.int64)) for own, _ in found]
    return np.concatenate(rows), np.concatenate([np.array(hashes, np.uint64) for _, hashes in found])


def read_rows(mixture: Mixture, numbers: Sequence[int]) -> Iterator[tuple[int, Source, Any]]:
    """Yields number, source and stored row. Raises UserError for a row that cannot be read."""
    for number in map(int, numbers):
        source, index = mixture.locate(number)
        try:
            yield number, source, source.row(index)
        except BadRow as bad:
            advice = "leave it out with --exclude FILE, where prepare check --bad-rows FILE has named it"
            raise UserError(f"{bad}; {advice}") from None


def sample_rows(hashes: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` rows with the lowest hashes, ascending."""
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def split_rows(rows: np.ndarray, hashes: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Returns the part of every row; part i gets `targets[i]` rows, as nearly as the groups allow.

    `hashes[k]` belongs to row `rows[k]`. Rows that share a hash, directly or through other rows, form a group and stay
    in one part. Groups are assigned to the parts in the order of their lowest hash.
    """
    groups = connected_groups(rows, hashes, sum(targets))
    lowest = np.full(len(groups), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, groups[rows], hashes)
    names, sizes = np.unique(groups, return_counts=True)
    order = np.argsort(lowest[names], kind="stable")
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    parts = np.zeros(len(groups), np.int64)
    parts[names[order]] = np.searchsorted(np.cumsum(targets)[:-1], middles, side="right")
    return parts[groups]


def connected_groups(rows: np.ndarray, hashes: np.ndarray, count: int) -> np.ndarray:
    """Returns, for each of `count` rows, the lowest row of its group."""
    _, images = np.unique(hashes, return_inverse=True)
    groups = np.arange(count)
    while True:
        lowest = np.full(images.max(initial=-1) + 1, count)
        np.minimum.at(lowest, images, groups[rows])
        joined = groups.copy()
        np.minimum.at(joined, rows, lowest[images])
        joined = joined[joined]  # pointer jumping, because long chains would take one round per link
        if np.array_equal(joined, groups):
            return groups
        groups = joined


def mix_rows(hashes: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    """Returns row numbers of the mixture, `counts[i]` of source i, in a mixed order.

    If a count is larger than its source, the numbers of copies of any two rows of the source differ by at most one.
    """
    starts = np.cumsum([0, *map(len, hashes)])
    taken = [start + np.resize(np.argsort(own, kind="stable"), count)
             for own, count, start in zip(hashes, counts, starts, strict=False)]
    numbers = np.concatenate(taken)
    keys = np.concatenate(hashes)[numbers]
    # Equal rows, and copies of one row, get different keys; with equal keys they would be neighbours.
    order = np.argsort(keys, kind="stable")
    fresh = np.append(True, keys[order][1:] != keys[order][:-1])
    position = np.arange(len(keys))
    copy = np.empty(len(keys), np.uint64)
    copy[order] = position - np.maximum.accumulate(np.where(fresh, position, 0))
    return numbers[np.argsort(_scramble(keys + _scramble(copy)), kind="stable")]


def _scramble(x: np.ndarray) -> np.ndarray:
    """Permutes the 64-bit numbers (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _images(row: Any, source: Source, root: str) -> list[str | bytes]:
    """Returns the images of a row, paths relative to the common root, so that moved data give the same hashes."""
    found = []
    map_images(row, lambda image: found.append(image) or image)
    return [os.path.relpath(os.path.join(source.image_root, image), root) if root and is_path(image) else image
            for image in found]


def _plain(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)
