"""How the next token is chosen: the likeliest, or one drawn by temperature and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Sampling(NamedTuple):
    """What every row of a batch asks for, as arrays; `temperature` 0 takes the likeliest token."""

    seed: UInt32[Array, "B 2"]
    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]


def seed_words(seed: int) -> tuple[int, int]:
    """The high and low word of any integer's last 64 bits; what `jax.random.key` makes of it, without a device."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def sample(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """One token id per row. Its randomness depends on the row's seed and position alone, never on the other rows."""

    def likeliest():
        return jnp.argmax(logits, axis=-1)

    def drawn():
        greedy = sampling.temperature[:, None] <= 0
        scaled = nucleus(logits / jnp.where(greedy, 1.0, sampling.temperature[:, None]), sampling.top_p)
        # The argmax of log-probabilities with Gumbel noise is a draw from them.
        return jnp.argmax(jnp.where(greedy, logits, scaled + noise(sampling.seed, positions, logits.shape[1])), axis=-1)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, likeliest).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Top-p (Holtzman et al. 2020): -inf outside of the fewest likeliest tokens that together reach `top_p`.

    Tokens exactly as likely as the last one that is kept are kept too.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    weights = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    smallest = jnp.min(jnp.where(before < top_p[:, None], ordered, jnp.inf), axis=-1, keepdims=True)
    # In float32 the tail's sum may round up to 1, so 1 must be a case of its own.
    return jnp.where((logits >= smallest) | (top_p[:, None] >= 1), logits, -jnp.inf)


def noise(seed: UInt32[Array, "B 2"], positions: Int[Array, "B"], size: int) -> Float[Array, "B V"]:
    """Gumbel noise of each row's own random stream, a fresh draw at each position."""

    def row(words, position):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,))

    return jax.vmap(row)(seed, positions)
