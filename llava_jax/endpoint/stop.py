"""Ctrl-C and SIGTERM: once to finish what is in flight, twice to leave."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from llava_jax.endpoint.errors import Unsent

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Tells a run to start nothing more.

    Attributes:
      signal: the number of the signal that asked for it, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._event = asyncio.Event()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    def ask(self) -> None:
        self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, unless the run is asked to stop before or meanwhile: raises Unsent then."""
        if seconds > 0 and not self.asked:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), seconds)
        if self.asked:
            raise Unsent

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM asks to stop, and the second ends the running task: KeyboardInterrupt.

        For coroutines of the main thread.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        twice = False

        def hear(number: int) -> None:
            nonlocal twice
            twice = self.signal is not None
            self.signal = self.signal or number
            self.ask()
            if twice:
                task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, hear, number)
        try:
            yield
        except asyncio.CancelledError:
            if twice:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
