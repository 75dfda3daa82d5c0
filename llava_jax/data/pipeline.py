"""Packed training rows with Grain: record numbers -> examples (in worker processes) -> rows -> batches.

Several conversations, each with none, one or several images, share a row of fixed length; their images share a fixed
number of slots. Packing is done in the main process, in the order of the records, so the rows do not depend on the
number of workers.
"""

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from llava_jax.data.examples import Loader, load_in_worker, start_workers
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Source
from llava_jax.text import templates
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID
from llava_jax.text.tokenizer import Tokenizer

BINS = 16  # rows that are filled side by side: more waste less, but hold more images and replay more on resume
SKIPS_PER_ROW = 16
CHUNK, AHEAD = 8, 16  # examples per task of a worker, and tasks (at least two per worker) asked for ahead
TRIED = 1000  # first rows of which at least one must be good


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
    loader = Loader(
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
        _require_a_good_row(loader, numbers, min(-(-total // process_count), TRIED))
    rows = FirstFitPackIterDataset(
        _Examples(numbers, loader, workers),
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


class _Examples(grain.IterDataset):
    """The examples of `numbers` in order, made ahead by worker processes.

    Stands in for Grain's `mp_prefetch`, whose state holds only for one number of workers, whose workers import JAX,
    and which passes arrays in shared memory (slower than a pipe at these sizes; Docker gives 64 MB of it).
    """

    def __init__(self, numbers: grain.MapDataset, loader: Loader, workers: int):
        super().__init__(numbers)
        self._iterator = functools.partial(_ExamplesIterator, numbers, loader, workers)

    def __iter__(self) -> grain.DatasetIterator:
        return self._iterator()


class _ExamplesIterator(grain.DatasetIterator):
    def __init__(self, numbers: grain.MapDataset, loader: Loader, workers: int):
        super().__init__()
        self._numbers, self._loader, self._workers = numbers, loader, workers
        self._executor, self._taken = None, 0

    def __next__(self) -> dict[str, np.ndarray]:
        if self._executor is None:
            self._executor = start_workers(self._loader, self._workers)
            self._pending, self._ready, self._asked = deque(), deque(), self._taken
        while len(self._pending) < max(AHEAD, 2 * self._workers) and self._asked < len(self._numbers):
            chunk = range(self._asked, min(self._asked + CHUNK, len(self._numbers)))
            self._pending.append(self._executor.submit(load_in_worker, [self._numbers[i] for i in chunk]))
            self._asked = chunk.stop
        if not self._ready:
            if not self._pending:
                self._stop()
                raise StopIteration
            self._ready.extend(self._pending.popleft().result())
        self._taken += 1
        return self._ready.popleft()

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._taken = state["taken"]

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _require_a_good_row(loader: Loader, numbers: grain.MapDataset, count: int) -> None:
    first = None
    for i in range(count):
        try:
            loader.load(numbers[i])
            return
        except BadRow as bad:
            first = first or bad
    raise ValueError(f"none of the first {count} rows can be used, the first for this reason: {first}")


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
