"""Requests that come and go in the slots of a server, against each of them alone."""

import numpy as np
import pytest
from peft_models import DECODER, adapted

from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.llava import Request, load
from llava_jax.inference.slots import Chunk, SlotEngine, SlotRequest

SLOTS = 16


def chunks_of(llava, engine, request, slot, sizes=(), start=0, adapter=0):
    """A request's prompt, cut at sizes."""
    tokens, layouts = llava._encode(request)
    tiles = llava._tiles(request.images)
    parts, first = [np.zeros((0, llava.config.text.hidden_size), np.float32)], 0
    for layout in layouts:
        parts.append(engine.encode_image(tiles[first : first + layout.tiles], layout, adapter))
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


def test_slots_have_their_own_adapters(model_dir, hf_model, llava, engine, pictures, tmp_path):
    """The base and two adapters in one state, one with its own projector. No adapter compiles a program of its own."""
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    adapted(hf_model, target_modules=["q_proj", "down_proj", "fc1"], r=2).save_pretrained(folders["one"])
    adapted(hf_model, target_modules=DECODER, modules_to_save=["multi_modal_projector"]).save_pretrained(folders["two"])
    several = load(model_dir, "float32", adapters=folders)
    alone = load(model_dir, "float32", adapter=folders["two"])
    mixed, two = SlotEngine(several, 3, 128), SlotEngine(alone, 1, 128)
    request = Request("<image>\nIs it?", pictures[:1], 8)
    [[base], [first], [second]] = [chunks_of(several, mixed, request, slot, adapter=slot) for slot in range(3)]
    starts = mixed.write([second, base, first], [2, 0, 1]).tokens[:, 0]
    found = np.append(starts[[1, 2, 0], None], mixed.decode(np.ones(3, bool), 8).tokens, axis=1)
    found = [[token for token in row if token != NO_TOKEN] for row in found.tolist()]
    assert found[0] == run(engine, chunks_of(llava, engine, request, 0))
    assert found[2] == run(two, chunks_of(alone, two, request, 0))
    assert found[1] not in (found[0], found[2])
    assert mixed._features._cache_size() == mixed._write._cache_size() == mixed._decode._cache_size() == 1
