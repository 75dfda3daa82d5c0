"""Requests of like shape together, their images opened ahead of the device."""

import concurrent.futures
import contextlib
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

Row = TypeVar("Row")

AHEAD = 2
"""Batches that are made ready while the device works on one."""

OPENERS = 4
"""Threads that open images."""


def batches(rows: Iterable[tuple[Hashable, Row]], size: int) -> Iterator[tuple[list[Row], int]]:
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
        if len(ready) > AHEAD:
            yield ready.popleft()
    yield from ready
    yield from ((rows, size if kind in whole else len(rows)) for kind, rows in bins.items())


@contextlib.contextmanager
def openers() -> Iterator[concurrent.futures.Executor]:
    """Threads for images; after an error what they have not begun is left."""
    pool = concurrent.futures.ThreadPoolExecutor(OPENERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
