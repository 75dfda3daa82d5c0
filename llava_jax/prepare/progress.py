"""Runs tasks in worker processes, with a progress bar."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from llava_jax.data.workers import Pool

LINE_SECONDS = 60.0
"""Seconds between lines of progress, where there is no terminal."""
LINE = "{n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} to go"


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], rows: Sequence[int], workers: int, done: int = 0,
    writes: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """Yields `function(task)` for every task, in the order of the tasks.

    `rows[i]` is the number of rows in `tasks[i]`, and `done` is the number of rows that were finished before. Terminals
    show a bar, other outputs a line a minute. With `writes`, the tasks write files, and a stopped command can continue.
    """
    bar = tqdm(total=done + sum(rows), initial=done, unit=" rows", disable=None)
    now, start, shown = done, time.monotonic(), time.monotonic()
    stopping = _stopping_at_once() if writes else contextlib.nullcontext()
    with Pool(function, min(workers, len(tasks)), writes=writes) as pool, bar, stopping:
        for result, count in zip(pool.map(tasks), rows, strict=True):
            bar.update(count)
            now += count
            if bar.disable and time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                line = tqdm.format_meter(now, bar.total, shown - start, initial=done, unit=" rows", bar_format=LINE)
                print(line, file=sys.stderr, flush=True)
            yield result


@contextlib.contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Ends the program on Ctrl-C without waiting for the workers, which end with it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr, flush=True)
        os._exit(130)
