"""Counts what the scheduler does, for /metrics."""

import bisect
from dataclasses import dataclass, field
from typing import get_args

from llava_jax.serve.jobs import Reason

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histograms' buckets, ascending."""


class Histogram:
    """Counts values in fixed buckets.

    Attributes:
      counts: number of values of each bucket of SECONDS, not cumulative. One more bucket has no upper bound.
      total: sum of all values.
    """

    def __init__(self):
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect.bisect_left(SECONDS, value)] += 1
        self.total += value


@dataclass
class Stats:
    """Figures of a scheduler since its start."""

    slots: int
    """Number of slots."""
    busy_slots: int = 0
    """Number of slots with an answer."""
    waiting: int = 0
    """Number of answers that wait for a slot."""
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Reason), 0))
    """Number of answers by the reason of their end."""
    rejected: int = 0
    """Number of answers refused because the queue was full."""
    prompt_tokens: int = 0
    """Number of tokens of all prompts, the cached ones included."""
    cached_tokens: int = 0
    """Number of prompt tokens whose keys and values were computed for an earlier request."""
    completion_tokens: int = 0
    """Number of tokens of all answers."""
    image_hits: int = 0
    """Number of images whose features were cached."""
    image_misses: int = 0
    """Number of images that the vision tower computed."""
    image_cache_bytes: int = 0
    """Number of bytes of cached image features."""
    steps: int = 0
    """Number of decode steps."""
    decode_seconds: float = 0.0
    """Seconds spent in decode steps."""
    failures: int = 0
    """Number of exceptions of the engine."""
    queue_seconds: Histogram = field(default_factory=Histogram)
    """Seconds from a job's submission to its slot."""
    first_token_seconds: Histogram = field(default_factory=Histogram)
    """Seconds from a job's submission to its first token."""
    token_seconds: Histogram = field(default_factory=Histogram)
    """Seconds between two tokens of an answer."""
