"""Batches of token ids through the jitted functions: shapes come in buckets, so that few programs are compiled."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from llava_jax.inference.answer import Answer
from llava_jax.inference.decode import CHUNK, NOTHING, decode, prefill
from llava_jax.inference.sampling import Sampling, seed_words
from llava_jax.models.llava import Parameters, merge


@dataclass(frozen=True)
class Job:
    """A request as the model sees it."""

    tokens: np.ndarray  # int32 [T], IMAGE_TOKEN_ID at the place of every visual token
    images: np.ndarray  # uint8 [I, H, W, 3]
    limit: int  # the most tokens to write
    temperature: float
    top_p: float
    seed: int


class Engine:
    """Writes answers with one model.

    `prefill` is compiled once for each (rows, prompt length, image slots, cache length), `decode` once for each (rows,
    cache length). All of these are rounded up: rows and image slots to powers of two, lengths to 2^k or 3 * 2^k from
    64 on. A conversation that grows from nothing to a context of 4096 so compiles `decode` at most 13 times.
    """

    def __init__(self, graph: nnx.GraphDef, parameters: Parameters, ends: Iterable[int]):
        """`graph`, `parameters`: of a model, split; `ends`: the token ids with which an answer ends."""
        ends = tuple(sorted(ends))

        def prefill_(parameters, tokens, lengths, images, limits, sampling, size):
            return prefill(merge(graph, parameters), tokens, lengths, images, limits, sampling, ends, size)

        def decode_(parameters, state, going, steps):
            return decode(merge(graph, parameters), state, going, steps, ends)

        self.parameters = parameters
        self.ends = ends
        self._prefill = jax.jit(prefill_, static_argnames="size")
        # The cache is by far the largest thing that a step changes: it is given away, and updated in its place.
        self._decode = jax.jit(decode_, donate_argnames="state")

    def run(self, jobs: Sequence[Job], answers: Sequence[Answer], steps: int = CHUNK) -> Iterator[list[str]]:
        """Answers one batch: adds tokens to `answers` until all have ended, and yields each one's next piece of text.

        The first pieces come after one token, the others after up to `steps` (at most CHUNK) tokens.
        """
        rows = bucket(len(jobs))
        length = length_bucket(max(len(job.tokens) for job in jobs))
        size = length_bucket(max(len(job.tokens) + job.limit for job in jobs))
        sampling = Sampling(np.zeros((rows, 2), np.uint32), np.zeros(rows, np.float32), np.ones(rows, np.float32))
        tokens, lengths, limits = np.zeros((rows, length), np.int32), np.ones(rows, np.int32), np.zeros(rows, np.int32)
        for row, job in enumerate(jobs):
            tokens[row, : len(job.tokens)] = job.tokens
            lengths[row], limits[row] = len(job.tokens), job.limit
            sampling.seed[row] = seed_words(job.seed)
            sampling.temperature[row], sampling.top_p[row] = job.temperature, job.top_p
        images = pad_images([job.images for job in jobs], rows)
        state, written = self._prefill(self.parameters, tokens, lengths, images, limits, sampling, size=size)
        going = np.zeros(rows, bool)
        while True:
            fresh = np.asarray(written)[: len(jobs)]
            yield [answer.add(row[row != NOTHING]) for answer, row in zip(answers, fresh, strict=True)]
            going[: len(jobs)] = [answer.finish_reason is None for answer in answers]
            if not going.any():
                return
            state, written = self._decode(self.parameters, state, going, np.int32(steps))


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
