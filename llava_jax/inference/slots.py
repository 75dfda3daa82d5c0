"""Runs the device side of continuous batching: prompts computed in chunks, and answers, in the slots of one cache."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.errors import UserError
from llava_jax.images import Layout
from llava_jax.inference import decode as programs
from llava_jax.inference.decode import MAX_DECODE_STEPS, NO_TOKEN, DecodeState
from llava_jax.inference.sampling import Sampling, seed_words
from llava_jax.inference.shapes import tile_bucket
from llava_jax.models.llava import from_params
from llava_jax.models.lora import select_adapters
from llava_jax.models.slot_cache import SlotCache
from llava_jax.text.encode import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from llava_jax.inference.llava import Llava

CHUNK_TOKENS = (32, 64, 128, 256, 512)
"""Padded numbers of tokens of a chunk."""

MAX_ROWS = 4
"""Number of chunks in a batch."""

MAX_BATCH_TOKENS = 512
"""Maximum number of padded tokens in a batch of several chunks. A longer chunk alone uses the device as well."""

CPU_DECODE_ROWS = (1, 4, 8)
"""Numbers of slots that a CPU decodes without the others: one of 16 takes a third of the time, or less.

Other devices decode all slots, so that no bit of an answer depends on its neighbours.
"""


@dataclass(frozen=True)
class SlotRequest:
    """How a slot's answer is drawn. `max_new_tokens` counts the first token too; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class PromptChunk:
    """Some consecutive tokens of a prompt, to be computed in a slot.

    Attributes:
      slot: index of the slot, which has no answer in progress.
      start: number of tokens whose keys and values the slot has already: from earlier chunks, a copy, or an earlier
        request.
      tokens: int32 [C] with IMAGE_TOKEN_ID at visual tokens; 1 to `SlotEngine.max_chunk` of them.
      visual: features of these visual tokens, [number of visual tokens, D]; None if there are none.
      request: for a prompt's last chunk, after which the first token is written; None if further chunks follow.
    """

    slot: int
    start: int
    tokens: Int[np.ndarray, "C"]
    visual: np.ndarray | None = None
    request: SlotRequest | None = None


class Written:
    """Tokens that a call wrote: a row for each chunk (`write`) or slot (`decode`), a column for each step.

    The call returns before the device has computed them; reading an array waits. Log-probabilities are natural ones of
    the model's distribution, whatever the temperature; None unless asked for.

    Attributes:
      tokens: int32 [rows, steps], NO_TOKEN where none was written.
      logprobs: float32 [rows, steps].
      top_tokens: int32 [rows, steps, 20], the most likely tokens.
      top_logprobs: float32 [rows, steps, 20], theirs.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Sequence[Array]]], rows: int, steps: int):
        """`parts`: row numbers, and arrays of these rows: tokens, and with log-probabilities the others. Padding is
        behind the rows and `steps`. Rows of no part wrote nothing."""
        self._parts, self._rows, self._steps = parts, rows, steps

    tokens = functools.cached_property(lambda self: self._read(0))
    logprobs = functools.cached_property(lambda self: self._read(1))
    top_tokens = functools.cached_property(lambda self: self._read(2))
    top_logprobs = functools.cached_property(lambda self: self._read(3))

    def _read(self, index: int) -> np.ndarray | None:
        if index >= len(self._parts[0][1]):
            return None
        parts = [(list(rows), np.asarray(arrays[index])[: len(rows), : self._steps]) for rows, arrays in self._parts]
        result = np.full((self._rows, *parts[0][1].shape[1:]), NO_TOKEN, parts[0][1].dtype)
        for rows, part in parts:
            result[rows] = part
        return result


class SlotEngine:
    """Computes prompts and answers of independent requests in the slots of one key-value cache.

        features = engine.encode_image(tiles, layout)
        written = engine.write([PromptChunk(slot=3, start=0, tokens=prompt, visual=features, request=SlotRequest(64))])
        written = engine.decode(active, steps=4)    # active: bool [slots]; tokens [slots, 4]

    A prompt longer than `max_chunk` is written by several calls; between them other slots may decode. A slot has the
    keys and values of its prompt and of all written tokens but the newest. They stay until other tokens overwrite
    them, so that a later prompt with the same first tokens continues after these, in the same slot or, by `copy`, in
    another. Chunks and free slots never change the keys and values of other slots or earlier positions.

    Every program has its shape from a fixed set: after `warm_up`, no call compiles.

    Attributes:
      slots: number of slots.
      context: maximum number of tokens of a prompt and its answer.
      max_chunk: maximum number of tokens of a chunk.
    """

    def __init__(self, llava: "Llava", slots: int, context: int, cache_dtype: str | None = None):
        """Allocates the cache for a model.

        Args:
          context: maximum number of tokens of a prompt and its answer, at most the model's context.
          cache_dtype: "int8" halves or quarters the cache; None stores the model's dtype.

        Raises UserError if the mesh has data axes: a server is one process for each copy of the model.
        """
        engine = llava.engine
        self._mesh, self._layers = engine.mesh, engine.layers
        if self._mesh is not None and self._mesh.size != self._mesh.shape["tensor"]:
            raise UserError("mesh: a server's slots need a mesh of the tensor axis alone; start one server for each "
                            "copy of the model")
        if cache_dtype not in (None, "int8"):
            raise UserError(f"the cache's dtype {cache_dtype!r} is neither int8 nor the model's")
        self._processor, self._parameters, text = llava.processor, engine.parameters, llava.config.text
        self._own_parameters = [{}, *llava.adapters.values()]  # of the base, and of each adapter
        self.slots, self.context = slots, min(context, text.max_length)
        self._chunk_sizes = [size for size in CHUNK_TOKENS if size < 2 * self.context]
        self.max_chunk = self._chunk_sizes[-1]
        few = () if self._layers is None else CPU_DECODE_ROWS
        self._decode_rows = [count for count in few if count < slots] + [slots]
        self._jit(engine.graph, engine.eos_ids)
        self._dtype = jnp.dtype(llava.dtype)
        self._no_visual = {
            (rows, size): self._put(np.zeros((rows, size, text.hidden_size), self._dtype))
            for rows in (1, MAX_ROWS) for size in self._chunk_sizes if rows == 1 or rows * size <= MAX_BATCH_TOKENS}
        shape = text.num_layers, slots, text.num_kv_heads, self.context, text.head_dim
        self._cache = shape, cache_dtype or llava.dtype
        self.reset()

    def _jit(self, graph, eos_ids: tuple[int, ...]) -> None:
        # A list of arrays is flattened much faster than modules, in every call.
        self._layer_arrays, structure = jax.tree.flatten(self._layers)
        cache = self._shardings(P(None, None, "tensor"))
        state = DecodeState(cache, *[self._shardings(P())] * 4)

        def jit(function, results=1, **options):
            out = state if results == 1 else (state, *[self._shardings(P())] * (results - 1))
            return jax.jit(function, **options, **({} if self._mesh is None else {"out_shardings": out}))

        def build(parameters, layers, adapters):
            model, layers = from_params(graph, parameters), jax.tree.unflatten(structure, layers)
            if adapters is not None:
                for module in layers or [model.decoder]:
                    select_adapters(module, adapters)
            return model, layers

        def write(parameters, layers, adapters, state, *inputs):
            model, layers = build(parameters, layers, adapters)
            return programs.write_chunks(model, state, *inputs, eos_ids, layers)

        def decode(parameters, layers, adapters, state, active, steps, logprobs, rows):
            model, layers = build(parameters, layers, adapters)
            return programs.decode(model, state, active, steps, eos_ids, layers, logprobs, rows)

        def features(parameters, tiles, adapter):
            model = from_params(graph, parameters)
            if adapter is not None:
                select_adapters(model, adapter)
            return model.visual_features(tiles)[0]

        def copy(state, *inputs):
            return state._replace(cache=state.cache.copy(*inputs))

        def empty(shape, dtype):
            sampling = Sampling(jnp.zeros((shape[1], 2), jnp.uint32), jnp.zeros(shape[1]), jnp.ones(shape[1]))
            cache, numbers = SlotCache.zeros(*shape, dtype), jnp.zeros(shape[1], jnp.int32)
            return DecodeState(cache, numbers, numbers, numbers, sampling)

        # The state is donated, so that a call updates the cache in place.
        self._write = jit(write, 3, donate_argnums=3)
        self._decode = jit(decode, 2, donate_argnums=3, static_argnames="logprobs")
        self._copy = jit(copy, donate_argnums=0)
        self._empty = jit(empty, static_argnums=(0, 1))
        self._features = jax.jit(features)
        self._log_probabilities = jax.jit(lambda logits, token: [
            x[:, None] for x in programs.log_probabilities(logits, token[:, 0])])

    def reset(self) -> None:
        """Empties all slots. After an exception of another call their state is lost, and this call is due."""
        self._adapters = np.zeros(self.slots, np.int32)  # adapter of each slot
        self._state = None  # the new cache may need its memory
        with self._on_mesh():
            self._state = self._empty(*self._cache)

    def encode_image(self, tiles: UInt8[np.ndarray, "I H W 3"], layout: Layout,
                     adapter: int = 0) -> Float[np.ndarray, "tokens D"]:
        """Returns the features of an image's visual tokens in the compute dtype, with newlines, in order.

        `adapter`: number of an adapter in `Llava.adapters`, whose own projector is used if it has one; 0 is the base.
        """
        padded = np.zeros((1, tile_bucket(len(tiles)), *tiles.shape[1:]), np.uint8)
        padded[0, : len(tiles)] = tiles
        features = np.asarray(self._run_features(padded, adapter))
        index = np.where(layout.index == layout.tiles * self._processor.features_per_tile, -1, layout.index)
        if layout.weight is None:
            return features[index]
        weighted = sum(features[index[:, k]].astype(np.float32) * layout.weight[:, k, None] for k in range(4))
        return weighted.astype(features.dtype)

    def _run_features(self, tiles: np.ndarray, adapter: int) -> jax.Array:
        with self._on_mesh():
            return self._features(self._parameters | self._own_parameters[adapter], tiles,
                                  self._selected(np.int32(adapter)))

    def _selected(self, adapters: np.ndarray) -> np.ndarray | None:
        """Returns the adapters to select; None if the model has none, so that its programs select none.

        They are copied because the device may read them after the next `write`.
        """
        return adapters.copy() if len(self._own_parameters) > 1 else None

    def write(self, chunks: Sequence[PromptChunk], adapters: Sequence[int] = (), logprobs: bool = False) -> Written:
        """Computes chunks of different slots, and writes the first token after each one with a request.

        `adapters`: number of each chunk's adapter in `Llava.adapters`, which its slot keeps; by default 0, the base.
        Returns one column, whose rows are in the order of `chunks`. Raises ValueError for a chunk that does not fit.
        """
        for chunk, adapter in zip(chunks, adapters or [0] * len(chunks), strict=True):
            self._check(chunk)
            self._adapters[chunk.slot] = adapter
        groups: dict[int, list[int]] = {}
        for row, chunk in enumerate(chunks):
            groups.setdefault(next(size for size in self._chunk_sizes if size >= len(chunk.tokens)), []).append(row)
        parts = []
        for size, members in groups.items():
            # A CPU computes two short chunks faster one by one than in a batch of four.
            rows = MAX_ROWS if (MAX_ROWS, size) in self._no_visual and len(members) > 2 else 1
            for i in range(0, len(members), rows):
                part = members[i : i + rows]
                parts.append((part, self._run_write([chunks[row] for row in part], rows, size, logprobs)))
        return Written(parts, len(chunks), 1)

    def _run_write(self, chunks: Sequence[PromptChunk], rows: int, size: int, logprobs: bool) -> list[Array]:
        slots, starts = np.full(rows, self.slots, np.int32), np.zeros(rows, np.int32)
        lengths, max_new_tokens = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        tokens, visual = np.zeros((rows, size), np.int32), self._no_visual[rows, size]
        sampling = Sampling(np.zeros((rows, 2), np.uint32), np.zeros(rows, np.float32), np.ones(rows, np.float32))
        if any(chunk.visual is not None for chunk in chunks):
            visual = np.zeros(visual.shape, self._dtype)
        for row, chunk in enumerate(chunks):
            slots[row], starts[row], lengths[row] = chunk.slot, chunk.start, len(chunk.tokens)
            tokens[row, : len(chunk.tokens)] = chunk.tokens
            if chunk.visual is not None:
                visual[row, tokens[row] == IMAGE_TOKEN_ID] = chunk.visual
            if (request := chunk.request) is not None:
                max_new_tokens[row], sampling.seed[row] = request.max_new_tokens, seed_words(request.seed)
                sampling.temperature[row], sampling.top_p[row] = request.temperature, request.top_p
        adapters = self._selected(np.append(self._adapters, 0)[slots])  # a row of padding has the base
        with self._on_mesh():
            visual = self._put(visual) if isinstance(visual, np.ndarray) else visual
            self._state, token, logits = self._write(self._parameters, self._layer_arrays, adapters, self._state, slots,
                                                     starts, lengths, tokens, visual, max_new_tokens, sampling)
            more = self._log_probabilities(logits, token) if logprobs else ()
        return [token, *more]

    def _check(self, chunk: PromptChunk) -> None:
        """Raises ValueError for a chunk that does not fit its slot."""
        count = len(chunk.tokens)
        last = chunk.start + count + (chunk.request.max_new_tokens if chunk.request else 0)
        if not (0 <= chunk.slot < self.slots and 0 <= chunk.start and last <= self.context
                and 1 <= count <= self.max_chunk):
            raise ValueError(f"{count} tokens from {chunk.start} in slot {chunk.slot}, at the end {last}, do not fit: "
                             f"{self.slots} slots, {self.context} tokens each, {self.max_chunk} in a call")

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the keys and values of the first `length` tokens of a slot to another slot, which is free."""
        with self._on_mesh():
            self._state = self._copy(self._state, np.int32(source), np.int32(target), np.int32(length))

    def decode(self, active: Bool[np.ndarray, "slots"], steps: int = MAX_DECODE_STEPS,
               logprobs: bool = False) -> Written:
        """Writes up to `steps` tokens in every slot that is active and whose answer has not ended.

        An answer ends at an end token, or after its `max_new_tokens`. The answer in a slot that is not active ends too.
        Calls with up to 16 steps return that many columns.
        """
        slots = np.flatnonzero(active)
        count = self.slots if logprobs else next(count for count in self._decode_rows if count >= len(slots))
        rows = None if count == self.slots else np.append(slots, [self.slots] * (count - len(slots))).astype(np.int32)
        adapters = self._adapters if rows is None else np.append(self._adapters, 0)[rows]
        with self._on_mesh():
            self._state, written = self._decode(self._parameters, self._layer_arrays, self._selected(adapters),
                                                self._state, np.array(active), np.int32(steps), logprobs, rows)
        owners = range(self.slots) if rows is None else slots
        return Written([(owners, written if logprobs else [written])], self.slots, steps)

    def warm_up(self, report: Callable[[int, int, str], None]) -> None:
        """Compiles every program. `report` gets the number of finished programs, that of all, and the next one's
        name."""
        processor = self._processor
        counts = {1} | {1 + width * height // processor.size**2 for width, height in processor.pinpoints}
        calls = [(f"tower, {count} tiles", lambda count=count: self._run_features(
            np.zeros((1, count, processor.size, processor.size, 3), np.uint8), 0))
            for count in sorted(set(map(tile_bucket, counts)))]
        calls += [(f"decode, {rows} slots", lambda rows=rows: self.decode(np.arange(self.slots) < rows, 1))
                  for rows in self._decode_rows]
        calls.append(("decode, log-probabilities", lambda: self.decode(np.zeros(self.slots, bool), 1, True)))
        # With visual features of its own, and with the stored zeros.
        empty = PromptChunk(self.slots, 0, np.zeros(1, np.int32), np.zeros((0, 1), np.float32))
        calls += [(f"prompts, {rows} x {size} tokens", lambda rows=rows, size=size: [
            self._run_write(chunks, rows, size, logprobs=True) for chunks in ([], [empty])])
            for rows, size in self._no_visual]
        calls.append(("copy", lambda: self.copy(0, 0, 0)))
        for number, (name, call) in enumerate(calls):
            report(number, len(calls), name)
            with self._on_mesh():
                call()
        report(len(calls), len(calls), "")

    def _shardings(self, spec: P) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, spec)

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._shardings(P()))

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
