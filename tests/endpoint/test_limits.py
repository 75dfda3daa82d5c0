import asyncio
import email.utils

import numpy as np
import pytest
from virtual_time import run

from llava_jax.endpoint.cancel import CancelToken
from llava_jax.endpoint.errors import NotSentError
from llava_jax.endpoint.limits import MAX_BACKOFF, RateLimit, backoff, retry_after


async def send_for(limit: RateLimit, minutes: float, latency: float, expected: float = 0.0, actual=None, workers=50):
    """Times and sizes of what 50 workers send in so many minutes."""
    loop, cancel, sent = asyncio.get_running_loop(), CancelToken(), []

    async def work() -> None:
        while True:
            await limit.wait(expected, cancel)
            if loop.time() >= minutes * 60:
                return
            size = actual(len(sent)) if actual else expected
            sent.append((loop.time(), size))
            await asyncio.sleep(latency)
            limit.correct(expected, size)

    await asyncio.gather(*(work() for _ in range(workers)))
    return np.array(sent)


def fullest_minute(sent: np.ndarray, of: int) -> float:
    """The most that any window of 60 seconds holds: of requests (0) or of tokens (1)."""
    weights = sent[:, 1] if of else np.ones(len(sent))
    return max(weights[(sent[:, 0] >= t) & (sent[:, 0] < t + 60 - 1e-6)].sum() for t in sent[:, 0])


@pytest.mark.parametrize("rate, latency", [(60, 2.0), (500, 3.0), (1000, 0.01)])
def test_requests_per_minute_are_reached_and_never_passed(rate, latency):
    sent = run(send_for(RateLimit(rate), 10, latency))
    assert fullest_minute(sent, of=0) <= rate
    assert len(sent) >= 0.985 * rate * 10


@pytest.mark.parametrize("expected", [100, 1000, 3000])
def test_tokens_per_minute_are_kept_though_the_estimate_is_wrong(expected):
    sent = run(send_for(RateLimit(None, 100_000), 10, 2.0, expected, lambda i: 500 + i % 7 * 100))
    later = sent[sent[:, 0] >= 60]  # a wrong estimate is known after the first replies
    assert later[:, 1].sum() / 9 == pytest.approx(100_000, rel=0.02)


def test_the_tighter_limit_holds():
    assert len(run(send_for(RateLimit(60, 6000), 10, 1.0, expected=10))) == pytest.approx(594, rel=0.01)
    assert len(run(send_for(RateLimit(60, 6000), 10, 1.0, expected=1000))) == pytest.approx(60, rel=0.02)


def test_without_limits_nothing_waits():
    assert len(run(send_for(RateLimit(), 1, 1.0))) == 60 * 50


def test_a_pause_holds_for_all_and_is_followed_by_no_burst():
    async def main():
        limit = RateLimit(60)
        asyncio.get_running_loop().call_later(30.5, limit.pause, 20)
        return await send_for(limit, 2, 5.0)

    times = run(main())[:, 0]
    assert not ((times > 30.5) & (times < 50.5)).any()
    assert times[times > 30.5].min() == pytest.approx(50.5)
    assert np.diff(times).min() == pytest.approx(1 / 0.99)
    assert len(times) == pytest.approx(100, abs=2)


def test_who_waits_is_told_to_stop():
    async def main():
        limit, cancel = RateLimit(1), CancelToken()
        await limit.wait(0, cancel)
        asyncio.get_running_loop().call_later(3, cancel.request)
        with pytest.raises(NotSentError):
            await limit.wait(0, cancel)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(3)


NOW = 1_790_000_000.0


@pytest.mark.parametrize("headers, seconds", [
    ({}, None), ({"retry-after": "2"}, 2), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
    ({"retry-after": email.utils.formatdate(NOW + 40, usegmt=True)}, 40),
    ({"retry-after": email.utils.formatdate(NOW - 40, usegmt=True)}, 0),
    ({"retry-after": "-3"}, 0), ({"retry-after": "soon"}, None), ({"retry-after": "nan"}, None),
    ({"retry-after": "inf"}, None),
])
def test_retry_after(headers, seconds):
    assert retry_after(headers, NOW) == seconds


def test_backoff_doubles_within_bounds():
    assert [backoff(n, 1.0) for n in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert backoff(1, 0.0) == 0.5
    assert backoff(1000, 1.0) == MAX_BACKOFF
