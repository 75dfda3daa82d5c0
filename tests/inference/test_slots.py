"""Requests that come and go in the slots of a server, against each of them alone."""

import numpy as np
import pytest

from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.llava import Request
from llava_jax.inference.slots import Chunk, SlotEngine, SlotRequest

SLOTS = 16


def chunks_of(llava, engine, request, slot, sizes=(), start=0):
    """A request's prompt, cut at sizes."""
    tokens, layouts = llava._encode(request)
    tiles = llava._tiles(request.images)
    parts, first = [np.zeros((0, llava.config.text.hidden_size), np.float32)], 0
    for layout in layouts:
        parts.append(engine.encode_image(tiles[first : first + layout.tiles], layout))
        first += layout.tiles
    features, used = np.concatenate(parts), 0
    drawn = SlotRequest(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    chunks, sizes = [], list(sizes)
    at = 0
    while at < len(tokens):
        size = min(sizes.pop(0) if sizes else engine.max_chunk, len(tokens) - at)
        part = tokens[at : at + size]
        count = int((part < 0).sum())
        if at + size > start:
            chunks.append(Chunk(slot, at, part, features[used : used + count] if count else None,
                                drawn if at + size == len(tokens) else None))
        used, at = used + count, at + size
    return chunks


def run(engine, chunks, steps=16):
    """The answer of one request alone."""
    for chunk in chunks:
        written = engine.write([chunk])
    answer, active = written.tokens[0].tolist(), np.arange(engine.slots) == chunks[-1].slot
    while len(new := [token for token in engine.decode(active, steps).tokens[chunks[-1].slot] if token != NO_TOKEN]):
        answer += map(int, new)
    return answer


@pytest.fixture(scope="module")
def engine(llava):
    return SlotEngine(llava, SLOTS, 512)


def test_answers_alone_are_those_of_generate(llava, engine, pictures):
    for i in range(4):
        request = Request("<image>\n" * (i % 3) + f"What is thing number {i}?", pictures[: i % 3], 20, 0.7 * (i == 3),
                          0.9, seed=i)
        expected = llava.batch([request])[0].tokens
        assert run(engine, chunks_of(llava, engine, request, i)) == expected
        assert run(engine, chunks_of(llava, engine, request, 15 - i, [7, 9, 1, 20])) == expected
