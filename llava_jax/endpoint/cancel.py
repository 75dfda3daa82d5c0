"""Cancellation by Ctrl-C and SIGTERM: the first signal finishes requests in flight, the second leaves at once."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from llava_jax.cli import STOPPED
from llava_jax.endpoint.errors import NotSentError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CancelToken:
    """Tells a run to start no more requests.

    Attributes:
      signal: Number of the signal that requested it, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Sleeps. Raises NotSentError if cancellation is requested before or meanwhile."""
        if seconds > 0 and not self.requested:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), seconds)
        if self.requested:
            raise NotSentError

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Lets the first SIGINT or SIGTERM request cancellation, and the second one end the running task.

        The task then raises KeyboardInterrupt, or SystemExit(STOPPED) for SIGTERM. Only for the main thread.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        second = None

        def handle(number: int) -> None:
            nonlocal second
            if self.signal is not None:
                second = number
                task.cancel()
            self.signal = self.signal or number
            self.request()

        for number in SIGNALS:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        except asyncio.CancelledError:
            if second == signal.SIGTERM:
                raise SystemExit(STOPPED) from None
            if second is not None:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number] or signal.SIG_DFL)
