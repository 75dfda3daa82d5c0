"""Requests that come and go in the slots of a server, against each of them alone."""

import dataclasses
from operator import ne
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from peft_models import DECODER, adapted
from PIL import Image

import llava_jax
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.inference.decode import NO_TOKEN
from llava_jax.inference.llava import Request, load
from llava_jax.inference.slots import MAX_ROWS, PromptChunk, SlotEngine, SlotRequest
from llava_jax.models.dot_product import attention
from llava_jax.models.llama import LlamaConfig
from llava_jax.models.llava import LlavaConfig, init_params
from llava_jax.models.slot_cache import BLOCK, SlotAttention, SlotCache
from llava_jax.models.vit import VisionConfig
from llava_jax.parallel.sharding import AXES

SLOTS = 16


def chunks_of(llava, engine, request, slot=0, sizes=(), start=0, adapter=0):
    """A request's prompt from `start` on, cut at sizes."""
    tokens, layouts = llava._encode(request)
    tiles = llava._tiles(request.images)
    parts, first = [np.zeros((0, llava.config.text.hidden_size), np.float32)], 0
    for layout in layouts:
        parts.append(engine.encode_image(tiles[first : first + layout.tiles], layout, adapter))
        first += layout.tiles
    features, chunks, sizes = np.concatenate(parts), [], list(sizes)
    drawn = SlotRequest(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    while start < len(tokens):
        stop = min(start + (sizes.pop(0) if sizes else engine.max_chunk), len(tokens))
        before, count = (int((part < 0).sum()) for part in (tokens[:start], tokens[start:stop]))
        chunks.append(PromptChunk(slot, start, tokens[start:stop], features[before : before + count] if count else None,
                            drawn if stop == len(tokens) else None))
        start = stop
    return chunks


def run(engine, chunks, steps=16):
    """The answer of one request alone."""
    for chunk in chunks:
        written = engine.write([chunk])
    answer, active = written.tokens[0].tolist(), np.arange(engine.slots) == chunks[-1].slot
    while len(new := [token for token in engine.decode(active, steps).tokens[chunks[-1].slot] if token != NO_TOKEN]):
        answer += map(int, new)
    return answer


def serve(engine, prompts, rng, cancelled=()):
    """The answers of prompts that are computed in random chunks and slots, at random times between random steps.

    Those whose number is in `cancelled` leave after some tokens.
    """
    waiting, pending, owners = list(range(len(prompts))), {}, {}
    answers, most = [[] for _ in prompts], 0
    while waiting or owners:
        for _ in range(rng.integers(0, 5)):
            free = [slot for slot in range(engine.slots) if slot not in owners]
            if not (waiting and free):
                break
            slot, number = int(rng.choice(free)), waiting.pop(0)
            owners[slot] = number
            pending[slot] = [dataclasses.replace(chunk, slot=slot) for chunk in prompts[number]]
        ready = [slot for slot in pending if rng.random() < 0.7][:MAX_ROWS]
        if ready:
            written = engine.write([pending[slot].pop(0) for slot in ready]).tokens
            assert written.shape == (len(ready), 1)
            for slot, row in zip(ready, written, strict=True):
                if pending[slot]:
                    assert row.tolist() == [NO_TOKEN]
                else:
                    del pending[slot]
                    answers[owners[slot]] += row.tolist()
        if waiting and len(owners) < engine.slots and rng.random() < 0.6:
            continue  # so that all slots are in use at some time
        active = np.array([slot in owners and slot not in pending for slot in range(engine.slots)])
        most = max(most, active.sum())
        written = engine.decode(active, int(rng.integers(1, 4))).tokens
        assert (written[~active] == NO_TOKEN).all()
        for slot in np.nonzero(active)[0].tolist():
            number = owners[slot]
            answers[number] += written[slot][written[slot] != NO_TOKEN].tolist()
            limit = prompts[number][-1].request.max_new_tokens
            if number in cancelled and answers[number][2:] or answers[number][-1] == 2 or len(answers[number]) >= limit:
                del owners[slot]
    return answers, most


@pytest.fixture(scope="module")
def engine(llava):
    return SlotEngine(llava, SLOTS, 512)


def random_request(rng, number, pictures):
    images = [pictures[i] for i in rng.integers(0, len(pictures), rng.integers(0, 3))]
    text = "<image>\n" * len(images) + f"What is thing number {number}?" + " Why?" * int(rng.integers(0, 40))
    return Request(text, images, int(rng.integers(1, 40)), 0.7 * (number % 4 == 3), 0.9, seed=number)


def test_answers_do_not_depend_on_other_slots(llava, engine, pictures):
    rng = np.random.default_rng(0)
    requests = [random_request(rng, number, pictures) for number in range(40)]
    alone = [answer.tokens for answer in llava.batch(requests, 1)]  # equals transformers' generate: test_llava.py
    assert len({tuple(answer) for answer in alone}) > 35
    prompts = [chunks_of(llava, engine, request, sizes=rng.integers(1, 60, rng.integers(0, 4)).tolist())
               for request in requests]
    answers, most = serve(engine, prompts, rng, cancelled := set(range(0, 40, 7)))
    assert most > SLOTS - 6
    for number, (answer, expected) in enumerate(zip(answers, alone, strict=True)):
        assert answer == (expected[: len(answer)] if number in cancelled else expected)


@pytest.mark.parametrize("max_tiles", [0, 1])
def test_images_of_several_tiles(tokenizer, max_tiles):
    """LLaVA-1.6's newlines, and OneVision's weights."""
    processor = ImageProcessor(28, "anyres", 4, pinpoints=((56, 28), (28, 84)), max_tiles=max_tiles,
                               several="pad" if max_tiles else "same")
    model = small_model(tokenizer, processor)
    engine, rng = SlotEngine(model, 4, 512), np.random.default_rng(1)
    pictures = [Image.new("RGB", (90, 30), "red"), Image.new("RGB", (20, 70), "blue")]
    requests = [random_request(rng, number, pictures) for number in range(10)]
    prompts = [chunks_of(model, engine, request, sizes=[11]) for request in requests]
    answers, _ = serve(engine, prompts, rng)
    assert answers == [answer.tokens for answer in model.batch(requests)]
    layouts = [layout for request in requests for layout in model._encode(request)[1]]
    assert max(layout.tiles for layout in layouts) == 4
    assert any(layout.weight is not None for layout in layouts) == bool(max_tiles)


def small_model(tokenizer, processor=None):
    config = LlavaConfig(
        VisionConfig(28, 7, 16, 16, 1, 1),
        LlamaConfig(2000, 64, 64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, max_length=512),
        feature_layer=-1, processor=processor)
    parameters = {path: value if path.endswith("norm/scale") else 15 * value
                  for path, value in init_params(config, seed=1).items()}
    return llava_jax.Llava(config, parameters, tokenizer)


@pytest.fixture(scope="module")
def small(tokenizer):
    return small_model(tokenizer)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_no_bit_depends_on_other_slots(small, cache_dtype):
    """Neither a slot's log-probabilities, nor its cache, nor what a free slot has; also at the context's end."""
    engine = SlotEngine(small, 4, 200, cache_dtype)
    rng = np.random.default_rng(2)
    texts = rng.integers(3, 2000, (4, 200)).astype(np.int32)
    engine.write([PromptChunk(0, 0, texts[0, :50], None, SlotRequest(20)), PromptChunk(1, 0, texts[1, :70])])
    before = [np.asarray(part) for part in engine._state.cache if part is not None]
    alone = engine.decode(np.array([True, False, False, False]), 8, logprobs=True)
    engine.write([PromptChunk(0, 0, texts[0, :50], None, SlotRequest(20))])
    engine.write([PromptChunk(1, 70, texts[1, 70:196], None, SlotRequest(4)), PromptChunk(2, 0, texts[2, :3]),
                  PromptChunk(3, 0, texts[3, :40], None, SlotRequest(100))])
    together = engine.decode(np.array([True, True, False, True]), 8, logprobs=True)
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(together, name)[0], getattr(alone, name)[0])
    assert (together.tokens[1] != NO_TOKEN).sum() <= 3 and (together.tokens[2] == NO_TOKEN).all()
    for old, new in zip(before, filter(lambda part: part is not None, engine._state.cache), strict=True):
        np.testing.assert_array_equal(old[:, 1, :, :70], np.asarray(new)[:, 1, :, :70])
        np.testing.assert_array_equal(old[:, 0, :, :50], np.asarray(new)[:, 0, :, :50])
        assert np.asarray(new)[:, 1, :, 70:196].any() and not np.asarray(new)[:, 2, :, 3:].any()


def test_a_prefix_that_a_slot_has_is_continued_and_copied(llava, engine, pictures):
    first = Request("<image>\nWhat is at the left?" + " Why?" * 60, pictures[:1], 20)
    second = dataclasses.replace(first, messages=first.messages + " Where?", max_new_tokens=12)
    expected = [answer.tokens for answer in llava.batch([first, second], 1)]
    assert run(engine, chunks_of(llava, engine, first, 2)) == expected[0]
    tokens = [llava.prompt_tokens(request) for request in (first, second)]
    shared = int((tokens[0] != tokens[1][: len(tokens[0])]).argmax())
    assert shared > BLOCK
    engine.copy(2, 5, shared)
    engine.write([PromptChunk(2, 0, np.full(30, 9, np.int32))])  # the copy is a copy
    assert run(engine, chunks_of(llava, engine, second, 5, start=shared)) == expected[1]
    # An answer's tokens but the newest have their keys and values too.
    continued = [*tokens[1], *expected[1][:-1]]
    full = run(engine, [PromptChunk(6, 0, np.array([*continued, 77], np.int32), chunks_of(
        llava, engine, second)[0].visual, SlotRequest(9))])
    assert run(engine, [PromptChunk(5, len(continued), np.array([77], np.int32), None, SlotRequest(9))]) == full


def test_log_probabilities_are_those_of_the_model(llava, engine, pictures):
    requests = [Request("<image>\nIs it?", pictures[:1], 6, 2.0, seed=4), Request("Is it so?", max_new_tokens=6)]
    chunks = [chunks_of(llava, engine, request, slot)[0] for slot, request in enumerate(requests)]
    first = engine.write(chunks, logprobs=True)
    further = engine.decode(np.arange(SLOTS) < 2, 5, logprobs=True)
    assert engine.write(chunks).logprobs is None
    for row, request in enumerate(requests):
        tokens, own, ids, top = (
            np.concatenate([getattr(written, name)[row] for written in (first, further)])
            for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"))
        inputs = llava.encode(request.messages, request.images)
        inputs["tokens"] = np.append(inputs["tokens"], tokens[None], axis=1)
        inputs.pop("visual_index", None)  # by default in order
        logits = np.asarray(llava.model(**inputs))[0, -1 - len(tokens) : -1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert own.shape == (6,) and ids.shape == top.shape == (6, 20)
        np.testing.assert_allclose(own, np.take_along_axis(expected, tokens[:, None], 1)[:, 0], atol=1e-3)
        np.testing.assert_allclose(top, -np.sort(-expected)[:, :20], atol=1e-3)
        np.testing.assert_allclose(top, np.take_along_axis(expected, ids, 1), atol=1e-3)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize(("slots", "T"), [(None, 5), ([2, 0], 5), (None, 1)])
def test_attention_equals_that_over_the_values_it_stored(cache_dtype, slots, T):
    """Rows of different lengths over several blocks, grouped heads, padding; against plain attention."""
    length, K, N, H = 3 * BLOCK, 2, 6, 8
    rng, B = np.random.default_rng(0), 3
    rows = list(range(B)) if slots is None else slots
    full = [rng.normal(size=(B, length, K, H)).astype(np.float32) for _ in range(2)]
    query = rng.normal(size=(len(rows), T, N, H)).astype(np.float32)
    cache = SlotCache.zeros(2, B, K, length, H, cache_dtype)
    everywhere = jnp.broadcast_to(jnp.arange(length), (B, length))
    _, cache = SlotAttention(everywhere, cache)(jnp.zeros((B, length, N, H)), *full, cache, 1)
    starts = np.array([2 * BLOCK + 7, 3, BLOCK - 2])[: len(rows)]
    positions = starts[:, None] + np.arange(T)
    new = [x[np.array(rows)[:, None], positions] for x in full]
    attend = SlotAttention(jnp.asarray(positions), cache, None if slots is None else jnp.array(slots))
    read, cache = attend(query, *new, cache, 1)
    stored = [np.asarray(part[1]).astype(np.float32) for part in (cache.keys, cache.values)]
    if cache_dtype == "int8":
        stored = [x * np.asarray(scale[1])[..., None] for x, scale in zip(stored, cache[2:], strict=True)]
        assert all(0 < np.abs(x.swapaxes(1, 2) - y).max() < 0.02 for x, y in zip(stored, full, strict=True))
    key, value = (x[rows].swapaxes(1, 2) for x in stored)
    mask = jnp.arange(length) <= positions[..., None]
    np.testing.assert_allclose(read, attention(query, key, value, mask), atol=2e-5)
    assert not np.asarray(cache.keys[0]).any()


def test_an_int8_cache_changes_logits_little(llava, engine, pictures):
    request = Request("<image>\nWhat is it?" + " Why?" * 40, pictures[:1], 2)
    int8, found = SlotEngine(llava, 2, 256, "int8"), []
    for each in (engine, int8):
        [chunk] = chunks_of(llava, each, request)
        each.write([chunk])
        found.append(each.decode(np.arange(each.slots) == 0, 1, logprobs=True).top_logprobs[0, 0])
    assert 0 < np.abs(found[0] - found[1]).max() < 0.3 < np.ptp(found[0])
    assert int8._state.cache.keys.dtype == jnp.int8


@pytest.mark.slow
def test_in_bfloat16_few_answers_change(model_dir, pictures, capsys):
    llava, rng = load(model_dir, "bfloat16"), np.random.default_rng(0)
    engine = SlotEngine(llava, SLOTS, 512)
    requests = [random_request(rng, number, pictures) for number in range(200)]
    prompts = [chunks_of(llava, engine, request) for request in requests]
    alone = [run(engine, chunks) for chunks in prompts]
    cut = [chunks_of(llava, engine, request, sizes=rng.integers(1, 60, rng.integers(0, 4)).tolist())
           for request in requests]
    found = {"among others": serve(engine, prompts, rng)[0], "in other chunks too": serve(engine, cut, rng)[0],
             "in Llava.batch": [answer.tokens for answer in llava.batch(requests, 16)]}
    changed = {name: sum(map(ne, answers, alone)) for name, answers in found.items()}
    with capsys.disabled():
        print(f"\nbfloat16, {len(alone)} answers of {np.mean(list(map(len, alone))):.0f} tokens, changed: {changed}")
    assert changed["in other chunks too"] < len(alone) / 10


def test_nothing_compiles_after_the_warm_up(tokenizer):
    processor = ImageProcessor(28, "anyres", 4, pinpoints=((56, 28), (28, 84)), max_tiles=1)
    engine, reports = SlotEngine(model := small_model(tokenizer, processor), 5, 100), []
    with compilations() as seen:
        engine.warm_up(lambda *report: reports.append(report))
    assert seen and reports[-1][0] == reports[-1][1] == len(reports) - 1 and all(name for *_, name in reports[:-1])
    sizes = [1, 31, 32, 33, 64, 65, 96]
    assert engine.max_chunk == 128
    with compilations() as seen:
        for width, height in ((1, 1), (90, 30), (20, 70)):
            image = Image.new("RGB", (width, height))
            features = engine.encode_image(processor(image), processor.layout(width, height))
            tokens = np.full(min(len(features), 60), -200, np.int32)
            engine.write([PromptChunk(3, 0, tokens, features[: len(tokens)], SlotRequest(3))])
        for count in range(1, MAX_ROWS + 1):
            for logprobs in (False, True):
                for size in sizes:
                    chunks = [PromptChunk(slot, 96 - size, np.full(size, 5), None, SlotRequest(4, 0.5, 0.9, 3))
                              for slot in range(count)]
                    assert engine.write(chunks, logprobs=logprobs).tokens.shape == (count, 1)
                for active in (np.ones(5, bool), np.arange(5) < count):
                    assert engine.decode(active, count, logprobs).tokens.shape == (5, count)
        engine.copy(1, 4, 100)
        engine.reset()
        engine.decode(np.zeros(5, bool))
    assert not seen
    with compilations() as seen:
        model.model(np.ones((1, 7), np.int32))
    assert seen  # the counter counts


@pytest.mark.parametrize("chunk", [
    PromptChunk(16, 0, np.ones(3, np.int32)), PromptChunk(-1, 0, np.ones(3, np.int32)),
    PromptChunk(0, -1, np.ones(3, np.int32)), PromptChunk(0, 510, np.ones(3, np.int32)),
    PromptChunk(0, 0, np.ones(0, np.int32)), PromptChunk(0, 500, np.ones(3, np.int32), None, SlotRequest(10))])
def test_a_chunk_that_does_not_fit_is_refused(engine, chunk):
    with pytest.raises(ValueError, match="do not fit: 16 slots, 512 tokens each, 512 in a call"):
        engine.write([chunk])


def test_an_unknown_dtype_and_a_mesh_with_data_axes_are_refused(llava):
    with pytest.raises(UserError, match="int4"):
        SlotEngine(llava, 1, 64, "int4")
    mesh = jax.sharding.AbstractMesh((2, 1, 2), AXES)
    with pytest.raises(UserError, match="mesh: a server's slots need a mesh of the tensor axis alone"):
        SlotEngine(SimpleNamespace(engine=SimpleNamespace(mesh=mesh, layers=None)), 1, 64)


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
