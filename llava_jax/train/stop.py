"""Stops a run at the end of a step after SIGTERM or Ctrl-C."""

import signal
from typing import Any

from llava_jax.cli import STOPPED


class Stopped(Exception):
    """Raised after a signal, when everything up to the last step is on disk."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class StopSignal:
    """Context in which SIGTERM and SIGINT request a stop after the current step.

    A further SIGTERM has no effect. Ctrl-C after a request interrupts at once, and the last checkpoint stays valid.
    While there are no steps to save, signals act as they did outside.

    Attributes:
      number: number of the received signal, or 0.
      has_steps: whether there are steps to be saved before a stop. The loop sets it.
    """

    def __enter__(self) -> "StopSignal":
        self.number, self.has_steps = 0, False
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.has_steps:
            if callable(self._handlers[number]):
                self._handlers[number](number, frame)
            raise SystemExit(STOPPED)
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
