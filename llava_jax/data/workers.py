"""Runs one function in worker processes, which get it once and return results in order."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from llava_jax.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that workers ignore. All processes get them from a terminal or scheduler; the main one stops the workers."""

PIPE_BYTES = 1 << 20
"""Largest size of a pipe that Linux allows without privileges."""


class Pool:
    """Calls `function` in `workers` processes, or in a thread of this process if `workers` is 0.

    `function` is pickled once for each process, so it should be small. Use the pool in a `with` statement, or call
    `close`. That kills the processes, or waits for started calls if `function` `writes`. A process imports only what
    `function` imports.
    """

    def __init__(self, function: Callable[..., Any], workers: int, writes: bool = False):
        if workers < 0:
            raise UserError(f"workers is {workers}: it must be 0 or more")
        self.workers, self.writes = workers, writes
        if workers == 0:
            self._executor = ThreadPoolExecutor(1, "pool", initializer=_set_function, initargs=(function,))
        else:
            # Not forked: JAX's threads do not survive a fork.
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                workers, mp_context=spawn, initializer=_start_process, initargs=(function,)
            )
            with contextlib.suppress(ImportError, AttributeError, OSError):
                import fcntl

                # On Linux, results such as tiles then cross in one write instead of pieces of 64 KB, which cost a tenth
                # of the time of decoding an image.
                fcntl.fcntl(self._executor._result_queue._writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def submit(self, *arguments: Any) -> Future:
        """Returns the future of `function(*arguments)`."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a process that starts here inherits this
        try:
            return self._executor.submit(_call, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields `function(task)` for every task, in order. Runs enough tasks at a time to keep the processes busy."""
        pending: deque[Future] = deque()
        for task in tasks:
            pending.append(self.submit(task))
            if len(pending) > 2 * max(self.workers, 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Stops the processes, and drops calls that have not started."""
        inside = hasattr(_worker, "function")  # garbage may be collected in the pool's own thread, which cannot wait
        processes = list((getattr(self._executor, "_processes", None) or {}).values()) if not self.writes else []
        self._executor.shutdown(wait=not inside and not processes, cancel_futures=True)
        for process in processes:
            process.kill()
        if processes:
            self._executor.shutdown(wait=not inside)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for this process; does nothing without glibc.

    Otherwise the kernel allocates large buffers, such as XLA's on a CPU and those of images, anew and zeroes each page.
    XLA allocates in threads of its own, and only the main arena keeps buffers of more than 64 MB. So all use that one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_arena_max, 1)):
        mallopt(option, value)


_worker = threading.local()


def _call(*arguments: Any) -> Any:
    return _worker.function(*arguments)


def _set_function(function: Callable[..., Any]) -> None:
    _worker.function = function


def _start_process(function: Callable[..., Any]) -> None:
    _set_function(function)
    keep_freed_memory()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
