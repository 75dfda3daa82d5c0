"""The concept-balanced filter that made CC3M's 3 million captions 595 thousand (Visual Instruction Tuning, appendix).

1. Find the noun phrases of every caption (noun_phrases.py). The frequency of a phrase is the number of captions that
   have it; a caption counts once, however often it repeats the phrase.
2. Forget the phrases with a frequency below 3: they are rare combinations, mostly covered by other phrases.
3. From the least to the most frequent phrase that is left, put the captions that have it into the pool; where there are
   more than 100, a random 100 of them.

Where this leaves something open it is read literally. The 100 are drawn from all captions of the phrase, whether or not
they are in the pool already, so a common phrase may end up with more than 100. The pool is a set: no caption is in it
twice. It follows that the order of the phrases decides nothing but which random numbers each gets; those of the same
frequency come in the order of their texts.

A caption of which no phrase is left is not kept. The result depends on the captions in their order, the chunker and the
seed alone; not on the number of processes.
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

BATCH = 10_000  # rows that a process takes at once


@dataclasses.dataclass(frozen=True)
class CaptionPhrases:
    """Which phrases each row has: row i has `texts[k]` for k in `ids[starts[i] : starts[i + 1]]`, all distinct."""

    texts: Sequence[str]
    starts: np.ndarray  # int64 [rows + 1]
    ids: np.ndarray  # int32

    def frequencies(self, kept: np.ndarray | None = None) -> np.ndarray:
        """Rows that have each phrase, int64 [phrases]; of the rows where `kept`, bool [rows], if given."""
        ids = self.ids if kept is None else self.ids[np.repeat(kept, np.diff(self.starts))]
        return np.bincount(ids, minlength=len(self.texts))


def select(phrases: CaptionPhrases, min_frequency: int = 3, max_per_phrase: int = 100, seed: int = 0) -> np.ndarray:
    """The rows that the rule keeps, bool [rows]."""
    frequencies = phrases.frequencies()
    rows = np.repeat(np.arange(len(phrases.starts) - 1, dtype=np.int32), np.diff(phrases.starts))
    kept = np.zeros(len(phrases.starts) - 1, bool)
    taken_whole = (frequencies >= min_frequency) & (frequencies <= max_per_phrase)
    kept[rows[taken_whole[phrases.ids]]] = True

    # Of the others, the rows phrase by phrase.
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
    """The phrases of every row, and what is wrong with the rows, by their number, that have no caption.

    Raises UserError, one line, at the first of these unless they are to be skipped.
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
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Extract:
    """What a process does with a batch of rows."""

    file: CaptionFile
    chunker: Chunker

    def __call__(self, rows: Sequence[bytes]) -> tuple[int, str, np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """Bytes read; distinct phrases, one a line; for all rows in turn the numbers of their phrases; how many each
        row has; and of every bad row its place and what is wrong with it."""
        captions, broken = [""] * len(rows), []
        for place, row in enumerate(rows):
            try:
                captions[place] = self.file.caption(row)
            except ValueError as error:
                broken.append((place, str(error)))
        found = self.chunker(captions)
        known: dict[str, int] = {}
        numbers = [known.setdefault(text, len(known)) for texts in found for text in texts]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return sum(map(len, rows)), "\n".join(known), np.array(numbers, np.int32), lengths, broken
