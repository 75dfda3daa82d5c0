"""Defines the functions that run on the device: `prefill`, `extend`, `insert` and `decode`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.inference.sampling import Sampling, sample
from llava_jax.models.llama import LlamaBlock
from llava_jax.models.llava import LlavaModel

MAX_DECODE_STEPS = 16
"""Maximum number of tokens that `decode` writes before the host sees them."""

NO_TOKEN = -1
"""Value in the output of a slot that wrote no token."""

Cache = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]
"""Keys and values of all layers, the `cache` of `Llama.extend`."""


class DecodeState(NamedTuple):
    """Slots with one answer in progress each.

    Prompts are padded on the right, so a token's position is its index in the cache. Cache entries behind a slot's
    newest token are padding, or remain from an earlier request. Each is overwritten before a query attends to it.
    """

    cache: Cache
    token: Int[Array, "B"]  # newest token, whose keys and values are not in the cache yet
    position: Int[Array, "B"]  # position of `token`
    remaining: Int[Array, "B"]  # number of tokens that the slot may still write; 0 in a free slot
    sampling: Sampling


def prefill(
    model: LlavaModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    tiles: UInt8[Array, "B I H W 3"] | None,
    visual_index: Int[Array, "B T"] | Int[Array, "B T 4"] | None,
    visual_weight: Float[Array, "B T 4"] | None,
    max_new_tokens: Int[Array, "B"],
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    length: int,
) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Computes prompts and writes one token after each.

    Args:
      lengths: number of tokens of each prompt; `tokens` is padded behind them.
      tiles, visual_index, visual_weight: see `LlavaModel.hidden`; None for text alone.
      max_new_tokens: number of tokens that a row may write, the first one included; 0 for a row that is padding.
      eos_ids: token ids that end a row.
      length: cache length of the result, at least a prompt's length + max_new_tokens for a state that is decoded.
    """
    hidden, cache = model.hidden(tokens, tiles, None, None, visual_index, visual_weight, with_cache=True)
    return _write_first(model, hidden, lengths, _pad_cache(cache, length), lengths, max_new_tokens, sampling, eos_ids)


def extend(
    model: LlavaModel,
    prefix: DecodeState,
    rows: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    max_new_tokens: Int[Array, "B"],
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    length: int,
) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Computes the remaining tokens of prompts after computed prefixes, and writes one token after each.

    `rows`: the row of `prefix` with which each prompt starts; prompts may share one. The prefixes have written no
    token: their max_new_tokens was 0. `tokens` have no images. See `prefill` for the other arguments.
    """
    cache = _pad_cache(tuple(part[:, rows] for part in prefix.cache), length)
    start = prefix.position[rows] + 1
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = model.decoder.extend(model.decoder.embed(tokens, model.dtype), positions, cache)
    return _write_first(model, hidden, lengths, cache, start + lengths, max_new_tokens, sampling, eos_ids)


def insert(state: DecodeState, prefix: DecodeState, slots: Int[Array, "B"], length_axis: int = 2) -> DecodeState:
    """Copies the rows of `prefix` into `slots`; a row whose slot is out of range is dropped.

    The cache of `prefix` may be shorter than that of `state`. `length_axis`: axis of positions in the caches.
    """
    positions = (slice(None),) * (length_axis - 2) + (slice(prefix.cache[0].shape[length_axis]),)
    cache = tuple(old.at[:, slots, *positions].set(new, mode="drop")
                  for old, new in zip(state.cache, prefix.cache, strict=True))
    fields = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state[1:], prefix[1:])
    return DecodeState(cache, *fields)


def decode(
    model: LlavaModel,
    state: DecodeState,
    active: Bool[Array, "B"],
    steps: Int[Array, ""],
    eos_ids: tuple[int, ...],
    layers: Sequence[LlamaBlock] | None = None,
) -> tuple[DecodeState, Int[Array, "B C"]]:
    """Writes up to `steps` (at most MAX_DECODE_STEPS) tokens in every slot that is `active`.

    The other slots become free. It stops early when no slot has tokens remaining. `layers`: see `Llama.extend`.
    """

    def step(carry):
        i, state, written = carry
        x = model.decoder.embed(state.token[:, None], model.dtype)
        x, cache = model.decoder.extend(x, state.position[:, None], state.cache, layers)
        state, token = write(model, state._replace(cache=cache), x[:, 0], eos_ids)
        return i + 1, state, written.at[:, i].set(token)

    def is_unfinished(carry):
        i, state, _ = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    state = state._replace(remaining=jnp.where(active, state.remaining, 0))
    written = jnp.full((active.shape[0], MAX_DECODE_STEPS), NO_TOKEN)
    _, state, written = jax.lax.while_loop(is_unfinished, step, (0, state, written))
    return state, written


def write(
    model: LlavaModel, state: DecodeState, hidden: Float[Array, "B D"], eos_ids: tuple[int, ...]
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Chooses the next token of each slot from the hidden state of its newest one; NO_TOKEN in a free slot."""
    active = state.remaining > 0
    position = jnp.where(active, state.position + 1, state.position)
    token = sample(model.decoder.logits(hidden), state.sampling, position)
    ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32))
    remaining = jnp.where(active & ~ended, state.remaining - 1, 0)
    state = state._replace(token=jnp.where(active, token, state.token), position=position, remaining=remaining)
    return state, jnp.where(active, token, NO_TOKEN)


def _pad_cache(cache: Cache, length: int) -> tuple[Array, Array]:
    """Pads the positions S of the cache to `length`."""
    return tuple(jnp.pad(part, [(0, 0), (0, 0), (0, length - part.shape[2]), (0, 0), (0, 0)]) for part in cache)


def _write_first(model: LlavaModel, hidden: Float[Array, "B T D"], lengths, cache, prompt_lengths, max_new_tokens,
                 sampling, eos_ids) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Writes the first token of prompts whose last `lengths` tokens are computed in `hidden`."""
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = DecodeState(cache, jnp.zeros_like(prompt_lengths), prompt_lengths - 1, max_new_tokens, sampling)
    state, token = write(model, state, last, eos_ids)
    return state, token[:, None]
