"""Ctrl-C and SIGTERM: once to finish what is in flight, twice to leave."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from llava_jax.endpoint.errors import NotSentError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 75  # exit code after SIGTERM, as of sysexits.h and of train


class CancelToken:
    """Tells a run to start nothing more.

    Attributes:
      signal: the number of the signal that asked for it, or None.
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
        """Sleeps, unless the run is asked to stop before or meanwhile: raises NotSentError then."""
        if seconds > 0 and not self.requested:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), seconds)
        if self.requested:
            raise NotSentError

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM asks to stop, and the second ends the running task.

        It ends with KeyboardInterrupt, or for SIGTERM with SystemExit(TERMINATED). For coroutines of the main thread.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        second = None

        def hear(number: int) -> None:
            nonlocal second
            if self.signal is not None:
                second = number
                task.cancel()
            self.signal = self.signal or number
            self.request()

        for number in SIGNALS:
            loop.add_signal_handler(number, hear, number)
        try:
            yield
        except asyncio.CancelledError:
            if second == signal.SIGTERM:
                raise SystemExit(TERMINATED) from None
            if second is not None:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number] or signal.SIG_DFL)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the command with TERMINATED as Ctrl-C does with KeyboardInterrupt: files are closed."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
