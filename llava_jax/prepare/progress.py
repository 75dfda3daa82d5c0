"""Runs tasks in worker processes, with a progress bar."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from llava_jax.data.workers import Pool


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], rows: Sequence[int], workers: int, done: int = 0,
    writes: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """Yields `function(task)` for every task, in the order of the tasks.

    `rows[i]` is the number of rows in `tasks[i]`, and `done` is the number of rows that were finished before. The bar
    is shown on terminals only. With `writes`, the tasks write files, and a stopped command can continue.
    """
    bar = tqdm(total=done + sum(rows), initial=done, unit=" rows", disable=None)
    stopping = _stopping_at_once() if writes else contextlib.nullcontext()
    with Pool(function, min(workers, len(tasks)), writes=writes) as pool, bar, stopping:
        for result, count in zip(pool.map(tasks), rows, strict=True):
            bar.update(count)
            yield result


@contextlib.contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Ends the program on Ctrl-C without waiting for the workers, which end with it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr, flush=True)
        os._exit(130)
