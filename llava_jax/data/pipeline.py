"""Packed training rows with Grain: record numbers -> examples (in worker processes) -> rows -> batches.

Several conversations, each with none, one or several images, share a row of fixed length; their images share a fixed
number of slots. Packing is done in the main process, in the order of the records, so the rows do not depend on the
number of workers.
"""

import bisect
import dataclasses
import functools
import itertools
import os
import signal
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import flags
from grain.experimental import DatasetOptions, FirstFitPackIterDataset, WithOptionsIterDataset

from llava_jax.data.records import REASONS, BadRow, Record
from llava_jax.data.sources import Source
from llava_jax.images import open_image, prepare
from llava_jax.text import templates
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, Example, NoSupervisedTokens, TooLong, encode_conversation
from llava_jax.text.tokenizer import Tokenizer

BINS = 16  # rows that are filled side by side: more waste less, but hold more images and replay more on resume
SKIPS_PER_ROW = 16
AHEAD = 128  # examples that are prepared ahead in all
TRIED = 1000  # rows of which at least one must be good


def packed_rows(
    sources: Sequence[Source],
    *,
    tokenizer: Tokenizer,
    template: str | templates.Template,
    tokens_per_image: int,
    image_size: int,
    image_mode: str,
    row_length: int,
    images_per_row: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    decode_images: bool = True,
) -> grain.IterDataset:
    """Rows of `row_length` tokens (T) and `images_per_row` image slots (I), as dicts of numpy arrays:

    tokens int32 [T]: IMAGE_TOKEN_ID at every visual token's place, the k-th of them belongs to the k-th visual token
        of the row's images in order; 0 where segment_ids is 0
    labels int32 [T]: the token where it is learned, else -100; not shifted
    positions, segment_ids int32 [T]: position in the conversation; its number in the row from 1 on, 0 for padding
    images uint8 [I, image_size, image_size, 3], image_segment_ids int32 [I]: 0 for an empty slot
    skipped int32 [SKIPS_PER_ROW]: 1 + index into REASONS of each row skipped on the way, else 0

    All sources are one data set, shuffled anew in every epoch with `seed`, for `epochs` epochs (None: for ever), of
    which this process takes every `process_count`-th record. An epoch may end in the middle of a row; the last rows of
    the last epoch are given out part full. The iterator's state is small, fits JSON, and continues bit for bit, with
    any number of workers.

    A row that cannot be used raises BadRow if `bad_rows` is "error", and else is skipped and counted. Raises
    ValueError if there are fewer rows than processes, or if of the first rows every one is bad. `decode_images=False`
    leaves the images out (their arrays hold no pixels) and keeps everything else.
    """
    total = sum(len(source) for source in sources)
    if total < process_count:
        names = ", ".join(source.path for source in sources)
        raise ValueError(f"{names}: {total} rows for {process_count} processes, each of which needs at least one")
    load = _Load(
        sources=tuple(sources),
        starts=tuple(itertools.accumulate((len(source) for source in sources), initial=0)),
        tokenizer=tokenizer,
        template=templates.get(template),
        tokens_per_image=tokens_per_image,
        image_shape=(image_size, image_size, 3) if decode_images else (0,),
        image_mode=image_mode,
        row_length=row_length,
        images_per_row=images_per_row,
        bad_rows=bad_rows,
    )
    numbers = grain.MapDataset.range(total)
    if shuffle:
        numbers = numbers.shuffle(seed)
    numbers = numbers.repeat(epochs)[process_index::process_count]
    if bad_rows == "skip":
        _require_a_good_row(load, [numbers[i] for i in range(min(-(-total // process_count), TRIED))])
    rows = FirstFitPackIterDataset(
        _Examples(numbers.map(load), workers),
        length_struct=dict(tokens=row_length, labels=row_length, images=images_per_row, skipped=SKIPS_PER_ROW),
        padding_struct=dict(tokens=None, labels=IGNORE, images=None, skipped=None),
        num_packing_bins=BINS,
        shuffle_bins=shuffle,
        seed=seed,
    )
    return rows.map(functools.partial(_finish_row, tokens_per_image=tokens_per_image))


def batches(batch_size: int, **rows: Any) -> grain.IterDataset:
    """Batches of `batch_size` of the rows that `packed_rows(**rows)` gives; the last one is filled up with padding."""
    return packed_rows(**rows).batch(batch_size, batch_fn=functools.partial(_stack, batch_size=batch_size))


def count_rows(**rows: Any) -> int:
    """How many rows `packed_rows(**rows)` gives this process in one epoch.

    Reads and tokenises the whole data set, but opens no image: a broken one counts as good here, a missing one as bad.
    """
    return sum(1 for _ in packed_rows(**{**rows, "epochs": 1, "decode_images": False}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Load:
    """A record's number -> its example: tokens, labels, images, skipped. Runs in the worker processes."""

    sources: tuple[Source, ...]
    starts: tuple[int, ...]  # number of each source's first record
    tokenizer: Tokenizer
    template: templates.Template
    tokens_per_image: int
    image_shape: tuple[int, ...]
    image_mode: str
    row_length: int
    images_per_row: int
    bad_rows: Literal["error", "skip"]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        try:
            return self.example(number)
        except BadRow as bad:
            if self.bad_rows == "error":
                raise
            # Without tokens and images it fits into any row, which carries its reason to the metrics.
            return self._element([], [], [], skipped=[1 + REASONS.index(bad.reason)])

    def example(self, number: int) -> dict[str, np.ndarray]:
        which = bisect.bisect_right(self.starts, number) - 1
        record = self.sources[which][number - self.starts[which]]
        tokens, labels = self._encode(record)
        return self._element(tokens, labels, [self._tile(path, record) for path in record.images])

    def _encode(self, record: Record) -> Example:
        images = len(record.images)
        if images > self.images_per_row:
            message = f"{images} images do not fit into the {self.images_per_row} slots of a row (data.images_per_row)"
            raise BadRow("too_long", f"{record.source}: {message}")
        try:
            example = encode_conversation(
                record.turns, self.template, self.tokenizer, self.tokens_per_image, max_length=self.row_length
            )
        except NoSupervisedTokens as error:
            raise BadRow("no_supervised_tokens", f"{record.source}: {error}") from None
        except TooLong as error:
            raise BadRow("too_long", f"{record.source}: {error} (data.row_length)") from None
        except ValueError as error:
            raise BadRow("malformed", f"{record.source}: {error}") from None
        used = np.count_nonzero(example.tokens == IMAGE_TOKEN_ID) // self.tokens_per_image
        if used != images:  # <image> stood in a turn that the template leaves out
            raise BadRow("image_count", f"{record.source}: {images} images, but {used} in the turns that are used")
        return example

    def _tile(self, path: str, record: Record) -> np.ndarray:
        try:
            if self.image_shape == (0,):
                if not os.path.isfile(path):
                    raise FileNotFoundError(f"{path}: no such image file")
                return np.zeros(self.image_shape, np.uint8)
            (tile,) = prepare(open_image(path), self.image_shape[0], self.image_mode)
            return tile
        except FileNotFoundError as error:
            raise BadRow("missing_image", f"{record.source}: {error}") from None
        except ValueError as error:
            raise BadRow("broken_image", f"{record.source}: {error}") from None

    def _element(self, tokens, labels, tiles, skipped=()) -> dict[str, np.ndarray]:
        return {
            "tokens": np.asarray(tokens, np.int32),
            "labels": np.asarray(labels, np.int32),
            "images": np.stack(tiles) if tiles else np.zeros((0, *self.image_shape), np.uint8),
            "skipped": np.asarray(skipped, np.int32),
        }


class _Examples(grain.IterDataset):
    """Elements in order, made ahead by worker processes (0: by one thread).

    Unlike `mp_prefetch` alone, its state is the number of elements taken, whatever the number of workers.
    """

    def __init__(self, examples: grain.MapDataset, workers: int):
        super().__init__(examples)
        self._examples, self._workers = examples, workers

    def __iter__(self) -> grain.DatasetIterator:
        return _ExamplesIterator(self._examples, self._workers)


class _ExamplesIterator(grain.DatasetIterator):
    def __init__(self, examples: grain.MapDataset, workers: int):
        super().__init__()
        self._examples, self._workers = examples, workers
        self._taken, self._ahead = 0, None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._ahead is None:
            self._ahead = self._start()
        example = next(self._ahead)
        self._taken += 1
        return example

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._taken = state["taken"]

    def close(self) -> None:
        super().close()
        self._stop()

    def _start(self) -> grain.DatasetIterator:
        rest = self._examples[self._taken :]
        if not self._workers:
            return iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only absl's own main function parses
            flags.FLAGS.mark_as_parsed()
        in_order = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        # Shared memory costs more than a pipe for arrays of this size, and containers give little (Docker: 64 MB).
        piped = WithOptionsIterDataset(in_order, DatasetOptions(min_shm_size=2**62))
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=max(AHEAD // self._workers, 1))
        return iter(piped.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_the_main_process))

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _leave_interrupts_to_the_main_process(worker: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _require_a_good_row(load: _Load, numbers: Sequence[int]) -> None:
    first = None
    for number in numbers:
        try:
            load.example(number)
            return
        except BadRow as bad:
            first = first or bad
    raise ValueError(f"none of the first {len(numbers)} rows can be used, the first for this reason: {first}")


def _finish_row(row: dict[str, np.ndarray], tokens_per_image: int) -> dict[str, np.ndarray]:
    """Keeps one set of positions and segment ids, and closes the gaps that skipped rows left in the numbering."""
    segment_ids, image_segment_ids = row["tokens_segment_ids"], row["images_segment_ids"]
    visual = segment_ids[row["tokens"] == IMAGE_TOKEN_ID]
    if not np.array_equal(visual, np.repeat(image_segment_ids[image_segment_ids > 0], tokens_per_image)):
        raise RuntimeError("packing mixed up images and visual tokens: a fault in llava_jax, not in the data")
    present = np.unique(np.append(segment_ids, 0))
    return {
        "tokens": row["tokens"],
        "labels": row["labels"],
        "positions": row["tokens_positions"],
        "segment_ids": np.searchsorted(present, segment_ids).astype(np.int32),
        "images": row["images"],
        "image_segment_ids": np.searchsorted(present, image_segment_ids).astype(np.int32),
        "skipped": row["skipped"],
    }


def _stack(rows: Sequence[dict[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
    padding = {name: np.full_like(value, IGNORE if name == "labels" else 0) for name, value in rows[0].items()}
    rows = [*rows, *[padding] * (batch_size - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in padding}
