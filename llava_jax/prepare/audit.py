"""A pass over a whole data set: what is wrong with its rows, and what the good ones amount to."""

import bisect
import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_jax.config import Data
from llava_jax.data import packing
from llava_jax.data.sources import Mixture
from llava_jax.data.workers import Pool
from llava_jax.prepare.findings import KINDS, ROW, Checker, Finding, place, read_id

CHUNK = 512  # rows per task of a worker, at most: of parquet, each reads whole row groups
PACKED = 64 * packing.WINDOW  # records of an epoch that are packed to tell how many rows all give
KEPT, KEPT_OF_KIND = 1000, 5  # findings in memory, at least so many of each kind
BINS, NICE = 10, (1, 2, 2.5, 5, 10)  # of a histogram: how many at most, and their widths but for a power of ten


class Audit:
    """What was found in the rows of a mixture.

    Attributes:
      rows: ROW of every row, source by source.
      images: how many different ones there are.
      counts: findings by kind, of every source.
      unknown: number of rows by key that nothing reads, of every source.
      first, shown: the first KEPT findings, and the first KEPT_OF_KIND of every kind.
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
        """Whether a finding of this kind would be more than counted."""
        return self._save is not None or len(self.first) < KEPT or self._shown[kind] < KEPT_OF_KIND

    def add(self, which: int, finding: Finding) -> None:
        """Counts a finding in source number `which`, and saves and keeps it."""
        self.counts[which][finding.kind] += 1
        if len(self.first) < KEPT:
            self.first.append(finding)
        if self._shown[finding.kind] < KEPT_OF_KIND:
            self._shown[finding.kind] += 1
            self.shown.append(finding)
        if self._save is not None:
            self._save(finding)

    def report(self, max_length: int, tiles_per_sequence: int | None, rows: int, allowed: Sequence[str]
               ) -> dict[str, Any]:
        """All of it as a JSON object, whose fields are those that `prepare check --help` explains."""
        if tiles_per_sequence is None:
            good = self.rows["images"][self.rows["good"]]
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
            "packing": figures["tokens"] and self._estimate_packing(max_length, tiles_per_sequence, rows),
            "sources": sources,
            "bad_rows": [finding.as_json() for finding in self.first],
        }

    def _estimate_packing(self, max_length: int, tiles_per_sequence: int, rows: int) -> dict[str, Any]:
        """Packs an epoch as training does, windows of a random order; of a long epoch a random part, to be quick."""
        rng = np.random.default_rng(0)
        starts, counts = self.mixture.starts, self.mixture.counts
        share = min(1, PACKED / sum(counts))
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
            packed += len(packing.pack(window["tokens"], window["images"], max_length, tiles_per_sequence))
        expected = round(packed / share)
        return {
            "sequence_length": max_length,
            "tiles_per_sequence": tiles_per_sequence,
            "rows": expected,
            "token_fill": _total(drawn["tokens"]) / max(packed * max_length, 1),
            "image_fill": _total(drawn["images"]) / max(packed * tiles_per_sequence, 1),
            "rows_per_step": rows,
            "steps": max(1, expected // rows),
        }


def audit(checker: Checker, mixture: Mixture, workers: int, save: Callable[[Finding], Any] | None = None) -> Audit:
    """Reads every row and every image of the mixture's sources once, in `workers` processes.

    `save` is called with every finding: those of single rows in their order, then the repeated rows. Keeps ROW of every
    row and 8 bytes of every image in memory. The result does not depend on `workers`.
    """
    result, starts, images = Audit(mixture, save), mixture.starts, []
    step = min(CHUNK, starts[-1] // (8 * (workers or 1)) + 1)
    tasks = [(which, start, min(start + step, len(source)))
             for which, source in enumerate(mixture.sources) for start in range(0, len(source), step)]
    with Pool(checker, workers) as pool, tqdm(total=starts[-1], unit=" rows", disable=None) as bar:
        for (which, start, stop), chunk in zip(tasks, pool.map(tasks), strict=True):
            result.rows[starts[which] + start : starts[which] + stop] = chunk.rows
            images.append(chunk.images)
            result.unknown[which] += chunk.unknown
            for finding in chunk.findings:
                result.add(which, finding)
            bar.update(stop - start)
    result.images = len(np.unique(np.concatenate(images)))
    for kind, number, first in _find_repeats(result.rows):
        which = bisect.bisect_right(starts, number) - 1
        if result.wants(kind):
            result.add(which, _repeat(kind, mixture, number, first))
        else:  # not worth reading the row again for its id
            result.counts[which][kind] += 1
    return result


def _find_repeats(rows: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(kind, row, the first row that it repeats), of each kind in the order of the rows."""
    yield from _earlier("duplicate_id", rows["id"], rows["id"] != 0)
    read = rows["question"] != 0
    others = read & (rows["images"] > 0)
    whole = rows["question"] ^ (rows["answer"].astype(np.uint64) << np.uint64(32))
    for kind, number, first in _earlier("duplicate", whole, read):
        others[number] = False
        yield kind, number, first
    yield from _earlier("duplicate_question", rows["question"], others)


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
    own, (file, row, line) = place(source, index), place(*mixture.locate(first))
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
        "tokens": _token_figures(good["tokens"], good["learned"]) if good["tokens"].any() else None,
    }


def _token_figures(lengths: np.ndarray, learned: np.ndarray) -> dict[str, Any]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = _bin_width(longest - shortest + 1)
    begin = shortest // width
    return {
        "total": _total(lengths),
        "learned": _total(learned),
        "learned_share": _total(learned) / _total(lengths),
        "min": shortest,
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p95": float(np.percentile(lengths, 95)),
        "max": longest,
        "histogram": [[k * width, (k + 1) * width, n]
                      for k, n in enumerate(np.bincount(lengths // width - begin).tolist(), begin)],
    }


def _bin_width(span: int) -> int:
    """The smallest nice number of which BINS cover a span."""
    power = 10 ** (len(str(-(-span // BINS))) - 1)
    return next(int(nice * power) for nice in NICE if nice * power * BINS >= span and nice * power % 1 == 0)


def _total(values: np.ndarray) -> int:
    return int(values.sum(dtype=np.int64))


def _ordered(counts: collections.Counter[str]) -> dict[str, int]:
    return {kind: counts[kind] for kind in KINDS if counts[kind]}
