"""How likely given texts are after a prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from llava_jax.models.llava import Llava


def log_probabilities(
    model: Llava,
    tokens: Int[Array, "B T"],
    images: UInt8[Array, "B I H W 3"] | None,
    places: Int[Array, "B P"],
    following: Int[Array, "B P C"],
) -> Float[Array, "B P C"]:
    """The log-probability of each token of `following`, after those up to and with the one at its place; float32."""
    hidden = jnp.take_along_axis(model.hidden(tokens, images), places[..., None], axis=1)
    return jnp.take_along_axis(jax.nn.log_softmax(model.decoder.logits(hidden)), following, axis=-1)


class ScoringRow(NamedTuple):
    """A row that the model reads to score some continuations: their last tokens need not be read.

    `tokens` begins with the prompt; `scored` are the continuations, by number, and their tokens, the first of which
    stands at `start`, or would.
    """

    tokens: list[int]
    start: int
    scored: list[tuple[int, list[int]]]


def scoring_rows(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> list[ScoringRow]:
    """The fewest rows that score `texts`, each the tokens of the prompt and of a continuation together.

    Continuations share a row if they differ in their last token alone, as letters do, or if one goes on where another
    ends. Where a tokenizer merges the prompt's end with a continuation, all of them are scored from there on.
    """
    start = min(_common(prompt, text) for text in texts)
    start = min(start, *(len(text) - 1 for text in texts))
    rows: list[ScoringRow] = []
    for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
        read, scored = list(texts[number][:-1]), (number, list(texts[number][start:]))
        row = next((row for row in rows if row.tokens[: len(read)] == read), None)
        if row is None:
            rows.append(row := ScoringRow(read, start, []))
        row.scored.append(scored)
    return rows


def positions_of(readings: Sequence[ScoringRow], rows: int, places: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`places` and `following` of `log_probabilities`, padded to so many rows, places and continuations."""
    at, following = np.zeros((rows, places), np.int32), np.zeros((rows, places, count), np.int32)
    for row, reading in enumerate(readings):
        at[row] = np.minimum(reading.start - 1 + np.arange(places), len(reading.tokens) - 1)
        for column, (_, tokens) in enumerate(reading.scored):
            following[row, : len(tokens), column] = tokens
    return at, following


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
