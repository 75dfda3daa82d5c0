"""Builds batches: record numbers -> windows of examples -> packed sequences -> batches, for any number of hosts.

Grain shuffles and mixes the numbers of the records. Every host packs each window of them by their lengths, so all hosts
know one global order of sequences. Each host measures its share of the unknown lengths, in worker processes, and
receives the others (`lengths.py`). It then reads the records of its own sequences alone.
The sequences depend neither on the number of hosts nor of workers, and a position in the data is three integers.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from llava_jax.data.examples import DataSpec, EncodedRecord
from llava_jax.data.lengths import EXCHANGED_RECORDS, Allgather, Lengths
from llava_jax.data.packing import WINDOW, pack
from llava_jax.data.records import REASONS, BadRow
from llava_jax.data.sources import Mixture
from llava_jax.data.workers import Pool
from llava_jax.errors import UserError
from llava_jax.progress import Progress
from llava_jax.text import agreement
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID

TASK_RECORDS = 32
"""Number of records that a worker measures per task."""

PROBE_RECORDS = 1000
"""Number of first records of which at least one must be usable if bad rows are skipped."""

START = {"epoch": 0, "window": 0, "row": 0}
"""State before the first sequence."""


class Batches(grain.IterDataset):
    """Iterates over batches of packed sequences, as dicts of numpy arrays.

    Each process gets B = batch_size / process_count sequences of a batch, with T = `spec.sequence_length` tokens and
    I = `spec.tiles_per_sequence` tiles:

    tokens int32 [B, T]: IMAGE_TOKEN_ID at the position of every visual token; 0 where segment_ids is 0
    labels int32 [B, T]: the token where it is supervised, else -100; not shifted
    positions, segment_ids int32 [B, T]: position in the conversation; its number in the sequence from 1, 0 for padding
    visual_index int32 [B, T]: index of the feature that replaces a visual token
        (`ImageProcessor.visual_tokens`); -1 elsewhere. If the processor `is_weighted`, it is [B, T, 4], and there is
        visual_weight float32 [B, T, 4], 0 elsewhere.
    tiles uint8 [B, I, size, size, 3], tile_segment_ids int32 [B, I]: 0 for an empty slot
    images int32 [B]: number of images, of one or more tiles each
    skipped int32 [len(REASONS)]: number of bad records on the way to this batch, by reason

    The mixture is shuffled again in every epoch with `seed`, for `epochs` epochs (None: without end). The sequences of
    all processes together are the same for any number of processes and workers. An iterator's state, {"epoch",
    "window", "row"}, is the same on all processes and continues bit for bit with any other number of them. The last
    batch is filled up with padding.

    With `keep`, for repeated passes over one epoch, workers and texts are kept until `close`. Every pass decodes the
    images again.

    With `allgather`, which returns the value of every process, each process measures its share of the lengths. All
    processes then have to iterate equally far. Without it each process measures all records.

    Raises UserError if batch_size is not divisible by process_count, or if the first PROBE_RECORDS records are all
    invalid. A record that cannot be used raises BadRow, or is left out and counted, as `spec.bad_rows` says.
    """

    def __init__(
        self,
        spec: DataSpec,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        keep: bool = False,
        allgather: Allgather | None = None,
    ):
        super().__init__()
        if batch_size % process_count:
            raise UserError(f"batch_size {batch_size} is not divisible by the {process_count} processes")
        self.spec, self.batch_size, self.epochs, self.workers = spec, batch_size, epochs, workers
        self.process_index, self.process_count = process_index, process_count
        self.keep, self._kept = keep, None
        self._allgather, self._lengths = allgather, None
        self.order = _Order(spec.mixture, seed, shuffle)

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    @property
    def lengths(self) -> Lengths:
        """Lengths of the records. With `allgather`, all processes have to use it first at the same point."""
        if self._lengths is None:
            self._lengths = Lengths(self.spec, self.process_index, self.process_count, self._allgather)
        return self._lengths

    def open_rows(self, state: dict[str, int]) -> tuple[Pool, Iterator["_PlannedSequence"]]:
        """Returns a pool, and the sequences of all processes from a state on (`_all_rows`)."""
        if self._kept is None:
            if self.spec.bad_rows == "skip":
                _require_a_good_record(self.spec, self.order.window(0, 0)[:PROBE_RECORDS])
            pool = Pool(self.spec, self.workers)
            if not self.keep:
                return pool, _all_rows(self, state, pool)
            try:
                self._kept = pool, list(_all_rows(self, START, pool))
            except BaseException:
                pool.close()
                raise
        return self._kept[0], iter(self._kept[1])

    def close(self) -> None:
        """Stops the workers that `keep` has kept."""
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None

    def count_rows(self) -> int:
        """Returns the number of sequences of one epoch in every `process_count`-th window.

        It measures the records of these windows; with `allgather`, those of all windows. It decodes no image.
        """
        numbers = range(self.process_index, self.order.windows, self.process_count)
        windows = [np.array(self.order.window(0, number)) for number in numbers]
        records = self.order.records(0) if self._allgather else np.concatenate([np.zeros(0, np.int64), *windows])
        records = self.lengths.unknown(records)
        progress = Progress(len(records) // self.lengths.count, unit="records", name="measuring",
                            enabled=len(records) > 0 and self.process_index == 0)
        with Pool(self.spec, self.workers) as pool, contextlib.closing(progress):
            for first in range(0, len(records), EXCHANGED_RECORDS):
                part = records[first : first + EXCHANGED_RECORDS]
                _Measuring(self.lengths, pool, part, "lengths").finish(progress.update)
                self.lengths.save()
        return sum(len(_pack(self.spec, self.lengths[window])[0]) for window in windows)


@dataclasses.dataclass(frozen=True)
class _Order:
    """Orders the numbers of the records, epoch by epoch, in windows."""

    mixture: Mixture
    seed: int
    shuffle: bool

    @property
    def windows(self) -> int:
        """Number of windows of an epoch."""
        return math.ceil(sum(self.mixture.counts) / WINDOW)

    def window(self, epoch: int, window: int) -> list[int]:
        """Returns the record numbers of a window of an epoch, in order."""
        order = self._epoch(epoch)
        return [order[i] for i in range(window * WINDOW, min((window + 1) * WINDOW, len(order)))]

    def records(self, epoch: int) -> np.ndarray:
        """Returns the numbers of the records of an epoch, ascending, each once."""
        sources = zip(self.mixture.starts[:-1], self.mixture.starts[1:], self._parts(epoch), strict=True)
        return np.concatenate([np.arange(start, stop) if len(part) >= stop - start else np.unique(list(part))
                               for start, stop, part in sources])

    def _epoch(self, epoch: int) -> grain.MapDataset:
        order = grain.MapDataset.concatenate(self._parts(epoch))
        return order.shuffle(seed=(self.seed * 1_000_003 + epoch) % 2**32) if self.shuffle else order

    def _parts(self, epoch: int) -> list[grain.MapDataset]:
        parts = []
        starts, counts = self.mixture.starts, self.mixture.counts
        for part, (start, stop, count) in enumerate(zip(starts[:-1], starts[1:], counts, strict=True)):
            numbers = grain.MapDataset.range(start, stop)
            if self.shuffle:
                numbers = numbers.shuffle(seed=(self.seed + part) % 2**32)  # another order in every repeat
            parts.append(numbers.repeat()[epoch * count : (epoch + 1) * count])
        return parts

    def rows(self, count: int, epoch: int, window: int) -> Sequence[int]:
        """Returns the order of a window's sequences, because packing puts those of many records first."""
        if not self.shuffle:
            return range(count)
        return np.random.default_rng((self.seed % 2**32, epoch, window)).permutation(count).tolist()


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._state = START
        self.lengths_hash = 0
        """Hash of the lengths of the state's window, 0 before the first batch."""
        self._pool: Pool | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return self._next()
        except BaseException:
            self.close()  # after an error, the next call starts again where this one did
            raise

    def _next(self) -> dict[str, np.ndarray]:
        batches = self._batches
        local_size = batches.batch_size // batches.process_count
        if self._pool is None:
            self._pool, self._rows = batches.open_rows(self._state | {"lengths_hash": self.lengths_hash})
            self._pending = deque()
        while len(self._pending) < 2 + 2 * batches.workers // local_size:
            rows = list(itertools.islice(self._rows, batches.batch_size))
            if not rows:
                break
            local_rows = rows[batches.process_index * local_size :][:local_size]
            found = [self._pool.submit("tiles" if row.texts else "examples", row.numbers) for row in local_rows]
            self._pending.append((local_rows, found, rows[-1]))
        if not self._pending:
            raise StopIteration
        rows, found, last = self._pending.popleft()
        examples = [self._examples(row, future.result()) for row, future in zip(rows, found, strict=True)]
        batch = self._stack(rows, examples)
        self._state, self.lengths_hash = last.after, last.lengths_hash
        return batch

    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    def set_state(self, state: dict[str, int], lengths_hash: int = 0) -> None:
        """Continues from a state. With the `lengths_hash` of that state, a change of the lengths gets a line."""
        self.close()
        self._state, self.lengths_hash = dict(state), lengths_hash

    def close(self) -> None:
        super().close()
        if self._pool is not None and not sys.is_finalizing():  # at exit, Python ends threads and processes itself
            if self._batches._lengths is not None:  # opening them now would wait for other processes
                self._batches.lengths.save()
            if not self._batches.keep:
                self._pool.close()
            self._pool = None

    def _examples(self, row: "_PlannedSequence", found: list) -> list["tuple[EncodedRecord, np.ndarray] | str"]:
        """Returns text and tiles of each record of a sequence, or the reason why its images cannot be used."""
        if row.texts:
            return [tiles if isinstance(tiles, str) else (text, tiles)
                    for text, tiles in zip(row.texts, found, strict=True)]
        for number, length, example in zip(row.numbers, row.lengths.tolist(), found, strict=True):
            if not isinstance(example, str) and [len(example[0].tokens), example[0].tiles] != length:
                raise UserError(self._batches.lengths.describe_change(number))
        if self._batches.keep and not any(isinstance(example, str) for example in found):
            row.texts = [text for text, _ in found]
        return found

    def _stack(self, rows: Sequence["_PlannedSequence"],
               examples: Sequence[list[tuple[EncodedRecord, np.ndarray] | str]]) -> dict[str, np.ndarray]:
        spec = self._batches.spec
        shape = (self._batches.batch_size // self._batches.process_count, spec.sequence_length)
        slots = (shape[0], spec.tiles_per_sequence)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "labels": np.full(shape, IGNORE, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            **spec.processor.no_visual_tokens(shape),
            "tiles": np.zeros((*slots, spec.processor.size, spec.processor.size, 3), np.uint8),
            "tile_segment_ids": np.zeros(slots, np.int32),
            "images": np.zeros(shape[0], np.int32),
        }
        skipped = Counter()
        for b, (row, row_examples) in enumerate(zip(rows, examples, strict=True)):
            start = slot = segment = 0
            skipped += row.skipped
            for example in row_examples:
                if isinstance(example, str):  # its images are bad, so the records after it move up
                    skipped[example] += 1
                    continue
                text, tiles = example
                segment += 1
                span, slots_used = slice(start, start + len(text.tokens)), slice(slot, slot + len(tiles))
                batch["tokens"][b, span], batch["labels"][b, span] = text.tokens, text.labels
                batch["positions"][b, span] = np.arange(len(text.tokens))
                batch["segment_ids"][b, span] = segment
                visual = start + np.flatnonzero(text.tokens == IMAGE_TOKEN_ID)
                layouts = spec.processor.layouts(text.media)
                for name, values in spec.processor.visual_tokens(layouts, slot, slots[1]).items():
                    batch[name][b, visual] = values
                batch["tiles"][b, slots_used], batch["tile_segment_ids"][b, slots_used] = tiles, segment
                batch["images"][b] += len(layouts)
                start, slot = span.stop, slots_used.stop
        return batch | {"skipped": np.array([skipped[reason] for reason in REASONS], np.int32)}


def _all_rows(batches: Batches, state: dict[str, int], pool: Pool) -> Iterator["_PlannedSequence"]:
    """Yields the sequences of all processes from a state on. Workers measure the next window meanwhile.

    Prints a line if the lengths of the first window do not have the state's `lengths_hash`, unless that is 0.
    """
    done, expected_hash, skipped = state["row"], state.get("lengths_hash", 0), Counter()
    windows = _windows(batches, state, pool)
    window = next(windows, None)
    while window is not None:
        epoch, position, numbers, measuring = window
        texts, lengths, following = measuring.finish(), batches.lengths[numbers], next(windows, None)
        lengths_hash, rows, bad = zlib.crc32(lengths.tobytes()), *_pack(batches.spec, lengths)
        if done and expected_hash not in (0, lengths_hash) and batches.process_index == 0:
            agreement.say(f"{batches.spec.mixture.name}: since the stop, records near this position got other numbers "
                          "of tokens or tiles, as after a change of their images; they are packed anew, so some of "
                          f"{len(numbers):,} may be read twice or not at all in this epoch")
        skipped += bad if done == 0 else Counter()
        order = batches.order.rows(len(rows), epoch, position)
        for number in range(done, len(rows)):
            if following is not None:
                following[-1].ask((number + 1) / len(rows))
            row = rows[order[number]]
            after = {"epoch": epoch, "window": position, "row": number + 1}
            known = [texts[numbers[i]] for i in row if numbers[i] in texts]
            yield _PlannedSequence([numbers[i] for i in row], lengths[row], known if len(known) == len(row) else None,
                                   skipped, after, lengths_hash)
            skipped = Counter()
        window, done = following, 0


def _windows(batches: Batches, state: dict[str, int], pool: Pool) -> Iterator[tuple[int, int, list[int], "_Measuring"]]:
    """Yields epoch, number and records of each window, and what measures them."""
    epoch, first = state["epoch"], state["window"]
    what = "texts" if batches.process_count == 1 else "lengths"  # several hosts measure records of each other
    while batches.epochs is None or epoch < batches.epochs:
        for number in range(first, batches.order.windows):
            numbers = batches.order.window(epoch, number)
            yield epoch, number, numbers, _Measuring(batches.lengths, pool, numbers, what)
        epoch, first = epoch + 1, 0


@dataclasses.dataclass
class _PlannedSequence:
    """A sequence to build: records, lengths, texts if known, what was skipped before it, and the state after it.

    `lengths_hash` is that of its window.
    """

    numbers: list[int]
    lengths: np.ndarray
    texts: list[EncodedRecord] | None
    skipped: Counter
    after: dict[str, int]
    lengths_hash: int


class _Measuring:
    """Measures the records of which no length is known, step by step. With "texts" it returns their texts too."""

    def __init__(self, lengths: Lengths, pool: Pool, numbers: Sequence[int], what: str):
        self._lengths, self._pool, self._what = lengths, pool, what
        self._unknown = lengths.unknown(numbers)
        self._own = lengths.share(self._unknown)
        self._asked = []

    def ask(self, share: float = 1.0) -> None:
        """Lets the workers measure the first `share` of this process's records."""
        for first in range(TASK_RECORDS * len(self._asked), math.ceil(share * len(self._own)), TASK_RECORDS):
            self._asked.append(self._pool.submit(self._what, self._own[first : first + TASK_RECORDS]))

    def finish(self, report: Callable[..., None] | None = None) -> dict[int, EncodedRecord]:
        """Waits until all processes have measured their records. Returns texts by the record's number."""
        self.ask()
        found = []
        for future in self._asked:
            found += future.result()
            if report is not None:
                report(count=min(TASK_RECORDS, len(self._own)))
        texts = {number: text for number, text in zip(self._own, found, strict=True) if isinstance(text, EncodedRecord)}
        self._lengths.add(self._unknown, [(len(row.tokens), row.tiles) if isinstance(row, EncodedRecord) else row
                                          for row in found])
        return texts


def _pack(spec: DataSpec, lengths: np.ndarray) -> tuple[list[list[int]], Counter]:
    """Packs the good records of a window. Returns lists of indices into `lengths`, and the bad records by reason."""
    good = np.flatnonzero(lengths[:, 0] > 0)
    rows = pack(*lengths[good].T, spec.sequence_length, spec.tiles_per_sequence)
    bad = Counter((-1 - lengths[lengths[:, 0] < 0, 0]).tolist())
    return [good[row].tolist() for row in rows], Counter({REASONS[reason]: count for reason, count in bad.items()})


def _require_a_good_record(spec: DataSpec, numbers: Sequence[int]) -> None:
    first = None
    for number in numbers:
        try:
            spec.text(number)
            spec.tiles(number)
            return
        except BadRow as bad:
            first = first or bad
    raise UserError(f"none of the first {len(numbers)} rows can be used, the first for this reason: {first}")
