"""The concept-balanced filter that reduced CC3M from 3 million captions to 595 thousand (paper, appendix).

1. Find the noun phrases of every caption (noun_phrases.py). The frequency of a phrase is the number of captions with
   it. A caption that repeats a phrase counts once.
2. Drop phrases with a frequency below 3. They are rare combinations, mostly covered by other phrases.
3. From the least to the most frequent remaining phrase, add its captions to the pool; a random 100 of them if there
   are more.

This follows the paper literally: the 100 are drawn from all captions of the phrase, including captions in the pool, so
a common phrase may have more than 100 in the end. The pool is a set, so the order of phrases only decides which random
numbers they get. Phrases of equal frequency are sorted by text.

A caption without a remaining phrase is dropped. The result depends on the captions in their order, the chunker and the
seed alone, not on the number of processes.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from llava_jax.annotations.captions import CaptionFile
from llava_jax.annotations.noun_phrases import Chunker
from llava_jax.data.workers import Pool
from llava_jax.errors import UserError

BATCH_ROWS = 10_000
"""Number of rows that a process handles at once."""


@dataclasses.dataclass(frozen=True)
class CaptionPhrases:
    """The distinct phrases of every row: row i has `texts[k]` for k in `ids[starts[i] : starts[i + 1]]`."""

    texts: Sequence[str]
    starts: np.ndarray  # int64 [rows + 1]
    ids: np.ndarray  # int32

    def frequencies(self, kept: np.ndarray | None = None) -> np.ndarray:
        """Returns the number of rows with each phrase, int64 [phrases]; only of the rows where `kept`, if given."""
        ids = self.ids if kept is None else self.ids[np.repeat(kept, np.diff(self.starts))]
        return np.bincount(ids, minlength=len(self.texts))


def select(phrases: CaptionPhrases, min_frequency: int = 3, max_per_phrase: int = 100, seed: int = 0) -> np.ndarray:
    """Returns which rows the rule keeps, bool [rows]."""
    frequencies = phrases.frequencies()
    rows = np.repeat(np.arange(len(phrases.starts) - 1, dtype=np.int32), np.diff(phrases.starts))
    kept = np.zeros(len(phrases.starts) - 1, bool)
    rare = (frequencies >= min_frequency) & (frequencies <= max_per_phrase)
    kept[rows[rare[phrases.ids]]] = True

    # Group the rows of frequent phrases by phrase.
    frequent = (frequencies >= min_frequency) & (frequencies > max_per_phrase)
    entries = np.flatnonzero(frequent[phrases.ids])
    entries = entries[np.argsort(phrases.ids[entries], kind="stable")]
    stops = np.cumsum(np.where(frequent, frequencies, 0))
    generator = np.random.default_rng(seed)
    for phrase in sorted(np.flatnonzero(frequent), key=lambda phrase: (frequencies[phrase], phrases.texts[phrase])):
        having = rows[entries[stops[phrase] - frequencies[phrase] : stops[phrase]]]
        kept[generator.choice(having, max_per_phrase, replace=False)] = True
    return kept


def find_phrases(
    file: CaptionFile, chunker: Chunker, workers: int | None = None, skip_bad_rows: bool = False
) -> tuple[CaptionPhrases, dict[int, str]]:
    """Returns the phrases of every row, and the faults of rows without a caption, by row number.

    Raises UserError, one line, at the first such row unless `skip_bad_rows`.
    """
    known: dict[str, int] = {}
    ids, counts, bad = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)], {}
    progress = tqdm(total=file.size, unit="B", unit_scale=True, desc="phrases", disable=not sys.stderr.isatty())
    workers = os.cpu_count() or 1 if workers is None else workers
    with Pool(_Extract(file, chunker), workers) as pool, progress:
        first = 0
        for size, texts, local, lengths, broken in pool.map(_batches(file)):
            for offset, reason in broken:
                bad[first + offset] = reason
                if not skip_bad_rows:
                    where = file.where(first + offset)
                    raise UserError(f"{where}: {reason}; mend it, or leave such rows out with --bad-rows skip")
            numbers = np.array([known.setdefault(text, len(known)) for text in texts.split("\n") if text], np.int32)
            ids.append(numbers[local])
            counts.append(lengths)
            first += len(lengths)
            progress.update(size)
    return CaptionPhrases(list(known), np.cumsum(np.concatenate(counts)), np.concatenate(ids)), bad


def _batches(file: CaptionFile) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for row in file:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Extract:
    """Finds the phrases of a batch of rows, in a worker process."""

    file: CaptionFile
    chunker: Chunker

    def __call__(self, rows: Sequence[bytes]) -> tuple[int, str, np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """Returns the number of bytes; the distinct phrases, one a line; the phrase numbers of all rows; the number of
        phrases of every row; and index and error of every bad row."""
        captions, broken = [""] * len(rows), []
        for index, row in enumerate(rows):
            try:
                captions[index] = self.file.caption(row)
            except ValueError as error:
                broken.append((index, str(error)))
        found = self.chunker(captions)
        known: dict[str, int] = {}
        numbers = [known.setdefault(text, len(known)) for texts in found for text in texts]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return sum(map(len, rows)), "\n".join(known), np.array(numbers, np.int32), lengths, broken
