"""Batches of token ids through the jitted functions: shapes come in buckets, so that few programs are compiled."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.inference.decode import MAX_DECODE_STEPS, NO_TOKEN, State, decode, prefill, prefill_shared
from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.sampling import Sampling, seed_words
from llava_jax.inference.scoring import ScoringRow, log_probabilities, positions_of
from llava_jax.models.llava import Parameters, from_params
from llava_jax.parallel.sharding import ROWS


@dataclass(frozen=True)
class Job:
    """A request as the model sees it."""

    tokens: np.ndarray  # int32 [T], IMAGE_TOKEN_ID at the place of every visual token
    images: np.ndarray  # uint8 [I, H, W, 3]
    limit: int  # the most tokens to write
    temperature: float
    top_p: float
    seed: int
    begins: int = 0  # tokens up to and with those of the last image
    beginning: Hashable = None  # equal in jobs with the same images and first tokens; None where that is not known


class Engine:
    """Writes answers with one model.

    `prefill` is compiled once for each (rows, prompt length, image slots, cache length), `decode` once for each (rows,
    cache length). All of these are rounded up: rows and image slots to powers of two, lengths to 2^k or 3 * 2^k from
    64 on. A conversation that grows from nothing to a context of 4096 so compiles `decode` at most 13 times.
    """

    def __init__(self, graph: nnx.GraphDef, parameters: Parameters, ends: Iterable[int],
                 mesh: jax.sharding.Mesh | None = None):
        """`graph`, `parameters`: of a model, split; `ends`: the token ids with which an answer ends.

        `mesh`: the devices on which the parameters lie, as `sharding.TABLE` says; rows are shared out over its data
        axes, and filled up to a multiple of them. None: one device.
        """
        ends = tuple(sorted(ends))

        def prefill_(parameters, *inputs, size, read=prefill):
            state, token = read(from_params(graph, parameters), *inputs, ends, size)
            if self._layers is not None:
                state = state._replace(cache=tuple(part.swapaxes(2, 3) for part in state.cache))
            return state, token

        def decode_(parameters, layers, state, going, steps):
            return decode(from_params(graph, parameters), state, going, steps, ends, layers)

        self.graph = graph
        self.parameters = parameters
        self.ends = ends
        self._mesh, layouts = mesh, {}
        if mesh is not None:
            rows, cache = NamedSharding(mesh, ROWS), NamedSharding(mesh, P(None, *ROWS, None, "tensor"))
            # The host of every process reads what is written.
            layouts["out_shardings"] = State((cache, cache), rows, rows, rows, rows), NamedSharding(mesh, P())
        self._prefill = jax.jit(prefill_, static_argnames=("size", "read"), **layouts)
        # The cache is by far the largest thing that a step changes: it is given away, and updated in its place.
        self._decode = jax.jit(decode_, donate_argnames="state", **layouts)
        self._score = jax.jit(lambda parameters, *inputs: log_probabilities(from_params(graph, parameters), *inputs))

    @property
    def parameters(self) -> Parameters:
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._parameters = jax.tree.map(jnp.asarray, parameters)
        self._layers = layers_on_cpu(from_params(self.graph, self._parameters).decoder.layers)

    def run(
        self, jobs: Sequence[Job], answers: Sequence[Detokenizer], steps: int = MAX_DECODE_STEPS, rows: int = 1
    ) -> Iterator[list[str]]:
        """Answers one batch: adds tokens to `answers` until all have ended, and yields each one's next piece of text.

        The first pieces come after one token, the others after up to `steps` (at most MAX_DECODE_STEPS) tokens. The
        batch is filled up to `rows`, if it has fewer.
        """
        rows = self._rows(max(rows, len(jobs)))
        size = length_bucket(max(len(job.tokens) + job.limit for job in jobs))
        sampling = Sampling(np.zeros((rows, 2), np.uint32), np.zeros(rows, np.float32), np.ones(rows, np.float32))
        limits = np.zeros(rows, np.int32)
        for row, job in enumerate(jobs):
            limits[row] = job.limit
            sampling.seed[row] = seed_words(job.seed)
            sampling.temperature[row], sampling.top_p[row] = job.temperature, job.top_p
        read, inputs = self._prompts(jobs, rows)
        with self._on_mesh():
            state, written = self._prefill(self.parameters, *self._share((*inputs, limits, sampling)), size=size,
                                           read=read)
        going = np.zeros(rows, bool)
        while True:
            fresh = np.asarray(written)[: len(jobs)]
            yield [answer.add(row[row != NO_TOKEN]) for answer, row in zip(answers, fresh, strict=True)]
            going[: len(jobs)] = [answer.finish_reason is None for answer in answers]
            if not going.any():
                return
            with self._on_mesh():
                state, written = self._decode(self.parameters, self._layers, state, self._share(going),
                                              np.int32(steps))

    def score(self, readings: Sequence[ScoringRow], images: Sequence[np.ndarray],
              rows: int = 1) -> list[dict[int, float]]:
        """For each reading, with the images of its prompt: its continuations' numbers and log-probabilities."""
        rows = self._rows(max(rows, len(readings)))
        places = bucket(max(4, *(len(tokens) for reading in readings for _, tokens in reading.scored)))
        count = bucket(max(4, *(len(reading.scored) for reading in readings)))
        inputs = (pad_tokens([reading.tokens for reading in readings], rows, length_bucket), pad_images(images, rows),
                  *positions_of(readings, rows, places, count))
        with self._on_mesh():
            found = np.asarray(self._score(self.parameters, *self._share(inputs)), np.float64)
        return [{number: found[row, : len(tokens), column].sum().item()
                 for column, (number, tokens) in enumerate(reading.scored)} for row, reading in enumerate(readings)]

    def _prompts(self, jobs: Sequence[Job], rows: int) -> tuple[Callable, tuple]:
        """The function that reads the prompts, and its first arguments."""
        tokens = [job.tokens for job in jobs]
        firsts: dict[Hashable, int] = {}
        which = [firsts.setdefault(job.beginning, len(firsts)) for job in jobs]
        start, slots = jobs[0].begins, max(rows // 4, bucket(len(firsts)))
        # Worth it only where beginnings are few; on data axes they would have to travel between devices.
        if slots > rows // 2 or None in firsts or any(job.begins != start for job in jobs) or self._shares > 1:
            images = pad_images([job.images for job in jobs], rows)
            return prefill, (pad_tokens(tokens, rows, length_bucket), lengths_of(tokens, rows), images)
        own = [jobs[which.index(number)] for number in range(len(firsts))]
        beginnings = pad_tokens([job.tokens[:start] for job in own], slots, lambda length: length)
        rest, which = [prompt[start:] for prompt in tokens], np.pad(np.array(which, np.int32), (0, rows - len(jobs)))
        return prefill_shared, (beginnings, pad_images([job.images for job in own], slots), which,
                                pad_tokens(rest, rows, short_bucket), lengths_of(rest, rows))

    @property
    def _shares(self) -> int:
        return self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1

    def _rows(self, count: int) -> int:
        """Rows of a batch of `count`: few different numbers, which the devices of the data axes can share."""
        return -(-bucket(count) // self._shares) * self._shares

    def _share(self, inputs: Any) -> Any:
        """Arrays of as many rows, each device's own rows on it."""
        return jax.device_put(inputs, NamedSharding(self._mesh, ROWS)) if self._mesh else inputs

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()


def layers_on_cpu(stack: nnx.Module) -> list[nnx.Module] | None:
    """Stacked layers one by one, in the memory of the stack; None where that is not the first CPU's alone.

    XLA for CPUs would copy each layer's weights out of the stack for every token.
    """
    arrays, first = jax.tree.leaves(stack), jax.local_devices()[0]
    if first.platform != "cpu" or any(x.devices() != {first} for x in arrays):
        return None
    stack = jax.tree.map(np.asarray, stack)
    return jax.device_put([jax.tree.map(lambda x, i=i: x[i], stack) for i in range(len(arrays[0]))], may_alias=True)


def shape(images: int, tokens: int) -> tuple[int, int]:
    """What prompts share that are read together without waste: image slots and length, in buckets."""
    return bucket(images), length_bucket(tokens)


def bucket(count: int) -> int:
    """The next power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0


def length_bucket(length: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ...: at most a third of a padded row is padding."""
    length = max(length, 64)
    size = bucket(length)
    return size * 3 // 4 if length <= size * 3 // 4 else size


def short_bucket(length: int) -> int:
    """As `length_bucket`, from 16 on: for what is read behind images that were read before."""
    return length_bucket(4 * length) // 4


def pad_tokens(prompts: Sequence[Sequence[int]], rows: int, bucket: Callable[[int], int]) -> np.ndarray:
    """Prompts side by side, int32 [rows, T], zeros behind them; `bucket` makes T of the longest one's length."""
    padded = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return padded


def lengths_of(prompts: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """int32 [rows]; 1 for rows that only fill the batch."""
    return np.array([*map(len, prompts), *[1] * (rows - len(prompts))], np.int32)


def pad_images(images: Sequence[np.ndarray], rows: int) -> np.ndarray | None:
    """The rows' images in equally many slots, uint8 [rows, I, H, W, 3]; None if there are none."""
    slots = bucket(max(len(row) for row in images))
    if not slots:
        return None
    side = next(row.shape[1:] for row in images if len(row))
    padded = np.zeros((rows, slots, *side), np.uint8)
    for row, own in enumerate(images):
        padded[row, : len(own)] = own
    return padded
