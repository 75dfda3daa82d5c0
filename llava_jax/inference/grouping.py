"""Groups requests of similar shape into batches, and opens their images while the device works."""

import contextlib
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Row = TypeVar("Row")
Opened = TypeVar("Opened")

PREFETCHED_BATCHES = 2
"""Number of batches that are prepared while the device works on one."""

IMAGE_THREADS = 4
"""Number of threads that open images."""

CACHED_IMAGES = 64
"""Number of recently opened images that later requests may use again."""


def group_batches(rows: Iterable[tuple[Hashable, Row]], size: int) -> Iterator[tuple[list[Row], int]]:
    """Yields up to `size` rows with the same key, and the number of rows that the batch is to be padded to.

    Full batches come first, smaller ones at the end. A smaller batch is padded to `size` if there was a full one with
    its key, so that no other program is compiled.
    """
    bins: dict[Hashable, list[Row]] = defaultdict(list)
    ready, full = deque(), set()
    for key, row in rows:
        bins[key].append(row)
        if len(bins[key]) == size:
            full.add(key)
            ready.append((bins.pop(key), size))
        if len(ready) > PREFETCHED_BATCHES:
            yield ready.popleft()
    yield from ready
    yield from ((rows, size if key in full else len(rows)) for key, rows in bins.items())


@contextlib.contextmanager
def image_opener(function: Callable[[Sequence], Opened]) -> Iterator[Callable[[Sequence], Future[Opened]]]:
    """Runs `function` of some images in threads, once for recent requests with the same paths or bytes.

    On an error it drops images that no thread has started on.
    """
    pool = ThreadPoolExecutor(IMAGE_THREADS)
    recent = functools.lru_cache(CACHED_IMAGES)(lambda images: pool.submit(function, images))

    def submit(images: Sequence) -> Future[Opened]:
        hashable = all(isinstance(image, Hashable) for image in images)  # PIL's are not
        return recent(tuple(images)) if hashable else pool.submit(function, images)

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)
