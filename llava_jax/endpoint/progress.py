"""How far a run is, what it costs, and what was rejected."""

import sys
import time
from collections import Counter

from tqdm import tqdm

from llava_jax.cli import printable
from llava_jax.endpoint.budget import Budget

SECONDS_PER_LINE = 60  # of progress, where there is no terminal


class Progress:
    """A bar on a terminal, else a line a minute on stderr: jobs, rate, time left, cost and rejects by reason.

    Args:
      total: jobs, if known.
      rejects: counted by the caller, shown here.
      unit: what a job is called.
    """

    def __init__(self, total: int | None = None, rejects: Counter[str] | None = None, unit: str = "jobs"):
        self.rejects = Counter() if rejects is None else rejects
        self.asked = self.found = 0
        tty = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=f" {unit}", smoothing=0.05, disable=not tty)
        self._total, self._unit, self._begun = total, unit, time.monotonic()
        self._line = None if tty else self._begun + SECONDS_PER_LINE

    def settled(self, fresh: bool, budget: Budget) -> None:
        """Another job is done; `fresh` if it took a request."""
        self.asked += fresh
        self.found += not fresh
        self._bar.update()
        self._bar.set_postfix_str(self._costs(budget), refresh=False)
        if self._line is not None and time.monotonic() >= self._line:
            self._line = time.monotonic() + SECONDS_PER_LINE
            print(self.line(budget), file=sys.stderr, flush=True)

    def line(self, budget: Budget) -> str:
        """All of it on one line."""
        seconds = time.monotonic() - self._begun
        done, rate = self.asked + self.found, self.asked / seconds if seconds else 0.0
        of = f" of {self._total}" if self._total is not None else ""
        parts = [f"{done}{of} {self._unit}", f"{rate * 60:.3g} a minute"]
        if self._total is not None and rate:
            parts.append(f"{(self._total - done) / rate / 60:.0f} minutes left")
        return ", ".join([*parts, *filter(None, [self._costs(budget)])])

    def say(self, line: str) -> None:
        """Prints a line beside the bar."""
        tqdm.write(printable(line), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _costs(self, budget: Budget) -> str:
        cost = [f"${budget.cost + budget.lost:.2f}"] if budget.price is not None else []
        return ", ".join(cost + [f"{count} {reason}" for reason, count in self.rejects.most_common()])
