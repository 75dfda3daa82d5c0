"""Chooses the next token: the most likely one, or one drawn by temperature and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Sampling(NamedTuple):
    """Sampling settings of each row; temperature 0 is greedy."""

    seed: UInt32[Array, "B 2"]
    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]


def seed_words(seed: int) -> tuple[int, int]:
    """Returns the high and low word of an integer's last 64 bits: the data of `jax.random.key(seed)`."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def sample(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """Chooses one token id per row. A draw depends on the row's seed and position alone, never on other rows."""

    def greedy():
        return jnp.argmax(logits, axis=-1)

    def drawn():
        is_greedy = sampling.temperature[:, None] <= 0
        scaled = nucleus(logits / jnp.where(is_greedy, 1.0, sampling.temperature[:, None]), sampling.top_p)
        # The argmax of log-probabilities with Gumbel noise is a draw from them.
        scaled += noise(sampling.seed, positions, logits.shape[1])
        return jnp.argmax(jnp.where(is_greedy, logits, scaled), axis=-1)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, greedy).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Sets logits to -inf outside the smallest set of most likely tokens that reaches `top_p` (Holtzman et al. 2020).

    Tokens exactly as likely as the last one that is kept are kept too.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    weights = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    smallest = jnp.min(jnp.where(before < top_p[:, None], ordered, jnp.inf), axis=-1, keepdims=True)
    # top_p 1 is a case of its own because the sum of the tail may round up to 1 in float32.
    return jnp.where((logits >= smallest) | (top_p[:, None] >= 1), logits, -jnp.inf)


def noise(seed: UInt32[Array, "B 2"], positions: Int[Array, "B"], size: int) -> Float[Array, "B V"]:
    """Returns Gumbel noise from each row's own random stream, a fresh draw at each position."""

    def row(words, position):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,))

    return jax.vmap(row)(seed, positions)
