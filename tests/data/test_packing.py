"""Packing against its definition, against the best that is possible, and on lengths like those of LLaVA-1.5's mix."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data.packing import pack
from llava_jax.errors import UserError


@st.composite
def records(draw):
    """Limits of a sequence, and records that each fit into one."""
    length, slots = draw(st.integers(1, 300)), draw(st.integers(1, 6))
    record = st.tuples(st.integers(1, length), st.integers(0, slots))
    return length, slots, draw(st.lists(record, max_size=200))


@given(records())
def test_every_record_is_in_one_sequence_and_sequences_keep_their_limits(case):
    length, slots, chosen = case
    tokens, tiles = np.array(chosen, int).reshape(-1, 2).T
    sequences = pack(tokens, tiles, length, slots)
    assert sorted(itertools.chain(*sequences)) == list(range(len(tokens)))
    for sequence in sequences:
        assert sequence == sorted(sequence)
        assert tokens[sequence].sum() <= length and tiles[sequence].sum() <= slots
    assert [sequence[0] for sequence in sequences] == sorted(sequence[0] for sequence in sequences)


def fewest_rows(tokens: list[int], images: list[int], length: int, slots: int) -> int:
    """By trying every division."""

    @cache
    def fewest(left: frozenset[int]) -> int:
        if not left:
            return 0
        first, *others = sorted(left)
        best = math.inf
        for size in range(len(others) + 1):
            for chosen in itertools.combinations(others, size):
                row = [first, *chosen]
                if sum(tokens[i] for i in row) <= length and sum(images[i] for i in row) <= slots:
                    best = min(best, 1 + fewest(left - frozenset(row)))
        return best

    return fewest(frozenset(range(len(tokens))))


def test_close_to_the_fewest_rows_possible():
    rng, ours, best = np.random.default_rng(0), 0, 0
    for _ in range(60):
        tokens, images = rng.integers(5, 60, 8).tolist(), rng.integers(0, 2, 8).tolist()
        rows, fewest = len(pack(tokens, images, 100, 2)), fewest_rows(tokens, images, 100, 2)
        assert fewest <= rows <= fewest + 1
        ours, best = ours + rows, best + fewest
    assert ours <= 1.1 * best


def test_long_and_short_share_a_row():
    """Best fit decreasing would join the long ones and leave the short ones alone: 60 + 60, 60 + 60, then 40s by
    threes."""
    assert pack([60, 60, 60, 60, 40, 40, 40, 40], [1] * 8, 100, 2) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("tokens, images", [([5, 11], [0, 0]), ([5, 5], [1, 3])])
def test_a_record_that_fits_into_no_row(tokens, images):
    with pytest.raises(UserError, match="record 1 has"):
        pack(tokens, images, 10, 2)


def test_a_mix_like_llava_1_5s_fills_its_rows():
    """Nine of ten with an image of 576 tokens and 60 to 600 tokens of text, the rest long texts."""
    rng = np.random.default_rng(0)
    images = (rng.random(8192) < 0.939).astype(int)
    tokens = np.where(images, 620 + rng.lognormal(5.1, 0.7, 8192), 40 + rng.lognormal(6.5, 0.9, 8192))
    tokens = tokens.astype(int).clip(1, 2048)
    rows = pack(tokens, images, 3072, 4)
    assert tokens.sum() / (3072 * len(rows)) > 0.95
    assert images.sum() / (4 * len(rows)) > 0.75
