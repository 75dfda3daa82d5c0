"""Decodes the tokens of an answer to text while they are generated, until the answer ends."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llava_jax.text.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str  # without the stop string and outer whitespace, as in LLaVA's scripts
    tokens: list[int]  # all ids that were written, with the end token or those of the stop string
    finish_reason: str  # "stop": the model ended it, or a stop string came; "length": max_new_tokens were written
    prompt_tokens: list[int]  # IMAGE_TOKEN_ID at the position of every visual token


class Detokenizer:
    """Collects one answer. It ends with a token of `eos_ids`, a string of `stop`, or after `max_new_tokens` tokens.

    Tokens are processed one by one, so the end depends on the tokens alone, not on how many came at once.
    Outer whitespace is not part of the text, because a template adds its own when the answer is shown to a model again.
    """

    def __init__(self, decoder: StreamDecoder, eos_ids: Collection[int], stop: Sequence[str], max_new_tokens: int):
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._decoder = decoder
        self._eos_ids = eos_ids
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        self._pending = ""  # decoded, but it may turn out to be the start of a stop string
        self._blanks = ""  # decoded behind `text`, but they may turn out to be outer ones

    def add(self, tokens: Iterable[int]) -> str:
        """Adds tokens up to the end of the answer, and returns the text that is certain now: the next piece."""
        before = len(self.text)
        for token in tokens:
            if self.finish_reason:
                break
            self._add(int(token))
        return self.text[before:]

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._eos_ids:
            self.finish_reason = "stop"
        else:
            self._pending += self._decoder.push(token)
            if len(self.tokens) == self._max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self._pending += self._decoder.finish()
        stops = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if stops:
            self._pending = self._pending[: min(stops)]
            self.finish_reason = "stop"
        certain = len(self._pending) - (0 if self.finish_reason else self._length_of_stop_start())
        piece, self._pending = self._blanks + self._pending[:certain], self._pending[certain:]
        if not self.text:
            piece = piece.lstrip()
        self.text += piece.rstrip()
        self._blanks = piece[len(piece.rstrip()) :]

    def _length_of_stop_start(self) -> int:
        """Returns the number of characters at the end of the pending text that may be the start of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._pending.endswith(stop[:n]))
        return max(lengths, default=0)
