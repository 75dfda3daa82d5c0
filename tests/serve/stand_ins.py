"""Stand-ins for the model, the scheduler and the media loader, for tests of the web side."""

import threading

import numpy as np

from llava_jax.images import Layout
from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import Finished, Piece, PreparedImage, TokenLogprob
from llava_jax.serve.stats import Stats
from llava_jax.text.encode import IMAGE_TOKEN_ID, PromptTooLong

VISUAL_TOKENS = 4
CONTEXT = 100
TEXTS = ["어", "제 ", "<b>", "\n\"", "end"]
"""Pieces of every answer."""


class FakeLlava:
    """A model whose prompts have a token for each character; ids are code points."""

    def __init__(self):
        self.tokenizer = self
        self.chats = []

    def encode_chat(self, messages, layouts):
        self.chats.append(messages)
        text = "".join(part.get("text", "") for message in messages for part in message["content"])
        if len(text) > 1000:
            raise PromptTooLong(len(text), 0, 1000)
        return np.array([IMAGE_TOKEN_ID] * VISUAL_TOKENS * len(layouts) + [ord(c) for c in text], np.int32)

    def token_bytes(self, token):
        return TEXTS[token].encode()


class FakeMedia:
    """Returns the same image for every URL but "bad"."""

    async def load(self, url, param, images):
        if url == "bad":
            raise ApiError(400, "The image is damaged.", param)
        tiles = np.zeros((1, 2, 2, 3), np.uint8)
        return PreparedImage(url.encode(), tiles, Layout(1, np.arange(VISUAL_TOKENS, dtype=np.int32)))


class FakeScheduler:
    """Answers every job with TEXTS, from a thread of its own.

    Attributes:
      reason: end of the answers.
      hold: jobs wait until they are cancelled.
    """

    def __init__(self):
        self.ready, self.reason, self.hold, self.full = True, None, False, False
        self.jobs, self.ended = [], []

    def submit(self, *jobs):
        if self.full:
            raise ApiError(429, "Too many requests are waiting.", code="rate_limit_exceeded", retry_after=7)
        self.jobs += jobs
        for job in jobs:
            threading.Thread(target=self._answer, args=(job,)).start()

    def _answer(self, job):
        texts = TEXTS[: job.max_new_tokens]
        for token, text in enumerate(texts):
            top = tuple((i, -float(i)) for i in range(job.logprobs or 0))
            logprobs = () if job.logprobs is None else (TokenLogprob(token, -0.5 if token else -np.inf, top),)
            job.emit(Piece(text, logprobs))
        reason = self.reason or ("stop" if len(texts) == len(TEXTS) else "length")
        if self.hold:
            job.cancelled.wait(20)
            reason = "cancelled"
        self.ended.append(job)
        image_tokens = VISUAL_TOKENS * len(job.images)
        job.emit(Finished(reason, len(job.tokens), image_tokens, len(texts), 2))

    def cancel(self, job):
        job.cancelled.set()

    def stats(self):
        return Stats(slots=3)
