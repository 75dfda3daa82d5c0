"""An answer as it grows: token ids in, text out, until it ends."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llava_jax.text.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str  # without the stop string and without outer blanks, as LLaVA's scripts keep an answer
    tokens: list[int]  # every id that was written for `text`, the end token or the stop string's included
    finish_reason: str  # "stop": the model ended it, or a stop string came; "length": max_new_tokens were written
    prompt_tokens: list[int]  # IMAGE_TOKEN_ID at the place of every visual token


class Detokenizer:
    """Ends with a token of `ends`, with one of the strings `stops`, or after `limit` tokens, whichever comes first.

    It looks at one token after the other, so where it ends depends on the tokens alone, not on how many came at once.
    Outer blanks are no part of its text: a template puts some around an answer, and would put them there once more.
    """

    def __init__(self, decoder: StreamDecoder, ends: Collection[int], stops: Sequence[str], limit: int):
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._decoder = decoder
        self._ends = ends
        self._stops = stops
        self._limit = limit
        self._held = ""  # decoded, but it may turn out to be the beginning of a stop string
        self._blanks = ""  # decoded behind `text`, but they may turn out to be the last

    def add(self, tokens: Iterable[int]) -> str:
        """Takes further tokens, up to the end, and returns the text that is certain now: the next piece of `text`."""
        before = len(self.text)
        for token in tokens:
            if self.finish_reason:
                break
            self._add(int(token))
        return self.text[before:]

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            self._held += self._decoder.push(token)
            if len(self.tokens) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason:
            self._held += self._decoder.finish()
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.finish_reason = "stop"
        safe = len(self._held) - (0 if self.finish_reason else _beginning(self._held, self._stops))
        piece, self._held = self._blanks + self._held[:safe], self._held[safe:]
        if not self.text:
            piece = piece.lstrip()
        self.text += piece.rstrip()
        self._blanks = piece[len(piece.rstrip()) :]


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
