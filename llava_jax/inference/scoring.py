"""Computes log-probabilities of given continuations of a prompt."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from llava_jax.inference.shapes import bucket
from llava_jax.models.llava import LlavaModel


def log_probabilities(
    model: LlavaModel,
    tokens: Int[Array, "B T"],
    tiles: UInt8[Array, "B I H W 3"] | None,
    visual_index: Int[Array, "B T"] | Int[Array, "B T 4"] | None,
    visual_weight: Float[Array, "B T 4"] | None,
    positions: Int[Array, "B P"],
    next_tokens: Int[Array, "B P C"],
) -> Float[Array, "B P C"]:
    """Returns the log-probability of each of `next_tokens` after the tokens up to its position, float32."""
    hidden = model.hidden(tokens, tiles, None, None, visual_index, visual_weight)
    hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    return jnp.take_along_axis(jax.nn.log_softmax(model.decoder.logits(hidden)), next_tokens, axis=-1)


class ScoringRow(NamedTuple):
    """A row of tokens that scores some continuations of a prompt."""

    tokens: list[int]  # the prompt and the longest continuation, without its last token
    start: int  # position of the first token that is scored
    continuations: list[tuple[int, list[int]]]  # numbers of the continuations, and their tokens from `start` on


def scoring_rows(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> list[ScoringRow]:
    """Returns the fewest rows that score `texts`: the tokens of the prompt together with each continuation.

    Continuations share a row if they differ in their last token alone, as letters do, or if one continues another.
    If a tokenizer merges the prompt's end with a continuation, all of them are scored from there on.
    """
    start = min(len(os.path.commonprefix([list(prompt), list(text)])) for text in texts)
    start = min(start, *(len(text) - 1 for text in texts))
    rows: list[ScoringRow] = []
    for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
        tokens = list(texts[number][:-1])
        row = next((row for row in rows if row.tokens[: len(tokens)] == tokens), None)
        if row is None:
            rows.append(row := ScoringRow(tokens, start, []))
        row.continuations.append((number, list(texts[number][start:])))
    return rows


def score_positions(rows: Sequence[ScoringRow], padded_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `positions` and `next_tokens` of `log_probabilities`, padded to shapes from a fixed set."""
    num_positions = bucket(max(4, *(len(tokens) for row in rows for _, tokens in row.continuations)))
    num_continuations = bucket(max(4, *(len(row.continuations) for row in rows)))
    positions = np.zeros((padded_rows, num_positions), np.int32)
    next_tokens = np.zeros((padded_rows, num_positions, num_continuations), np.int32)
    for i, row in enumerate(rows):
        positions[i] = np.minimum(row.start - 1 + np.arange(num_positions), len(row.tokens) - 1)
        for column, (_, tokens) in enumerate(row.continuations):
            next_tokens[i, : len(tokens), column] = tokens
    return positions, next_tokens
