"""Reads a data set once: collects findings about its rows, and figures of the good ones."""

import bisect
import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llava_jax.config import Data
from llava_jax.data import packing
from llava_jax.data.sources import Mixture
from llava_jax.prepare.findings import KINDS, ROW, Checker, Finding, locate_row, read_id
from llava_jax.prepare.progress import run_tasks

TASK_ROWS = 512
"""Maximum number of rows in one task of a worker; for parquet, a task reads complete row groups."""
PACKED_RECORDS = 64 * packing.WINDOW
"""Maximum number of records that are packed to estimate how many sequences an epoch has."""
KEPT_FINDINGS, KEPT_OF_KIND = 1000, 5
"""Number of findings that are kept in memory, and number of them that are kept of each kind in any case."""
MAX_BINS, BIN_WIDTHS = 10, (1, 2, 2.5, 5, 10)
"""Maximum number of bins of a histogram, and their widths up to a power of ten."""


class Audit:
    """Findings and figures of the rows of a mixture.

    Attributes:
      rows: ROW of every row, source by source.
      images: Number of distinct images.
      counts: Number of findings by kind, for every source.
      unknown: Number of rows by key that nothing reads, for every source.
      first, shown: The first KEPT_FINDINGS findings, and the first KEPT_OF_KIND of every kind.
    """

    def __init__(self, mixture: Mixture, save: Callable[[Finding], Any] | None):
        self.mixture, self._save = mixture, save
        self.rows = np.zeros(mixture.starts[-1], ROW)
        self.images = 0
        self.counts = [collections.Counter() for _ in mixture.sources]
        self.unknown = [collections.Counter() for _ in mixture.sources]
        self.first: list[Finding] = []
        self.shown: list[Finding] = []
        self._shown: collections.Counter[str] = collections.Counter()

    def wants(self, kind: str) -> bool:
        """Returns whether a finding of this kind would be saved or kept, not only counted."""
        return self._save is not None or len(self.first) < KEPT_FINDINGS or self._shown[kind] < KEPT_OF_KIND

    def add(self, which: int, finding: Finding) -> None:
        """Counts, saves and keeps a finding in the source with index `which`."""
        self.counts[which][finding.kind] += 1
        if len(self.first) < KEPT_FINDINGS:
            self.first.append(finding)
        if self._shown[finding.kind] < KEPT_OF_KIND:
            self._shown[finding.kind] += 1
            self.shown.append(finding)
        if self._save is not None:
            self._save(finding)

    def report(self, max_length: int, tiles_per_sequence: int | None, batch_size: int, allowed: Sequence[str]
               ) -> dict[str, Any]:
        """Returns the JSON object that `prepare check --help` explains."""
        if tiles_per_sequence is None:
            good = self.rows["tiles"][self.rows["good"]]
            tiles_per_sequence = max(Data.tiles_per_sequence, int(good.max(initial=0)))
        sources = []
        for which, source in enumerate(self.mixture.sources):
            figures = _figures(self.rows[self.mixture.starts[which] : self.mixture.starts[which + 1]])
            about = {"path": source.path, "format": source.format, "rows_per_epoch": self.mixture.counts[which]}
            sources.append({**about, **figures, "findings": _ordered(self.counts[which]),
                            "unknown_keys": dict(sorted(self.unknown[which].items()))})
        figures = _figures(self.rows)
        figures["images"]["distinct"] = self.images
        findings = _ordered(sum(self.counts, collections.Counter()))
        return {
            "ok": not set(findings) - set(allowed),
            **figures,
            "findings": findings,
            "allowed": list(allowed),
            "unknown_keys": dict(sorted(sum(self.unknown, collections.Counter()).items())),
            "packing": figures["tokens"] and self._estimate_packing(max_length, tiles_per_sequence, batch_size),
            "sources": sources,
            "bad_rows": [finding.as_json() for finding in self.first],
        }

    def _estimate_packing(self, max_length: int, tiles_per_sequence: int, batch_size: int) -> dict[str, Any]:
        """Packs windows of an epoch in random order, as training does. Of a long epoch it packs a part, to be quick."""
        rng = np.random.default_rng(0)
        starts, counts = self.mixture.starts, self.mixture.counts
        share = min(1, PACKED_RECORDS / sum(counts))
        parts = []
        for start, stop, count in zip(starts[:-1], starts[1:], counts, strict=True):
            times, rest = divmod(round(count * share), stop - start)
            order = start + rng.permutation(stop - start)
            parts += [np.tile(order, times), order[:rest]]
        drawn = self.rows[rng.permutation(np.concatenate(parts))]
        drawn = drawn[drawn["good"]]
        packed = 0
        for start in range(0, len(drawn), packing.WINDOW):
            window = drawn[start : start + packing.WINDOW]
            packed += len(packing.pack(window["tokens"], window["tiles"], max_length, tiles_per_sequence))
        expected = round(packed / share)
        return {
            "sequence_length": max_length,
            "tiles_per_sequence": tiles_per_sequence,
            "sequences": expected,
            "token_fill": _total(drawn["tokens"]) / max(packed * max_length, 1),
            "tile_fill": _total(drawn["tiles"]) / max(packed * tiles_per_sequence, 1),
            "batch_size": batch_size,
            "steps": max(1, expected // batch_size),
        }


def audit(checker: Checker, mixture: Mixture, workers: int, save: Callable[[Finding], Any] | None = None) -> Audit:
    """Reads every row and every image of the mixture's sources once, in `workers` processes.

    `save` is called with every finding: first those of single rows in their order, then those of repeated rows. The
    memory needed is ROW for every row and 8 bytes for every image. The result does not depend on `workers`.
    """
    result, starts, images = Audit(mixture, save), mixture.starts, []
    step = min(TASK_ROWS, starts[-1] // (8 * (workers or 1)) + 1)
    tasks = [(which, start, min(start + step, len(source)))
             for which, source in enumerate(mixture.sources) for start in range(0, len(source), step)]
    chunks = run_tasks(checker, tasks, [stop - start for _, start, stop in tasks], workers)
    for (which, start, stop), chunk in zip(tasks, chunks, strict=True):
        result.rows[starts[which] + start : starts[which] + stop] = chunk.rows
        images.append(chunk.images)
        result.unknown[which] += chunk.unknown
        for finding in chunk.findings:
            result.add(which, finding)
    result.images = len(np.unique(np.concatenate(images)))
    for kind, number, first in _find_repeats(result.rows):
        which = bisect.bisect_right(starts, number) - 1
        if result.wants(kind):
            result.add(which, _repeat(kind, mixture, number, first))
        else:  # only counted, so the row need not be read again for its id
            result.counts[which][kind] += 1
    return result


def _find_repeats(rows: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Yields (kind, row, first row that it repeats), kind by kind in the order of the rows."""
    yield from _earlier("duplicate_id", rows["id"], rows["id"] != 0)
    read = rows["question"] != 0
    candidates = read & (rows["images"] > 0)
    content = rows["question"] ^ (rows["answer"].astype(np.uint64) << np.uint64(32))
    for kind, number, first in _earlier("duplicate", content, read):
        candidates[number] = False
        yield kind, number, first
    yield from _earlier("duplicate_question", rows["question"], candidates)


def _earlier(kind: str, values: np.ndarray, among: np.ndarray) -> Iterator[tuple[str, int, int]]:
    numbers = np.flatnonzero(among)
    order = numbers[np.argsort(values[numbers], kind="stable")]
    new = np.append(True, values[order][1:] != values[order][:-1])[: len(order)]
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    repeats, firsts = order[~new], firsts[~new]
    for i in np.argsort(repeats):
        yield kind, int(repeats[i]), int(firsts[i])


def _repeat(kind: str, mixture: Mixture, number: int, first: int) -> Finding:
    source, index = mixture.locate(number)
    own, (file, row, line) = locate_row(source, index), locate_row(*mixture.locate(first))
    earlier = ("" if file == own[0] else f"{file}, ") + f"row {row}" + (f" (line {line})" if line else "")
    same = {"duplicate_id": "id", "duplicate": "images and texts", "duplicate_question": "images and questions"}[kind]
    return Finding(*own, read_id(source, index), kind, f"same {same} as {earlier}")


def _figures(rows: np.ndarray) -> dict[str, Any]:
    good = rows[rows["good"]]
    images, counts = np.unique(good["images"], return_counts=True)
    return {
        "rows": len(rows),
        "good_rows": len(good),
        "text_only_rows": int(np.count_nonzero(good["images"] == 0)),
        "images": {"references": _total(rows["images"]),
                   "per_row": dict(zip(map(str, images.tolist()), counts.tolist(), strict=True))},
        "tokens": _token_figures(good["tokens"], good["supervised"]) if good["tokens"].any() else None,
    }


def _token_figures(lengths: np.ndarray, supervised: np.ndarray) -> dict[str, Any]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = _bin_width(longest - shortest + 1)
    first = shortest // width
    return {
        "total": _total(lengths),
        "supervised": _total(supervised),
        "supervised_share": _total(supervised) / _total(lengths),
        "min": shortest,
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p95": float(np.percentile(lengths, 95)),
        "max": longest,
        "histogram": [[k * width, (k + 1) * width, n]
                      for k, n in enumerate(np.bincount(lengths // width - first).tolist(), first)],
    }


def _bin_width(span: int) -> int:
    """Returns the smallest width of BIN_WIDTHS, times a power of ten, with which MAX_BINS bins cover the span."""
    power = 10 ** (len(str(-(-span // MAX_BINS))) - 1)
    return next(int(nice * power) for nice in BIN_WIDTHS if nice * power * MAX_BINS >= span and nice * power % 1 == 0)


def _total(values: np.ndarray) -> int:
    return int(values.sum(dtype=np.int64))


def _ordered(counts: collections.Counter[str]) -> dict[str, int]:
    return {kind: counts[kind] for kind in KINDS if counts[kind]}
