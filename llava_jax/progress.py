"""Shows the progress of long work: a bar on a terminal, otherwise one line a minute."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from llava_jax.cli import printable

SECONDS_PER_LINE = 60.0
"""Seconds between two lines without a terminal."""


class Progress:
    """Shows on stderr how many units are done, their rate, the time left and a note.

    Args:
      total: number of units, if known.
      done: number of units that were finished before. They do not count towards the rate.
      unit: plural name of a unit.
      name: name of the work, in front of the line.
      note: function that returns the newest figures as a short text.
      enabled: whether this process shows anything.
    """

    def __init__(self, total: int | None = None, done: int = 0, unit: str = "jobs", name: str = "",
                 note: Callable[[], str] = str, enabled: bool = True):
        self.total, self.done, self.unit, self.name, self.note = total, done, unit, name, note
        self.enabled = enabled
        self._fresh = 0
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=name or None, smoothing=0.05,
                         dynamic_ncols=True, disable=not (enabled and sys.stderr.isatty()))

    def update(self, fresh: bool = True, count: int = 1) -> None:
        """Counts finished units. `fresh` is False if they took no time, as an answer that was found in a log."""
        self.done += count
        self._fresh += fresh * count
        self._bar.update(count)
        if not self._bar.disable:
            self._bar.set_postfix_str(self.note(), refresh=False)
        elif time.monotonic() > self._shown + SECONDS_PER_LINE:
            self.show()

    def show(self) -> None:
        """Shows the newest figures now. Without a terminal this prints a line."""
        self._shown = time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(self.note())
        elif self.enabled:
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Returns one line with all figures."""
        seconds = time.monotonic() - self._start
        rate = self._fresh / seconds if seconds else 0.0
        of = "" if self.total is None else f" of {self.total:,}"
        per = f"{rate:.1f} a second" if rate >= 1 else f"{rate * 60:.3g} a minute"
        parts = [f"{self.name} {self.done:,}{of} {self.unit}".strip(), per]
        if rate and self.total is not None:
            minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join([*parts, *filter(None, [self.note()])])

    def print(self, text: str) -> None:
        """Prints lines beside the bar, safe for a terminal."""
        if self.enabled:
            tqdm.write(printable(text), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
