"""Defines the functions that run on the device: `prefill`, `extend`, `write_chunks` and `decode`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.inference.sampling import Sampling, sample
from llava_jax.models.llama import Cache, LlamaBlock
from llava_jax.models.llava import LlavaModel
from llava_jax.models.slot_cache import SlotAttention, SlotCache

MAX_DECODE_STEPS = 16
"""Maximum number of tokens that `decode` writes before the host sees them."""

NO_TOKEN = -1
"""Value in the output of a slot that wrote no token."""

NUM_TOP_TOKENS = 20
"""Number of most likely tokens whose log-probabilities are reported."""


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


def decode(
    model: LlavaModel,
    state: DecodeState,
    active: Bool[Array, "B"],
    steps: Int[Array, ""],
    eos_ids: tuple[int, ...],
    layers: Sequence[LlamaBlock] | None = None,
    logprobs: bool = False,
    rows: Int[Array, "R"] | None = None,
) -> tuple[DecodeState, Int[Array, "R C"]] | tuple[DecodeState, tuple[Array, ...]]:
    """Writes up to `steps` (at most MAX_DECODE_STEPS) tokens in every slot that is `active`.

    The other slots become free. It stops early when no slot has tokens remaining. `layers`: see `Llama.extend`.
    `logprobs` adds `log_probabilities` of the tokens, with an axis C after R. In a SlotCache, free slots keep their
    bits. `rows`: slots that are computed, the number of slots for padding, in a SlotCache; None for all.
    """

    def step(carry):
        i, state, written = carry
        positions, attend = state.position[:, None], None
        if isinstance(state.cache, SlotCache):
            length = state.cache.length
            positions = jnp.where(state.remaining > 0, state.position, length)[:, None]
            in_kernel = rows is None and model.decoder.attention == "splash"
            attend = SlotAttention(positions, state.cache, rows, in_kernel)
        x = model.decoder.embed(state.token[:, None], model.dtype)
        x, cache = model.decoder.extend(x, positions, state.cache, layers, attend)
        logits = model.decoder.logits(x[:, 0])
        state, token = write(state._replace(cache=cache), logits, eos_ids)
        new = (token, *log_probabilities(logits, token)) if logprobs else (token,)
        return i + 1, state, tuple(old.at[:, i].set(x) for old, x in zip(written, new, strict=True))

    def is_unfinished(carry):
        i, state, _ = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    state = before = state._replace(remaining=jnp.where(active, state.remaining, 0))
    if rows is not None:
        fields = jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), state[1:])
        state = DecodeState(state.cache, *fields)
    shape = state.token.shape[0], MAX_DECODE_STEPS
    written = (jnp.full(shape, NO_TOKEN),)
    if logprobs:
        count = num_top_tokens(model.decoder.config.vocab_size)
        written += jnp.zeros(shape), jnp.zeros((*shape, count), jnp.int32), jnp.zeros((*shape, count))
    _, state, written = jax.lax.while_loop(is_unfinished, step, (0, state, written))
    if rows is not None:
        fields = jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), before[1:], state[1:])
        state = DecodeState(state.cache, *fields)
    return state, written if logprobs else written[0]


def write_chunks(
    model: LlavaModel,
    state: DecodeState,
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    tokens: Int[Array, "R T"],
    visual: Float[Array, "R T D"],
    max_new_tokens: Int[Array, "R"],
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    layers: Sequence[LlamaBlock] | None = None,
) -> tuple[DecodeState, Int[Array, "R 1"], Float[Array, "R V"]]:
    """Computes further tokens of prompts in their slots, and writes one token after each. Returns its logits too.

    Args:
      slots: slot of each row; the number of slots for a row of padding, which changes no slot.
      starts: number of tokens that a slot has already.
      lengths: number of tokens of each row; `tokens` is padded behind them.
      visual: features that replace the visual tokens.
      max_new_tokens: see `prefill`; 0 in a row whose prompt goes on.
      layers: see `Llama.extend`.
    """
    length, offsets = state.cache.length, jnp.arange(tokens.shape[1])
    positions = jnp.where(offsets < lengths[:, None], starts[:, None] + offsets, length)
    attend = SlotAttention(positions, state.cache, slots)
    hidden, cache = model.decoder.extend(model.insert_visual(tokens, visual), positions, state.cache, layers, attend)
    logits = model.decoder.logits(_last(hidden, lengths))
    rows = DecodeState((), jnp.zeros_like(starts), starts + lengths - 1, max_new_tokens, sampling)
    rows, token = write(rows, logits, eos_ids)
    fields = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state[1:], rows[1:])
    return DecodeState(cache, *fields), token[:, None], logits


def num_top_tokens(vocab_size: int) -> int:
    return min(NUM_TOP_TOKENS, vocab_size)


def log_probabilities(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> tuple[Array, Array, Array]:
    """Returns the natural log-probability of each token, and ids and log-probabilities of the most likely tokens.

    They are those of the model's own distribution, whatever the temperature.
    """
    logprobs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
    top, ids = jax.lax.top_k(logprobs, num_top_tokens(logits.shape[1]))
    return own, ids, top


def write(
    state: DecodeState, logits: Float[Array, "B V"], eos_ids: tuple[int, ...]
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Chooses the next token of each slot from the logits after its newest one; NO_TOKEN in a free slot."""
    active = state.remaining > 0
    position = jnp.where(active, state.position + 1, state.position)
    token = sample(logits, state.sampling, position)
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
    logits = model.decoder.logits(_last(hidden, lengths))
    state = DecodeState(cache, jnp.zeros_like(prompt_lengths), prompt_lengths - 1, max_new_tokens, sampling)
    state, token = write(state, logits, eos_ids)
    return state, token[:, None]


def _last(hidden: Float[Array, "B T D"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
