"""The two functions that run on the device: `prefill` reads the prompts, `decode` writes some tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.inference.sampling import Sampling, sample
from llava_jax.models.llama import LlamaBlock
from llava_jax.models.llava import Llava

MAX_DECODE_STEPS = 16
"""The most tokens that `decode` writes before the host sees them."""

NO_TOKEN = -1
"""In the output: the row had ended, there is no token."""


class State(NamedTuple):
    """A batch of answers in the making.

    Prompts are padded on the right, so a token's position is its slot in the cache. The slots behind a row's last
    token hold what padding left there; each is overwritten before `Llama.extend` lets a query look at it.
    """

    cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]  # as `Llama.extend` takes it
    token: Int[Array, "B"]  # the newest token, whose keys and values are not in the cache yet
    position: Int[Array, "B"]  # its place
    left: Int[Array, "B"]  # tokens that the row may still write; 0: it has ended
    sampling: Sampling


def prefill(
    model: Llava,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    images: UInt8[Array, "B I H W 3"] | None,
    limits: Int[Array, "B"],
    sampling: Sampling,
    ends: tuple[int, ...],
    size: int,
) -> tuple[State, Int[Array, "B 1"]]:
    """Reads prompts of `lengths` tokens and writes one token each; the cache has `size` slots per row.

    `limits`: how many tokens a row may write, the first included; 0 for a row that only fills the batch. A row also
    ends with a token of `ends`. `size` must be at least a row's length + limit.
    """
    hidden, cache = model.hidden(tokens, images, with_cache=True)
    return _first(model, hidden, lengths, _grown(cache, size), lengths, limits, sampling, ends)


def prefill_shared(
    model: Llava,
    beginnings: Int[Array, "U P"],
    images: UInt8[Array, "U I H W 3"],
    which: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    sampling: Sampling,
    ends: tuple[int, ...],
    size: int,
) -> tuple[State, Int[Array, "B 1"]]:
    """The same for prompts of which several begin alike, with the same images: each beginning is read once.

    `which`: the number of a row's beginning; `tokens`, `lengths`: of the rest of its prompt, which has no images.
    """
    _, cache = model.hidden(beginnings, images, with_cache=True)
    cache = _grown(tuple(part[:, which] for part in cache), size)
    start = beginnings.shape[1]
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.decoder.extend(model.decoder.embed(tokens, model.dtype), positions, cache)
    return _first(model, hidden, lengths, cache, start + lengths, limits, sampling, ends)


def decode(
    model: Llava,
    state: State,
    going: Bool[Array, "B"],
    steps: Int[Array, ""],
    ends: tuple[int, ...],
    layers: Sequence[LlamaBlock] | None = None,
) -> tuple[State, Int[Array, "B C"]]:
    """Writes up to `steps` (at most MAX_DECODE_STEPS) tokens in every row that is `going`; stops early.

    `layers`: see `Llama.extend`.
    """

    def step(carry):
        i, state, written = carry
        x = model.decoder.embed(state.token[:, None], model.dtype)
        x, cache = model.decoder.extend(x, state.position[:, None], state.cache, layers)
        state, token = write(model, state._replace(cache=cache), x[:, 0], ends)
        return i + 1, state, written.at[:, i].set(token)

    state = state._replace(left=jnp.where(going, state.left, 0))
    written = jnp.full((going.shape[0], MAX_DECODE_STEPS), NO_TOKEN)
    more = lambda carry: (carry[0] < steps) & jnp.any(carry[1].left > 0)  # noqa: E731
    _, state, written = jax.lax.while_loop(more, step, (0, state, written))
    return state, written


def _grown(cache: tuple[Array, Array], size: int) -> tuple[Array, Array]:
    return tuple(jnp.pad(part, [(0, 0), (0, 0), (0, size - part.shape[2]), (0, 0), (0, 0)]) for part in cache)


def _first(model: Llava, hidden: Float[Array, "B T D"], lengths, cache, read, limits, sampling, ends):
    """The state after prompts of `read` tokens, the last of which are `lengths` of `hidden`; and their first tokens."""
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = State(cache, jnp.zeros_like(read), read - 1, limits, sampling)
    state, token = write(model, state, last, ends)
    return state, token[:, None]


def write(
    model: Llava, state: State, hidden: Float[Array, "B D"], ends: tuple[int, ...]
) -> tuple[State, Int[Array, "B"]]:
    """Chooses each row's next token from the hidden state of its newest one; NO_TOKEN where the row had ended."""
    alive = state.left > 0
    position = jnp.where(alive, state.position + 1, state.position)
    token = sample(model.decoder.logits(hidden), state.sampling, position)
    ended = jnp.isin(token, jnp.array(ends, jnp.int32))
    left = jnp.where(alive & ~ended, state.left - 1, 0)
    token = jnp.where(alive, token, state.token)
    return state._replace(token=token, position=position, left=left), jnp.where(alive, token, NO_TOKEN)
