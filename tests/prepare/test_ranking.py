"""Samples, splits and mixtures of any rows, against sets and plain loops."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.prepare.ranking import connected_groups, mix_rows, sample_rows, split_rows

HASHES = st.integers(0, 2**64 - 1)


@st.composite
def tied_rows(draw):
    """Rows with one or more hashes of few different ones, so that rows share hashes: (rows, hashes, count)."""
    images = draw(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=25))
    pairs = [(row, image) for row, own in enumerate(images) for image in own]
    rows, hashes = zip(*draw(st.permutations(pairs)), strict=True)
    return np.array(rows), np.array(hashes, np.uint64) * np.uint64(0x9E3779B97F4A7C15), len(images)


def walk(rows, hashes, count) -> list[int]:
    """The lowest row that each row is connected to, found step by step."""
    found = list(range(count))
    for start in range(count):
        todo = [start] if found[start] == start else []
        while todo:
            here = todo.pop()
            shared = {int(hash_) for row, hash_ in zip(rows, hashes, strict=True) if row == here}
            for row, hash_ in zip(rows, hashes, strict=True):
                if int(hash_) in shared and found[row] > start:
                    found[row] = start
                    todo.append(row)
    return found


@given(tied_rows())
def test_groups_are_those_of_a_walk(tied):
    assert connected_groups(*tied).tolist() == walk(*tied)


def test_one_chain_from_end_to_end():
    chain = np.random.default_rng(0).permutation(300)
    rows, hashes = np.concatenate([chain[:-1], chain[1:]]), np.tile(np.arange(299, dtype=np.uint64), 2)
    assert not connected_groups(rows, hashes, 300).any()


@given(tied_rows(), st.integers(0, 25))
def test_rows_that_share_an_image_are_in_one_part_and_sizes_are_near(tied, first):
    rows, hashes, count = tied
    targets = [min(first, count), count - min(first, count)]
    parts, groups = split_rows(rows, hashes, targets), walk(*tied)
    assert all(parts[row] == parts[groups[row]] for row in range(count))
    largest = max(Counter(groups).values())
    assert abs(int((parts == 0).sum()) - targets[0]) <= largest / 2


@given(st.lists(HASHES, min_size=1, max_size=40), st.data())
def test_a_sample_is_within_every_larger_one(hashes, data):
    hashes = np.array(hashes, np.uint64)
    small, large = sorted(data.draw(st.tuples(*[st.integers(1, len(hashes))] * 2)))
    few, many = sample_rows(hashes, small).tolist(), sample_rows(hashes, large).tolist()
    assert set(few) <= set(many) and (len(set(few)), len(set(many))) == (small, large) and few == sorted(few)


@given(st.lists(st.tuples(st.lists(HASHES, min_size=1, max_size=8), st.integers(1, 30)), min_size=1, max_size=4))
def test_a_mixture_has_its_counts_and_no_row_more_than_once_more_often(sources):
    hashes = [np.array(own, np.uint64) for own, _ in sources]
    numbers, start = mix_rows(hashes, [count for _, count in sources]).tolist(), 0
    times = Counter(numbers)
    for own, count in sources:
        mine = [times[start + i] for i in range(len(own))]
        assert sum(mine) == count and max(mine) - min(mine) <= 1
        start += len(own)
    assert sum(times.values()) == sum(count for _, count in sources)
