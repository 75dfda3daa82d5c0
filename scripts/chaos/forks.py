"""One call in a process of its own, with limits of time and memory."""

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.errors import UserError

LARGEST = 2 * 2**30
"""Bytes of memory that a process may grow by."""


@dataclass(frozen=True)
class Result:
    """How a call ended.

    Attributes:
      kind: "ok", "told" (UserError), "traceback" (another exception), "hang", "memory" (more than LARGEST), "died".
      text: the value as JSON has it, the message, or the end of the traceback.
      output: what the call wrote on stdout and stderr.
    """

    kind: str
    text: Any
    output: str = ""


def attempt(call: Callable[[], Any], folder: Path, seconds: int) -> Result:
    """Calls `call` in a forked process, which writes its notes in `folder`."""
    return next(attempt_all([(call, folder)], seconds, 1))[1]


def attempt_all(calls, seconds: int, jobs: int) -> Iterator[tuple[Any, Result]]:
    """Yields (folder, Result) for every (call, folder) of an iterable, as they end, `jobs` at a time.

    A call may use so many seconds of processor time, and ten times as many by the clock.
    """
    running: dict[int, tuple[Path, int]] = {}
    calls = iter(calls)
    while True:
        while len(running) < jobs and (pair := next(calls, None)) is not None:
            before = _memory_pages()[1]
            running[_fork(*pair, seconds)] = pair[1], before * os.sysconf("SC_PAGE_SIZE")
        if not running:
            return
        pid, status, usage = os.wait4(-1, 0)
        if pid in running:
            folder, before = running.pop(pid)
            yield folder, _read(folder, status, usage.ru_maxrss * 1024 - before)


def _memory_pages() -> list[int]:
    """Returns the pages of addresses, and those in memory, of this process."""
    return [int(count) for count in Path("/proc/self/statm").read_text().split()[:2]]


def _fork(call: Callable[[], Any], folder: Path, seconds: int) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # The default action ends the process, whatever it is at. On a busy machine the clock runs ahead of the work.
        signal.alarm(10 * seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        size = _memory_pages()[0] * os.sysconf("SC_PAGE_SIZE")
        # Addresses are not memory: XLA reserves more than it uses, so the limit here only stops the worst.
        resource.setrlimit(resource.RLIMIT_AS, (size + 3 * LARGEST,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            result = ["ok", call()]
        except UserError as error:
            result = ["told", str(error)]
        except SystemExit as ended:
            result = ["ok", f"exit {ended.code}"]
        except BaseException:
            result = ["traceback", traceback.format_exc()[-4000:]]
        sys.stdout.flush(), sys.stderr.flush()
        (folder / "result.json").write_text(json.dumps(result, default=str))
        code = 0
    os._exit(code)


def _read(folder: Path, status: int, memory: int) -> Result:
    output = folder / "output.txt"
    written = output.read_bytes().decode(errors="replace") if output.exists() else ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU):
        return Result("hang", "time is up", written)
    if memory > LARGEST:
        return Result("memory", f"{memory / 1e9:.1f} GB", written)
    if status or not (folder / "result.json").exists():
        return Result("died", f"status {status}", written)
    kind, text = json.loads((folder / "result.json").read_text())
    return Result(kind, text, written)
