"""Processes that call one function, which is sent to them once; results come back in order."""

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
"""Signals that are for the main process, which then stops the workers. A terminal or scheduler sends them to all."""

PIPE = 1 << 20  # bytes; the most that Linux grants without privileges


class Pool:
    """`workers` processes that call `function`; with 0 workers, a thread of this process does.

    `function` is pickled, once for each process, so what it holds should be small. Use it in a `with` statement, or
    call `close`, which kills the processes, or waits for calls that have begun if `function` `writes`. A process
    imports what `function` imports and nothing more.
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

                # Linux: results, such as pixels, cross at once and not in pieces of 64 KB; a tenth of decoding's time.
                fcntl.fcntl(self._executor._result_queue._writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE)

    def submit(self, *arguments: Any) -> Future:
        """`function(*arguments)`, some time later."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a process that starts here inherits this
        try:
            return self._executor.submit(_call, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """`function(task)` for every task, in their order; as many are under way as keep the processes busy."""
        pending: deque[Future] = deque()
        for task in tasks:
            pending.append(self.submit(task))
            if len(pending) > 2 * max(self.workers, 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Ends the processes, and drops what has not begun."""
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
    """Tells glibc to keep what is freed, for this process. Large buffers, XLA's on a CPU and those of images, otherwise
    come from the kernel anew each time, zeroed page by page. Elsewhere than on glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28)):
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
