"""Defines what the web side and the scheduler exchange: jobs, and the events of their answers."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llava_jax.images import Layout


@dataclass(frozen=True)
class PreparedImage:
    """A decoded image.

    Attributes:
      digest: hash of the file's bytes. The processor is the server's, so equal digests have equal tiles.
      tiles: uint8 [I, S, S, 3].
      layout: its visual tokens.
    """

    digest: bytes
    tiles: np.ndarray
    layout: Layout


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of a token that was written, and the most likely tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer. No piece splits a character or shows part of a stop string."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


Reason = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why an answer ended."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    `reason` is "stop", "length" or "cancelled"; "deadline" if the request's time ended; "error" if the model failed.
    `cached_tokens` is the number of prompt tokens whose keys and values were computed for an earlier request.
    """

    reason: Reason
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(eq=False)
class Job:
    """One answer to be written.

    Attributes:
      tokens: int32 [T], the prompt with IMAGE_TOKEN_ID at every visual token.
      images: images of the prompt, in order.
      adapter: index of the LoRA adapter; 0 is the base.
      logprobs: number of most likely tokens to report at each position; None for no log-probabilities.
      deadline: `time.monotonic()` at which the answer ends.
      emit: called from the scheduler's thread with every Piece, and with Finished as the last.
      cancelled: set by the web side when the client has left; the slot is free within one step.
    """

    tokens: np.ndarray
    images: Sequence[PreparedImage]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    deadline: float
    emit: Callable[[Piece | Finished], None]
    adapter: int = 0
    logprobs: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
