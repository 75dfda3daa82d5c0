"""Rate limits, the server's Retry-After, and back-off: the time at which the next request may be sent."""

import asyncio
import email.utils
import math
from collections.abc import Mapping

from llava_jax.endpoint.cancel import CancelToken

MIN_BACKOFF, MAX_BACKOFF = 1.0, 60.0
"""Seconds of back-off, which doubles from the first to the second value."""
MARGIN = 0.99
"""Fraction of a limit that is used, because requests may reach the server 0.6 s early or late."""


class RateLimit:
    """Spaces requests so that no minute has more requests or tokens than the limits. None is no limit.

    Idle time gives no credit, and a late start delays no later request. While requests wait, MARGIN of the rate is
    reached exactly.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self._per_request = 60 / (MARGIN * requests_per_minute) if requests_per_minute else 0.0
        self._per_token = 60 / (MARGIN * tokens_per_minute) if tokens_per_minute else 0.0
        self._free = self._paused = -math.inf  # times of the event loop
        self._queue = asyncio.Lock()

    async def wait(self, tokens: float, cancel: CancelToken) -> None:
        """Waits until a request of about that many tokens (prompt and answer) may be sent.

        Raises NotSentError if `cancel` is requested meanwhile.
        """
        clock = asyncio.get_running_loop().time
        arrived = clock()
        async with self._queue:
            while (start := max(arrived, self._free, self._paused)) > (now := clock()):
                await cancel.sleep(start - now)
            await cancel.sleep(0)
            self._free = start + self._seconds(tokens)

    def correct(self, expected: float, actual: float) -> None:
        """Replaces the expected number of tokens of a request by the actual number."""
        self._free += self._seconds(actual) - self._seconds(expected)

    def pause(self, seconds: float) -> None:
        """Sends nothing for that long."""
        self._paused = max(self._paused, asyncio.get_running_loop().time() + seconds)

    def _seconds(self, tokens: float) -> float:
        return max(self._per_request, tokens * self._per_token)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds that a server asks to wait, or None.

    Reads Retry-After-Ms, and Retry-After in seconds or as a date.

    Args:
      headers: Names in small letters, or a mapping that ignores case.
      now: Seconds since 1970.
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
    """Returns the seconds before the next try: doubled after every try, bounded, and spread by `chance` (0..1)."""
    return min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** min(tries - 1, 30)) * (0.5 + 0.5 * chance)
