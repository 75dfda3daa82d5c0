"""Jits prefill and decode of one model, for prompts of any length that start together."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from llava_jax.images import Layout
from llava_jax.inference import decode as programs
from llava_jax.inference.decode import MAX_DECODE_STEPS, NO_TOKEN, DecodeState
from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.sampling import Sampling, seed_words
from llava_jax.inference.scoring import ScoringRow, log_probabilities, score_positions
from llava_jax.inference.shapes import bucket, length_bucket, pad_tiles, pad_tokens, prefix_bucket, short_bucket
from llava_jax.models.llava import LlavaModel, Parameters, from_params
from llava_jax.parallel.sharding import ROWS


@dataclass(frozen=True)
class Prompt:
    """A request as arrays."""

    tokens: np.ndarray  # int32 [T], IMAGE_TOKEN_ID at the position of every visual token
    tiles: np.ndarray  # uint8 [I, H, W, 3]
    layouts: Sequence[Layout]  # layouts of the images, which the tiles belong to
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    prefix_length: int = 0  # number of tokens up to the last visual one
    prefix_key: Hashable = None  # equal for prompts with the same images and first tokens; None if that is unknown


class Engine:
    """Generates answers to prompts that start together. `SlotEngine` (slots.py) is the other engine, of a server.

        state, tokens = engine.prefill(prompts)                  # a row for each prompt, and its first token [B, 1]
        state, tokens = engine.decode(state, active, steps=16)   # tokens [B, 16], NO_TOKEN where none was written

    A row ends with its answer, or once `active` is False for it.

    All shapes are rounded up: rows to powers of two, tile slots by `tile_bucket`, lengths to 2^k or 3 * 2^k from 64 on.
    `prefill` is compiled once for each (rows, prompt length, tile slots, cache length), and `decode` once for each
    (rows, cache length).

    Attributes:
      graph: structure of the model (`to_params`).
      layers: on one CPU the decoder's layers one by one, as views of the stacked ones; otherwise None.
    """

    def __init__(self, graph: nnx.GraphDef, parameters: Parameters, eos_ids: Iterable[int],
                 mesh: jax.sharding.Mesh | None = None):
        """Jits the model with this graph and these parameters; a token of `eos_ids` ends an answer.

        `mesh`: devices that have the parameters, laid out by `sharding.TABLE`. Rows are split over its data axes, and
        padded to a multiple of them. None: one device.
        """
        self.graph, self.eos_ids = graph, tuple(sorted(eos_ids))
        self.parameters = parameters
        self._processor = self._model().config.processor
        self.mesh, self._layouts = mesh, {}
        if mesh is not None:
            rows, cache = NamedSharding(mesh, ROWS), NamedSharding(mesh, P(None, *ROWS, None, "tensor"))
            state = DecodeState((cache, cache), rows, rows, rows, rows)
            self._layouts["out_shardings"] = state, NamedSharding(mesh, P())  # every process reads the tokens

        def prefill(parameters, *inputs, length):
            state, tokens = programs.prefill(from_params(graph, parameters), *inputs, self.eos_ids, length)
            return self._swap_cache(state), tokens

        def extend(parameters, prefix, *inputs, length):
            prefix = self._swap_cache(prefix)
            state, tokens = programs.extend(from_params(graph, parameters), prefix, *inputs, self.eos_ids, length)
            return self._swap_cache(state), tokens

        def decode(parameters, layers, state, active, steps):
            return programs.decode(from_params(graph, parameters), state, active, steps, self.eos_ids, layers)

        self._prefill = jax.jit(prefill, static_argnames="length", **self._layouts)
        self._extend = jax.jit(extend, static_argnames="length", **self._layouts)
        # The cache is donated, so that a step updates it in place.
        self._decode = jax.jit(decode, donate_argnames="state", **self._layouts)
        self._score = jax.jit(lambda parameters, *inputs: log_probabilities(from_params(graph, parameters), *inputs))

    @property
    def parameters(self) -> Parameters:
        """Parameters by path. They can be replaced by others of the same shapes."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._parameters = jax.tree.map(jnp.asarray, parameters)
        self.layers = unstack_on_cpu(self._model().decoder.layers)

    def prefill(self, prompts: Sequence[Prompt], rows: int = 1,
                length: int | None = None) -> tuple[DecodeState, Int[Array, "B 1"]]:
        """Computes prompts and writes the first token of each answer.

        Prompts that start with the same images and tokens are computed once up to there, if they are few enough for
        that to be worth it.

        Args:
          rows: number of rows of the result, if that is more than there are prompts.
          length: cache length of the result, rounded up. By default it has room for the prompts alone.
        """
        rows = self._rows(max(rows, len(prompts)))
        length = length_bucket(max(length or 0, *(len(prompt.tokens) for prompt in prompts)))
        owners = self._prefix_owners(prompts, rows)
        if owners is None:
            tokens, lengths = pad_tokens([prompt.tokens for prompt in prompts], rows, length_bucket)
            inputs = tokens, lengths, *self._pad_tiles(tokens, prompts), *_settings(prompts, rows)
            with self._on_mesh():
                return self._prefill(self.parameters, *self._split(inputs), length=length)
        # The prefixes are rows of a separate state, which write no tokens.
        count = max(rows // 4, bucket(len(owners)))
        tokens, lengths = pad_tokens([prompt.tokens[: prompt.prefix_length] for prompt in owners.values()], count,
                                     prefix_bucket)
        prefix, _ = self._prefill(self.parameters, tokens, lengths, *self._pad_tiles(tokens, owners.values()),
                                  *_settings((), count), length=tokens.shape[1])
        prefix_rows = np.zeros(rows, np.int32)
        prefix_rows[: len(prompts)] = [list(owners).index(prompt.prefix_key) for prompt in prompts]
        further = pad_tokens([prompt.tokens[prompt.prefix_length :] for prompt in prompts], rows, short_bucket)
        return self._extend(self.parameters, prefix, prefix_rows, *further, *_settings(prompts, rows), length=length)

    def decode(self, state: DecodeState, active: Sequence[bool],
               steps: int = MAX_DECODE_STEPS) -> tuple[DecodeState, Int[Array, "B C"]]:
        """Writes up to `steps` tokens in each slot that is active and has tokens remaining; `state` is donated."""
        with self._on_mesh():
            return self._decode(self.parameters, self.layers, state, self._split(np.asarray(active)), np.int32(steps))

    def generate(self, prompts: Sequence[Prompt], answers: Sequence[Detokenizer], steps: int = MAX_DECODE_STEPS,
                 rows: int = 1) -> Iterator[list[str]]:
        """Answers prompts that start together. Yields the next piece of each text, until all answers have ended.

        The first pieces have one token, the next ones up to `steps` tokens.
        """
        length = max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        state, tokens = self.prefill(prompts, rows, length)
        active = np.zeros(len(state.token), bool)
        while True:
            fresh = np.asarray(tokens)[: len(prompts)]
            yield [answer.add(row[row != NO_TOKEN]) for answer, row in zip(answers, fresh, strict=True)]
            active[: len(prompts)] = [answer.finish_reason is None for answer in answers]
            if not active.any():
                return
            state, tokens = self.decode(state, active, steps)

    def score(self, scoring_rows: Sequence[ScoringRow], tiles: Sequence[np.ndarray],
              layouts: Sequence[Sequence[Layout]], rows: int = 1) -> list[dict[int, float]]:
        """Returns for each row, with the images of its prompt, its continuations' log-probabilities by number."""
        rows = self._rows(max(rows, len(scoring_rows)))
        tokens, _ = pad_tokens([row.tokens for row in scoring_rows], rows, length_bucket)
        inputs = tokens, *pad_tiles(tokens, tiles, layouts, self._processor), *score_positions(scoring_rows, rows)
        with self._on_mesh():
            scores = np.asarray(self._score(self.parameters, *self._split(inputs)), np.float64)
        return [{number: scores[row, : len(tokens), column].sum().item()
                 for column, (number, tokens) in enumerate(scored.continuations)}
                for row, scored in enumerate(scoring_rows)]

    def _prefix_owners(self, prompts: Sequence[Prompt], rows: int) -> dict[Hashable, Prompt] | None:
        """Returns one prompt for each different prefix; None if computing prefixes once is not worth it."""
        owners: dict[Hashable, Prompt] = {}
        for prompt in prompts:
            owners.setdefault(prompt.prefix_key, prompt)
        # On data axes prefixes would have to travel between devices.
        if None in owners or max(rows // 4, bucket(len(owners))) > rows // 2 or self._data_devices > 1:
            return None
        return owners

    def _pad_tiles(self, tokens: np.ndarray, prompts: Iterable[Prompt]) -> tuple[np.ndarray | None, ...]:
        tiles, layouts = zip(*((prompt.tiles, prompt.layouts) for prompt in prompts), strict=True)
        return pad_tiles(tokens, tiles, layouts, self._processor)

    def _model(self) -> LlavaModel:
        return from_params(self.graph, self.parameters)

    def _swap_cache(self, state: DecodeState) -> DecodeState:
        """Swaps positions and heads of the cache on a CPU, whose layers expect heads first."""
        return state if self.layers is None else state._replace(cache=tuple(x.swapaxes(2, 3) for x in state.cache))

    @property
    def _data_devices(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    def _rows(self, count: int) -> int:
        """Returns the padded number of rows for `count` prompts: a bucket, and a multiple of the data axes."""
        return -(-bucket(count) // self._data_devices) * self._data_devices

    def _split(self, inputs: Any) -> Any:
        """Splits the rows of arrays over the data axes."""
        return jax.device_put(inputs, NamedSharding(self.mesh, ROWS)) if self.mesh else inputs

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def _settings(prompts: Sequence[Prompt], rows: int) -> tuple[np.ndarray, Sampling]:
    """Returns max_new_tokens and sampling of each row; a row of padding writes nothing."""
    max_new_tokens = np.zeros(rows, np.int32)
    sampling = Sampling(np.zeros((rows, 2), np.uint32), np.zeros(rows, np.float32), np.ones(rows, np.float32))
    for row, prompt in enumerate(prompts):
        max_new_tokens[row], sampling.seed[row] = prompt.max_new_tokens, seed_words(prompt.seed)
        sampling.temperature[row], sampling.top_p[row] = prompt.temperature, prompt.top_p
    return max_new_tokens, sampling


def unstack_on_cpu(stack: nnx.Module) -> list[nnx.Module] | None:
    """Returns stacked layers one by one, as views of the stack's memory; None if that is not on the first CPU alone.

    XLA for CPUs would copy each layer's weights out of the stack for every token.
    """
    arrays, first = jax.tree.leaves(stack), jax.local_devices()[0]
    if first.platform != "cpu" or any(x.devices() != {first} for x in arrays):
        return None
    stack = jax.tree.map(np.asarray, stack)
    return jax.device_put([jax.tree.map(lambda x, i=i: x[i], stack) for i in range(len(arrays[0]))], may_alias=True)
