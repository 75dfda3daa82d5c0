"""An event loop whose clock jumps to the next timer, so that waits cost nothing and are exact."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select

        def jump(timeout: float | None) -> Any:
            events = select(0)
            if not events and timeout is None:
                raise RuntimeError("all tasks wait for nothing")
            if not events:
                self._now += max(timeout, 1e-9)  # never nothing: a timer may be due between two floats
            return events

        self._selector.select = jump

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """At once: no time passes while a thread works."""
        future = self.create_future()
        future.set_result(func(*args))
        return future


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
