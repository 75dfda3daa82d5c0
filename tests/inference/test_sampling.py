import jax
import numpy as np
import pytest

from llava_jax.inference.sampling import Sampling, nucleus, sample, seed_words

V = 50
sample_jit = jax.jit(sample)


def asking(seeds, temperature, top_p=1.0):
    rows = len(seeds)
    words = np.array([seed_words(seed) for seed in seeds], np.uint32)
    full = lambda value: np.broadcast_to(np.float32(value), rows)  # noqa: E731
    return Sampling(words, full(temperature), full(top_p))


def reference(logits, temperature, top_p):
    """Probabilities of every token, by the definition: the shortest list of likeliest tokens that reaches top_p."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    weights /= weights.sum()
    kept, total = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(-weights):
        kept[token] = True
        total += weights[token]
        if total >= top_p:
            break
    return np.where(kept, weights, 0) / weights[kept].sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.9), (0.5, 0.5), (2.0, 0.99), (1.0, 1.0), (1.0, 1e-6)])
def test_draws_follow_the_distribution(temperature, top_p):
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32) * 2
    expected = reference(logits, temperature, top_p)
    n = 20000
    positions = np.arange(n, dtype=np.int32)
    drawn = sample_jit(np.tile(logits, (n, 1)), asking([7] * n, temperature, top_p), positions)
    counts = np.bincount(drawn, minlength=V)
    assert (counts[expected == 0] == 0).all()
    deviation = np.abs(counts - n * expected) / np.sqrt(n * expected * (1 - expected) + 1e-9)
    assert deviation.max() < 4.5  # standard deviations, of at most 50 tokens


def test_nucleus_keeps_what_the_definition_keeps():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(200, V)).astype(np.float32) * rng.uniform(0.1, 5, (200, 1)).astype(np.float32)
    top_p = rng.uniform(0.01, 1, 200).astype(np.float32)
    kept = np.isfinite(nucleus(logits, top_p))
    expected = np.array([reference(row, 1.0, p) > 0 for row, p in zip(logits, top_p, strict=True)])
    assert (kept == expected).all()
    assert 0.05 < expected.mean() < 0.95


def test_top_p_of_one_keeps_every_token():
    logits = np.random.default_rng(3).normal(size=(2, 30000)).astype(np.float32) * 6
    assert np.isfinite(nucleus(logits, np.ones(2, np.float32))).all()


def test_temperature_zero_takes_the_likeliest_also_beside_drawing_rows():
    logits = np.random.default_rng(4).normal(size=(3, V)).astype(np.float32)
    positions = np.zeros(3, np.int32)
    sampling = asking([1, 2, 3], np.array([0, 1e3, 0]))
    mixed = sample_jit(logits, sampling, positions)
    assert mixed[0] == logits[0].argmax() and mixed[2] == logits[2].argmax()
    others = [int(sample_jit(logits, asking([1, seed, 3], sampling.temperature), positions)[1]) for seed in range(9)]
    assert len(set(others)) > 3


def test_a_row_draws_the_same_alone_and_among_others():
    logits = np.random.default_rng(5).normal(size=(5, V)).astype(np.float32)
    seeds, positions = [5, 5, 11, 2**40 + 5, -3], np.array([9, 10, 9, 9, 9], np.int32)
    together = sample_jit(logits, asking(seeds, 1.5, 0.95), positions)
    for i in range(5):
        alone = sample_jit(logits[i : i + 1], asking(seeds[i : i + 1], 1.5, 0.95), positions[i : i + 1])
        assert alone[0] == together[i]


def test_seed_and_position_change_the_draw():
    flat = np.zeros((1, V), np.float32)
    draw = lambda seed, at: int(sample_jit(flat, asking([seed], 1.0), np.array([at], np.int32))[0])  # noqa: E731
    for draws in ([draw(seed, 0) for seed in range(12)], [draw(0, at) for at in range(12)],
                  [draw(seed << 32, 0) for seed in range(12)]):
        assert len(set(draws)) > 6


def test_seed_words_are_those_of_a_jax_key():
    for seed in (0, 1, 2**31 - 1):
        assert tuple(jax.random.key_data(jax.random.key(seed)).tolist()) == seed_words(seed)
