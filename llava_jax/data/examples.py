"""A record's number -> its example: parsed, tokenised, its images decoded. What the worker processes do.

Imports neither Grain nor JAX, so that a worker starts in a fraction of a second, is small and holds no device.
"""

import bisect
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Literal

import numpy as np

from llava_jax.data.records import REASONS, BadRow, Record
from llava_jax.data.sources import Source
from llava_jax.images import open_image, prepare
from llava_jax.text.encode import IMAGE_TOKEN_ID, Example, NoSupervisedTokens, TooLong, encode_conversation
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Makes examples of the records of several sources, numbered through.

    An example is a dict of tokens, labels int32 [T] as in text/encode.py, images uint8 [I, *image_shape], and skipped
    int32 [0], or [1] for a bad row that is skipped: 1 + index into REASONS, beside no tokens and no images.
    """

    sources: tuple[Source, ...]
    starts: tuple[int, ...]  # the number of each source's first record
    tokenizer: Tokenizer
    template: Template
    tokens_per_image: int
    image_shape: tuple[int, ...]  # (size, size, 3), or (0,) to open no image
    image_mode: str
    row_length: int
    images_per_row: int
    bad_rows: Literal["error", "skip"]

    def __call__(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self.load_or_skip(number) for number in numbers]

    def load_or_skip(self, number: int) -> dict[str, np.ndarray]:
        """The record's example. A bad row raises BadRow if `bad_rows` is "error", and else gives its skip."""
        try:
            return self.load(number)
        except BadRow as bad:
            if self.bad_rows == "error":
                raise
            return self._example([], [], [], skipped=[1 + REASONS.index(bad.reason)])

    def load(self, number: int) -> dict[str, np.ndarray]:
        """The record's example. Raises BadRow with one line that names file and row."""
        which = bisect.bisect_right(self.starts, number) - 1
        record = self.sources[which][number - self.starts[which]]
        tokens, labels = self._encode(record)
        return self._example(tokens, labels, [self._tile(path, record) for path in record.images])

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
        if used != images:  # an <image> stood in a turn that is left out
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

    def _example(self, tokens, labels, tiles, skipped=()) -> dict[str, np.ndarray]:
        return {
            "tokens": np.asarray(tokens, np.int32),
            "labels": np.asarray(labels, np.int32),
            "images": np.stack(tiles) if tiles else np.zeros((0, *self.image_shape), np.uint8),
            "skipped": np.asarray(skipped, np.int32),
        }


def start_workers(loader: Loader, workers: int) -> Executor:
    """Processes to which `load_in_worker(numbers)` can be submitted; with 0 workers, a thread of this process."""
    if workers == 0:
        return ThreadPoolExecutor(1, thread_name_prefix="examples", initializer=_set_loader, initargs=(loader,))
    # Not forked: JAX's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_process, initargs=(loader,))


_worker = threading.local()


def load_in_worker(numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The examples of these records, made by the loader that the worker was started with."""
    return _worker.loader(numbers)


def _set_loader(loader: Loader) -> None:
    _worker.loader = loader


def _start_process(loader: Loader) -> None:
    _set_loader(loader)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
