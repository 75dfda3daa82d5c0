"""Requests of like shape together, their images opened ahead of the device."""

import contextlib
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Row = TypeVar("Row")
Opened = TypeVar("Opened")

PREFETCHED_BATCHES = 2
"""Batches that are made ready while the device works on one."""

IMAGE_THREADS = 4
"""Threads that open images."""

CACHED_IMAGES = 64
"""Opened images that are kept for the next requests."""


def group_batches(rows: Iterable[tuple[Hashable, Row]], size: int) -> Iterator[tuple[list[Row], int]]:
    """Rows of one kind, up to `size` of them, and how many the batch is to be filled up to.

    A batch comes when its kind has enough rows, the smaller ones at the end. Where there was a whole batch of a kind, a
    smaller one gets its size, so that no program is compiled for it.
    """
    bins: dict[Hashable, list[Row]] = defaultdict(list)
    ready, whole = deque(), set()
    for kind, row in rows:
        bins[kind].append(row)
        if len(bins[kind]) == size:
            whole.add(kind)
            ready.append((bins.pop(kind), size))
        if len(ready) > PREFETCHED_BATCHES:
            yield ready.popleft()
    yield from ready
    yield from ((rows, size if kind in whole else len(rows)) for kind, rows in bins.items())


@contextlib.contextmanager
def image_opener(function: Callable[[Sequence], Opened]) -> Iterator[Callable[[Sequence], Future[Opened]]]:
    """`function` of some images, in threads; once for requests that follow each other with the same paths or bytes.

    After an error what is not begun is left.
    """
    pool = ThreadPoolExecutor(IMAGE_THREADS)
    recent = functools.lru_cache(CACHED_IMAGES)(lambda images: pool.submit(function, images))

    def submit(images: Sequence) -> Future[Opened]:
        known = all(isinstance(image, Hashable) for image in images)  # PIL's are not
        return recent(tuple(images)) if known else pool.submit(function, images)

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)
