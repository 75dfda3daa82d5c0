"""A slot engine without a model: its next token is a hash of all keys and values that the slot's tokens need.

Every wrong slot, start, copy, adapter or stale entry changes the answer. `answer` computes one without slots.
"""

import numpy as np

from llava_jax.images import Layout
from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.slots import PromptChunk, Written
from llava_jax.serve.jobs import PreparedImage
from llava_jax.text.encode import IMAGE_TOKEN_ID

EOS, LETTERS, MASK = 2, 26, 2**64 - 1


def mix(*values: int) -> int:
    """Returns 64 bits that depend on all values and their order."""
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = ((h ^ (value & MASK)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & MASK
        h ^= h >> 29
    return h


def next_token(keys: list[int], seed: int | None) -> int:
    """Returns EOS, or a letter 3 ... 28; `seed` None is greedy."""
    h = mix(*keys, *(() if seed is None else (seed,))) >> 7
    return EOS if h % 23 == 0 else 3 + h // 23 % LETTERS


def make_image(name: str, count: int) -> PreparedImage:
    """An image of `count` visual tokens; its features depend on `name`."""
    tiles = np.full((1, 1, 1, 3), mix(*name.encode()) % 251, np.uint8)
    return PreparedImage(name.encode(), tiles, Layout(1, np.arange(count, dtype=np.int32)))


def features_of(tiles: np.ndarray, layout: Layout, adapter: int) -> np.ndarray:
    return np.array([[mix(int(tiles.flat[0]), int(k), adapter) >> 2] for k in layout.index], np.int64)


class LetterDecoder:
    """Decodes 3 ... 28 to letters; every fifth is the first byte of a character that the next token ends."""

    def __init__(self):
        self.open = ""

    def push(self, token: int) -> str:
        if not self.open and token % 5 == 0:
            self.open = chr(94 + token)
            return ""
        text, self.open = self.open + chr(94 + token), ""
        return text

    def finish(self) -> str:
        return "?" * bool(self.open)


def make_detokenizer(stop, max_new_tokens: int) -> Detokenizer:
    return Detokenizer(LetterDecoder(), {EOS}, tuple(stop), max_new_tokens)


def answer(job, context: int) -> Detokenizer:
    """The answer of a job that is alone, from its prompt."""
    detokenizer = make_detokenizer(job.stop, min(job.max_new_tokens, context - len(job.tokens)))
    rows = [features_of(image.tiles, image.layout, job.adapter) for image in job.images]
    visual, keys = iter(np.concatenate(rows)[:, 0].tolist() if rows else ()), []
    for token in job.tokens.tolist():
        keys.append(mix(*keys, next(visual) if token == IMAGE_TOKEN_ID else token, job.adapter))
    while not detokenizer.finish_reason:
        token = next_token(keys, job.seed if job.temperature else None)
        detokenizer.add((token,))
        keys.append(mix(*keys, token, job.adapter))
    return detokenizer


class SlotOracle:
    """The interface of `SlotEngine`, checked for misuse.

    Attributes:
      log: calls in order: ("write", slots, numbers of tokens), ("decode", slots), ("copy", source, target, length),
        ("encode", tiles' value).
      failures: exceptions by name of the call, each raised once after the state is broken.
    """

    max_chunk = 16

    def __init__(self, slots: int = 4, context: int = 96):
        self.slots, self.context, self.log, self.failures = slots, context, [], {}
        self.reset()

    def reset(self) -> None:
        self.keys = [[] for _ in range(self.slots)]
        self.adapter, self.token = [0] * self.slots, [0] * self.slots
        self.remaining, self.seed = [0] * self.slots, [None] * self.slots

    def warm_up(self, report) -> None:
        report(1, 1, "nothing")

    def _fail(self, call: str) -> None:
        if error := self.failures.pop(call, None):
            self.keys = None  # a donated buffer is gone
            raise error

    def encode_image(self, tiles, layout, adapter=0) -> np.ndarray:
        self.log.append(("encode", int(tiles.flat[0])))
        if error := self.failures.pop("encode", None):
            raise error
        return features_of(tiles, layout, adapter)

    def write(self, chunks: list[PromptChunk], adapters=None, logprobs=False) -> Written:
        self.log.append(("write", [chunk.slot for chunk in chunks], [len(chunk.tokens) for chunk in chunks]))
        self._fail("write")
        assert chunks and len({chunk.slot for chunk in chunks}) == len(chunks)
        tokens = np.full((len(chunks), 1), NO_TOKEN, np.int32)
        for row, (chunk, adapter) in enumerate(zip(chunks, adapters or [0] * len(chunks), strict=True)):
            slot, visual = chunk.slot, iter(() if chunk.visual is None else chunk.visual[:, 0].tolist())
            assert 0 < len(chunk.tokens) <= self.max_chunk and chunk.start <= len(self.keys[slot])
            keys = self.keys[slot] = self.keys[slot][: chunk.start]
            self.adapter[slot], self.remaining[slot] = adapter, 0
            for token in chunk.tokens.tolist():
                keys.append(mix(*keys, next(visual) if token == IMAGE_TOKEN_ID else token, adapter))
            assert next(visual, None) is None
            if request := chunk.request:
                assert len(keys) + request.max_new_tokens <= self.context
                self.remaining[slot] = request.max_new_tokens
                self.seed[slot] = request.seed if request.temperature else None
                tokens[row] = self._next(slot)
        return self._written(tokens, logprobs)

    def decode(self, active, steps: int, logprobs=False) -> Written:
        self.log.append(("decode", np.flatnonzero(active).tolist()))
        self._fail("decode")
        tokens = np.full((self.slots, steps), NO_TOKEN, np.int32)
        for slot in range(self.slots):
            if not active[slot]:
                self.remaining[slot] = 0
            for step in range(steps):
                if self.remaining[slot]:
                    self.keys[slot].append(mix(*self.keys[slot], self.token[slot], self.adapter[slot]))
                    tokens[slot, step] = self._next(slot)
        return self._written(tokens, logprobs)

    def copy(self, source: int, target: int, length: int) -> None:
        self.log.append(("copy", source, target, length))
        self._fail("copy")
        assert source != target and 0 < length <= len(self.keys[source])
        self.keys[target] = self.keys[source][:length]

    def _next(self, slot: int) -> int:
        token = self.token[slot] = next_token(self.keys[slot], self.seed[slot])
        self.remaining[slot] = 0 if token == EOS else self.remaining[slot] - 1
        return token

    @staticmethod
    def _written(tokens, logprobs) -> Written:
        top = np.stack([tokens, *[np.zeros_like(tokens)] * 19], axis=-1)
        arrays = [tokens, -tokens / 100, top, -top / 100] if logprobs else [tokens]
        return Written([(range(len(tokens)), arrays)], *tokens.shape)
