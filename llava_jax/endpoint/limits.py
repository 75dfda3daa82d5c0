"""When the next request may go: the server's limits, its Retry-After, and back-off."""

import asyncio
import email.utils
import math
from collections.abc import Mapping

from llava_jax.endpoint.cancel import CancelToken

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds of back-off, which doubles from one to the other
MARGIN = 0.99  # of a limit is used, so that what comes 0.6 s early or late on its way does not crowd a minute


class RateLimit:
    """Lets requests go one after another, each at its time, so that no minute holds more than it may.

    Idle time gives no credit, and a late start delays nothing after it: while requests wait, MARGIN of the rate is
    reached exactly, and it is never passed. None is no limit.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self._per_request = 60 / (MARGIN * requests_per_minute) if requests_per_minute else 0.0
        self._per_token = 60 / (MARGIN * tokens_per_minute) if tokens_per_minute else 0.0
        self._free = self._paused = -math.inf  # the loop's times
        self._queue = asyncio.Lock()

    async def wait(self, tokens: float, cancel: CancelToken) -> None:
        """Waits until a request of about that many tokens (prompt and answer) may be sent.

        Raises NotSentError if `cancel` is requested meanwhile.
        """
        clock = asyncio.get_running_loop().time
        arrived = clock()
        async with self._queue:
            while (turn := max(arrived, self._free, self._paused)) > (now := clock()):
                await cancel.sleep(turn - now)
            await cancel.sleep(0)
            self._free = turn + self._seconds(tokens)

    def correct(self, expected: float, actual: float) -> None:
        """Says how many tokens a request had that went as one of `expected`."""
        self._free += self._seconds(actual) - self._seconds(expected)

    def pause(self, seconds: float) -> None:
        """Nothing goes for so long."""
        self._paused = max(self._paused, asyncio.get_running_loop().time() + seconds)

    def _seconds(self, tokens: float) -> float:
        return max(self._per_request, tokens * self._per_token)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait, from Retry-After-Ms or Retry-After, which holds seconds or a date; or None.

    Args:
      headers: by names in small letters, or regardless of it.
      now: seconds since 1970.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - now)
    except (KeyError, ValueError):
        return None


def backoff(tries: int, chance: float) -> float:
    """Seconds before the next try after so many (1, 2, ...): doubled, bounded, and spread by `chance` (0..1)."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(tries - 1, 30)) * (0.5 + 0.5 * chance)
