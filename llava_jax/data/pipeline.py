"""Batches of packed rows: record numbers -> windows of examples -> rows -> batches, the same for any number of hosts.

Grain shuffles and mixes the numbers of the records. Each window of them is tokenised (in worker processes) and packed
into rows, by every host alike, so that all know the one global sequence of rows; of every batch a host decodes the
images of its own rows alone. The rows depend neither on the number of hosts nor of workers, and a position in the data
is three integers. The price is that every host reads and tokenises all records (a twelfth of decoding an image, for
each); where files hold the images too, as packed ones do, it reads these with them.
"""

import dataclasses
import itertools
import math
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np

from llava_jax.data.examples import Loader
from llava_jax.data.packing import WINDOW, pack
from llava_jax.data.records import REASONS, BadRow
from llava_jax.data.sources import Mixture
from llava_jax.data.workers import Pool
from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS
from llava_jax.text import templates
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, Example
from llava_jax.text.tokenizer import Tokenizer

CHUNK = 32  # records per task of a worker that tokenises
TRIED = 1000  # records of a window of which at least one must be good
START = {"epoch": 0, "window": 0, "row": 0}  # the state before the first row


class Batches(grain.IterDataset):
    """Batches of packed sequences as numpy arrays. This process gives B = batch_size / process_count of each batch:

    tokens int32 [B, T]: IMAGE_TOKEN_ID at every visual token's place, the k-th of them belongs to the k-th visual token
        of the row's images in order; 0 where segment_ids is 0
    labels int32 [B, T]: the token where it is learned, else -100; not shifted
    positions, segment_ids int32 [B, T]: position in the conversation; its number in the row from 1 on, 0 for padding
    images uint8 [B, I, image_size, image_size, 3], image_segment_ids int32 [B, I]: 0 for an empty slot
    skipped int32 [len(REASONS)]: how many rows of the data were skipped on the way, by reason

    T is `sequence_length` and I `tiles_per_sequence`. The mixture is shuffled anew in every epoch with `seed`, for
    `epochs` epochs (None: for ever). The rows of all processes together, in the order of the processes, are the same
    for any number of processes and workers. An iterator's state, {"epoch", "window", "row"}, is the same on all of
    them and continues bit for bit with any other number. The last batch is filled up with padding.

    With `keep`, for one epoch that is passed through again and again, workers and packed texts are kept until `close`.
    Every pass decodes the images anew.

    A conversation has at most `sequence_length` tokens, and at most `context`, the model's, as positions restart with
    it. A record that cannot be used raises BadRow if `bad_rows` is "error"; else it is left out and counted. UserError
    if batch_size is not divisible by the number of processes, and when of the first records every one is bad.
    """

    def __init__(
        self,
        batch_size: int,
        mixture: Mixture,
        *,
        tokenizer: Tokenizer,
        template: str | templates.Template,
        tokens_per_image: int,
        image_size: int,
        image_mode: str,
        sequence_length: int,
        tiles_per_sequence: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        bad_rows: Literal["error", "skip"] = "error",
        context: int | None = None,
        exif: bool = False,
        max_pixels: int = MAX_PIXELS,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        keep: bool = False,
    ):
        super().__init__()
        if batch_size % process_count:
            raise UserError(f"batch_size {batch_size} is not divisible by the {process_count} processes")
        self.batch_size, self.epochs, self.workers = batch_size, epochs, workers
        self.process_index, self.process_count = process_index, process_count
        self.keep, self._kept = keep, None
        self.order = _Order(mixture, seed, shuffle)
        self.loader = Loader(
            mixture=mixture,
            tokenizer=tokenizer,
            template=templates.get(template),
            tokens_per_image=tokens_per_image,
            image_size=image_size,
            image_mode=image_mode,
            sequence_length=sequence_length,
            tiles_per_sequence=tiles_per_sequence,
            bad_rows=bad_rows,
            context=context,
            exif=exif,
            max_pixels=max_pixels,
        )

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    def open_rows(self, state: dict[str, int]) -> tuple[Pool, Iterator["_Row"]]:
        """A pool, and the rows of all processes from a state on."""
        if self._kept is None:
            if self.loader.bad_rows == "skip":
                _require_a_good_record(self.loader, self.order.window(0, 0)[:TRIED])
            pool = Pool(self.loader, self.workers)
            if not self.keep:
                return pool, _all_rows(self, state, pool)
            try:
                self._kept = pool, list(_all_rows(self, START, pool))
            except BaseException:
                pool.close()
                raise
        return self._kept[0], iter(self._kept[1])

    def close(self) -> None:
        """Ends the workers that `keep` has kept."""
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None

    def count_rows(self) -> int:
        """How many rows one epoch has in every `process_count`-th window; reads and tokenises these, opens no image."""
        windows = range(self.process_index, self.order.windows, self.process_count)
        with Pool(self.loader, self.workers) as pool:
            texts = (_Window(self.order, pool, 0, window).texts() for window in windows)
            return sum(len(_pack(self.loader, found)[0]) for found in texts)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The numbers of the records, epoch by epoch, in windows."""

    mixture: Mixture
    seed: int
    shuffle: bool

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return math.ceil(sum(self.mixture.counts) / WINDOW)

    def window(self, epoch: int, window: int) -> list[int]:
        order = self._epoch(epoch)
        return [order[i] for i in range(window * WINDOW, min((window + 1) * WINDOW, len(order)))]

    def _epoch(self, epoch: int) -> grain.MapDataset:
        parts = []
        starts, counts = self.mixture.starts, self.mixture.counts
        for part, (start, stop, count) in enumerate(zip(starts[:-1], starts[1:], counts, strict=True)):
            numbers = grain.MapDataset.range(start, stop)
            if self.shuffle:
                numbers = numbers.shuffle(seed=(self.seed + part) % 2**32)  # anew in each of the repeats
            parts.append(numbers.repeat()[epoch * count : (epoch + 1) * count])
        order = grain.MapDataset.concatenate(parts)
        return order.shuffle(seed=(self.seed * 1_000_003 + epoch) % 2**32) if self.shuffle else order

    def rows(self, count: int, epoch: int, window: int) -> Sequence[int]:
        """In which order the rows of a window come: packing puts those of many records first."""
        if not self.shuffle:
            return range(count)
        return np.random.default_rng((self.seed % 2**32, epoch, window)).permutation(count).tolist()


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._state = START
        self._pool: Pool | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return self._next()
        except BaseException:
            self.close()  # after an error, the next call begins again where this one did
            raise

    def _next(self) -> dict[str, np.ndarray]:
        batches = self._batches
        here = batches.batch_size // batches.process_count
        if self._pool is None:
            self._pool, self._rows = batches.open_rows(self._state)
            self._pending = deque()
        while len(self._pending) < 2 + 2 * batches.workers // here:
            rows = list(itertools.islice(self._rows, batches.batch_size))
            if not rows:
                break
            mine = rows[batches.process_index * here :][:here]
            images = [self._pool.submit("images", row.numbers) for row in mine]
            self._pending.append((mine, images, rows[-1].after))
        if not self._pending:
            raise StopIteration
        rows, images, after = self._pending.popleft()
        batch = self._stack(rows, [future.result() for future in images])
        self._state = after
        return batch

    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._state = dict(state)

    def close(self) -> None:
        super().close()
        if self._pool is not None and not sys.is_finalizing():  # at exit, Python ends threads and processes itself
            if not self._batches.keep:
                self._pool.close()
            self._pool = None

    def _stack(self, rows: Sequence["_Row"], images: Sequence[list[np.ndarray | str]]) -> dict[str, np.ndarray]:
        loader = self._batches.loader
        shape = (self._batches.batch_size // self._batches.process_count, loader.sequence_length)
        slots = (shape[0], loader.tiles_per_sequence)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "labels": np.full(shape, IGNORE, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "images": np.zeros((*slots, loader.image_size, loader.image_size, 3), np.uint8),
            "image_segment_ids": np.zeros(slots, np.int32),
        }
        skipped = Counter()
        for b, (row, found) in enumerate(zip(rows, images, strict=True)):
            start = slot = segment = 0
            skipped += row.skipped
            for text, tiles in zip(row.texts, found, strict=True):
                if isinstance(tiles, str):  # its images turned out to be bad: the records after it move up
                    skipped[tiles] += 1
                    continue
                segment += 1
                place, places = slice(start, start + len(text.tokens)), slice(slot, slot + len(tiles))
                batch["tokens"][b, place], batch["labels"][b, place] = text
                batch["positions"][b, place] = np.arange(len(text.tokens))
                batch["segment_ids"][b, place] = segment
                batch["images"][b, places], batch["image_segment_ids"][b, places] = tiles, segment
                start, slot = place.stop, places.stop
        return batch | {"skipped": np.array([skipped[reason] for reason in REASONS], np.int32)}


def _all_rows(batches: Batches, state: dict[str, int], pool: Pool) -> Iterator["_Row"]:
    """The rows of all processes, from a state on; the next window is tokenised while rows of this one are taken."""
    done, skipped = state["row"], Counter()
    windows = _windows(batches, state, pool)
    window = next(windows, None)
    while window is not None:
        following, texts = next(windows, None), window.texts()
        rows, bad = _pack(batches.loader, texts)
        skipped += bad if done == 0 else Counter()
        order = batches.order.rows(len(rows), window.epoch, window.number)
        for place in range(done, len(rows)):
            if following is not None:
                following.ask((place + 1) / len(rows))
            row = rows[order[place]]
            after = {"epoch": window.epoch, "window": window.number, "row": place + 1}
            yield _Row([window.numbers[i] for i in row], [texts[i] for i in row], skipped, after)
            skipped = Counter()
        window, done = following, 0


def _windows(batches: Batches, state: dict[str, int], pool: Pool) -> Iterator["_Window"]:
    epoch, first = state["epoch"], state["window"]
    while batches.epochs is None or epoch < batches.epochs:
        for number in range(first, batches.order.windows):
            yield _Window(batches.order, pool, epoch, number)
        epoch, first = epoch + 1, 0


@dataclasses.dataclass
class _Row:
    """A row to be made: its records and their texts, what was skipped before it, and the state after it."""

    numbers: list[int]
    texts: list[Example]
    skipped: Counter
    after: dict[str, int]


class _Window:
    """The texts of a window's records, asked for little by little."""

    def __init__(self, order: _Order, pool: Pool, epoch: int, number: int):
        self.epoch, self.number, self.numbers = epoch, number, order.window(epoch, number)
        self._pool, self._asked = pool, []

    def ask(self, share: float = 1.0) -> None:
        """Lets the workers tokenise the first `share` of the records."""
        for first in range(CHUNK * len(self._asked), math.ceil(share * len(self.numbers)), CHUNK):
            self._asked.append(self._pool.submit("texts", self.numbers[first : first + CHUNK]))

    def texts(self) -> list[Example | str]:
        """The text of each record, or the reason why it cannot be used."""
        self.ask()
        return [text for future in self._asked for text in future.result()]


def _pack(loader: Loader, texts: Sequence[Example | str]) -> tuple[list[list[int]], Counter]:
    """The rows of a window's good texts, as places in `texts`, and the reasons of the bad ones."""
    good = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    images = [np.count_nonzero(texts[i].tokens == IMAGE_TOKEN_ID) // loader.tokens_per_image for i in good]
    rows = pack([len(texts[i].tokens) for i in good], images, loader.sequence_length, loader.tiles_per_sequence)
    return [[good[i] for i in row] for row in rows], Counter(text for text in texts if isinstance(text, str))


def _require_a_good_record(loader: Loader, numbers: Sequence[int]) -> None:
    first = None
    for number in numbers:
        try:
            loader.text(number)
            loader.pixels(number)
            return
        except BadRow as bad:
            first = first or bad
    raise UserError(f"none of the first {len(numbers)} rows can be used, the first for this reason: {first}")
