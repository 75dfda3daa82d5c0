"""scripts/train_mini_backbones.py: the text that the decoder reads, the losses, and the shipped parts."""

import dataclasses
import hashlib
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import llava_jax
from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.images import CLIP_MEAN, CLIP_STD
from llava_jax.models.llava import from_params, to_params
from llava_jax.synthesize.rules.facts import inferences
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_conversation
from llava_jax.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
SHIPPED = Path(llava_jax.__file__).parent / "data" / "mini"
EOS = 2


@pytest.fixture(scope="module")
def parts():
    """The modules `pages`, `vision` and an Encoder of the shipped tokenizer."""
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from mini_backbones import common, pages, vision

    yield pages, vision, common.Encoder(SHIPPED / "language")
    sys.path.remove(str(REPOSITORY / "scripts"))


def test_shipped_weights_are_the_recorded_ones_and_small():
    record = json.loads((SHIPPED / "scores.json").read_text())
    for folder, part in (("vision", "vision"), ("language", "comparing")):
        digest = hashlib.sha256((SHIPPED / folder / "model.safetensors").read_bytes()).hexdigest()
        assert digest == record[part]["sha256"]
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 8e6


def test_words_of_scenes_are_one_piece_and_other_text_survives(parts):
    encode = parts[2]
    for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.POSITIONS):
        assert len(encode(word)) == 1
    for text in ("빨간 원은 왼쪽 위에 있습니다.", "쀍 ß 🦙", "Is the pink ring above it?"):
        ids = encode(text)
        assert encode.tokenizer.decode(ids) == text and encode.tokenizer.token_to_id("<unk>") not in ids
    assert len(encode("빨간 원은 왼쪽 위에 있습니다.")) <= 10  # words, not bytes


def read_objects(text: str) -> list[tuple[str, ...]]:
    """The place and the words of every object in "top-left small red circle, ...", whatever their order."""
    return [tuple(sorted(re.findall("[a-z-]+", part))) for part in text.split(",")]


def plain_lists(parts, in_order: float):
    """Look-up pages in plain words: their text, and what they list and say after it, each object a tuple of words."""
    pages, _, encode = parts
    rng = random.Random(3)
    for _ in range(300):
        page = pages.lookup_page(encode, rng, in_order=in_order)
        text = encode.tokenizer.decode([words[0] for words in page.words])
        if "." not in text and all(len(words) == 1 for words in page.words):  # neither sentences nor sums
            objects = read_objects(text)
            yield text, objects[: len(objects) // 2], objects[len(objects) // 2 :]


def test_lists_of_sentences_join_at_half_of_the_first_phase(parts):
    pages, _, encode = parts
    for progress, joined in ((0.49, False), (0.5, True)):
        rng = random.Random(0)
        drawn = [pages.lookup_page(encode, rng, progress).words for _ in range(60)]
        assert any(encode("Is.")[-1:] == list(words) for page in drawn for words in page) == joined


def test_restatements_hold(parts):
    """What a look-up page says after its list is in the list, and names one object alone."""
    seen = 0
    for text, listed, said in plain_lists(parts, 0.0):
        for words in said:
            assert sum(set(words) <= set(known) for known in listed) == 1, (text, words)
            seen += 1
    assert seen > 100


def test_lists_in_reading_order_name_every_object_in_turn(parts):
    lists = list(plain_lists(parts, 1.0))
    assert len(lists) > 20
    for text, listed, said in lists:
        assert sorted(listed) == sorted(said)
        places = [scenes.POSITIONS.index(word) for words in said for word in words if word in scenes.POSITIONS]
        assert places == sorted(places) and len(places) == len(listed), text


def test_long_answers_weigh_by_what_their_words_say(parts):
    pages, _, encode = parts
    for text, facts in (("A small red circle is at the top-left.", {"small", "red", "circle", "top-left"}),
                        ("왼쪽 위에 큰 빨간 원이 있습니다.", {"왼쪽", "위에", "큰", "빨간", "원"}),
                        ("작은 고리는 가운데에 있습니다.", {"작", "고리", "가운데에"}),
                        ("The red circle is furthest up.", {"red", "circle", "up"})):
        page = pages.Page(encode)
        page.add_long(encode(text), "description")
        heavy = {encode.tokenizer.decode([words[0]]) for words, weight in zip(page.words, page.weights, strict=True)
                 if weight == pages.FACT_WEIGHT}
        assert heavy == facts
        page = pages.Page(encode)
        page.add_long(encode(text), "reasoning")
        assert set(page.weights[1:]) == {pages.REASON_WEIGHT, pages.FACT_WEIGHT}


def test_only_sums_and_openings_have_no_weight(parts):
    pages, _, encode = parts
    rng = random.Random(5)
    batch, labels = pages.pack(lambda: pages.domain_page(encode, rng), 8, 184)
    summed = (batch["words"] >= 0).sum(-1) > 1
    opens = batch["positions"] == 0
    empty = batch["segments"] == 0
    np.testing.assert_array_equal(batch["weights"] == 0, summed | opens | empty)
    labelled = np.array([[bool(label) for label in row] for row in labels])
    assert (batch["weights"][labelled] >= pages.LONG_WEIGHT).all()
    assert (batch["weights"][~labelled] <= pages.OTHER_WEIGHT).all()


def test_late_pages_have_more_of_what_is_learned_last_and_fewer_lists(parts):
    pages, _, encode = parts
    found = []
    for mix in (pages.EARLY, pages.LATE):
        rng = random.Random(6)
        labels = [set(pages.domain_page(encode, rng, mix).labels) for _ in range(600)]
        counts = {kind: sum(kind in labels for labels in labels) for kind in ("count", "shape", "content to place")}
        found.append((counts["count"] / counts["shape"], counts["content to place"]))
    (early, lists), (late, fewer) = found
    assert late > 1.1 * early and fewer < 0.6 * lists, found


def test_the_tuning_has_more_long_answers_whose_words_weigh_more(parts):
    pages, _, encode = parts
    counts, least = [], []
    for mix in (pages.LATE, pages.TUNING):
        rng, found, weights = random.Random(9), 0, []
        for page in (pages.domain_page(encode, rng, mix) for _ in range(300)):
            long = [label in ("description", "reasoning") for label in page.labels]
            found += sum(is_long and words == (EOS,) for is_long, words in zip(long, page.words, strict=True))
            weights += [weight for weight, is_long in zip(page.weights, long, strict=True) if is_long]
        counts.append(found / 300)
        least.append(min(weights))
    assert counts[0] < 0.6 and 1.8 < counts[1] <= 3, counts  # pages about a crowd and about sentences have none
    assert least == [0.3, 1.0]


def test_six_tenths_of_long_pages_have_one_short_answer_and_reasoning(parts):
    pages, _, encode = parts
    for language in ("en", "ko"):
        rng, alone = random.Random(10), 0
        for _ in range(200):
            page = pages.question_page(encode, rng, "grid", language, long=3, mix=pages.TUNING)
            kinds = [label for label, words in zip(page.labels, page.words, strict=True) if label and words == (EOS,)]
            if sum(kind == "reasoning" for kind in kinds) >= 2 and len(kinds) <= 4:
                assert sum(kind in pages.rules.KINDS for kind in kinds) == 1, kinds
                alone += 1
        assert 100 < alone < 140


def test_pages_of_the_tuning_about_sentences_have_short_answers_half_about_a_crowd(parts):
    pages, _, encode = parts
    mix = dataclasses.replace(pages.TUNING, forms={"sentences": 1})
    rng, places = random.Random(12), []
    for _ in range(200):
        labels = set(pages.domain_page(encode, rng, mix).labels) - {""}
        assert labels <= set(pages.rules.KINDS)
        places.append("count" not in labels)  # of a crowd, no number is asked
    assert 0.4 < np.mean(places) < 0.7


def test_comparisons_are_inferences_of_pictures(parts):
    pages = parts[0]
    rng, found = random.Random(13), set()
    for _ in range(3000):
        scene = pages.Scene(pages.annotate(scenes.sample(rng, scenes.PAIRS)))
        found |= {fact.key for facts in inferences(scene) for fact in facts}
    assert set(pages.COMPARISONS) <= found


def test_the_last_tuning_asks_more_for_comparisons(parts):
    """In English, on what a covered half hides, on the way and on what is alike."""
    pages, _, encode = parts
    shares = []
    for mix in (pages.TUNING, pages.COMPARING):
        rng, found = random.Random(11), []
        for _ in range(200):
            page = pages.domain_page(encode, rng, mix)
            text = encode.tokenizer.decode([words[0] for words in page.words[40:]], skip_special_tokens=False)
            questions = re.findall(r"\[INST\](.*?)\[/INST\]", text)
            found += [bool(re.search("half|way|direction|in common|shares|alike|agree", one)) for one in questions]
        shares.append(np.mean(found))
    assert shares[1] > 1.5 * shares[0], shares


def test_chats_have_the_tokens_of_stage_2(parts):
    """A chat page has the tokens that the library makes of its conversation, about an image of 36 visual tokens."""
    pages, _, encode = parts
    page = pages.question_page(encode, random.Random(8), "grid", mix=pages.TUNING)
    ids = [words[0] for words in page.words]
    ids[3:39] = [IMAGE_TOKEN_ID] * 36  # after <s>[INST] and a space
    turns = []
    for text in encode.tokenizer.decode(ids[39:], skip_special_tokens=False).split("</s>")[:-1]:
        question, answer = text.replace("[INST]", "").split("[/INST]")
        turns.append({"from": "human", "value": "<image>\n" * (not turns) + question.strip()})
        turns.append({"from": "gpt", "value": answer.strip()})
    example = encode_conversation(turns, "mistral_instruct", Tokenizer.load(SHIPPED / "language"), 36)
    assert example.tokens.tolist() == ids and len(turns) >= 8


def test_every_caption_has_words_of_the_text_tower(parts):
    vision = parts[1]
    rng = random.Random(7)
    for _ in range(300):
        for caption in scenes.captions(scenes.sample(rng)):
            assert 0 < len(vision.word_ids(caption)) <= vision.SCENE_TOKENS


def test_the_probe_reads_what_patches_tell_and_guesses_the_rest(parts):
    vision = parts[1]
    pictures = vision.draw(300, "0")
    shown = np.zeros((300, 36, 8))  # of its objects, a patch tells the colour alone
    for scene, patches in zip(pictures[0], shown, strict=True):
        for thing in scene:
            patches[vision.covered(thing), list(scenes.COLOURS).index(thing.colour)] = 1
    images = iter((shown[:250], shown[250:]))
    scores = vision.probe(lambda _: next(images), pictures)
    assert scores["colour"] > 0.97 and scores["size"] < 0.9 and max(scores["shape"], scores["position"]) < 0.45, scores


def test_recoloured_pictures_are_called_by_no_colour(parts):
    vision = parts[1]
    pictures = vision.draw(40, "1")
    batch = vision.region_batch(pictures, random.Random(2), 60)
    as_drawn = np.array([(pictures[1] == image).all((1, 2, 3)).any() for image in batch["images"]])
    assert 8 < (~as_drawn).sum() < 30
    words = np.array(["", *vision.WORDS])
    for number in range(60):
        said = set(words[batch["texts"][number]].flat)
        assert as_drawn[number] or not said & set(scenes.COLOURS)
        assert bool(batch["captions"][number].any()) == as_drawn[number]
    named = {word for texts in batch["texts"][as_drawn] for word in words[texts].flat}
    assert named >= {*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.POSITIONS}
    hues = {tuple(np.argsort(image.reshape(-1, 3).std(0))) for image in batch["images"][~as_drawn]}
    assert len(hues) > 2  # not all grey or of one tint


def test_the_class_token_has_passed_all_layers(parts):
    clip = parts[1].Clip(nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
    patches, pooled = clip.features(images)
    normalised = (images.astype(np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    np.testing.assert_allclose(patches, clip.vision(normalised, -2)[:, 1:], atol=1e-5)
    np.testing.assert_allclose(pooled, clip.vision.post_norm(clip.vision(normalised, -1)[:, 0]), atol=1e-5)


def test_every_parameter_of_clip_has_a_gradient_but_the_unused_head(parts):
    vision = parts[1]
    graph, parameters = to_params(vision.Clip(nnx.Rngs(0)))
    batch = vision.region_batch(vision.draw(8, "0"), random.Random(0), 4)
    gradient = jax.grad(lambda parameters: from_params(graph, parameters).loss(batch))(parameters)
    silent = {path for path, value in gradient.items() if not np.abs(value).max() > 0}
    assert silent == {"text/lm_head/kernel"} and all(np.isfinite(value).all() for value in gradient.values())


def test_a_saved_decoder_is_loaded_bit_for_bit(parts, tmp_path):
    from mini_backbones import common, language

    parameters = to_params(language.Language(nnx.Rngs(1)))[1]
    common.save(tmp_path, parameters, {})
    loaded = common.load(tmp_path, to_params(language.Language(nnx.Rngs(2)))[1])
    assert loaded.keys() == parameters.keys()
    for path, value in parameters.items():
        np.testing.assert_array_equal(loaded[path], value)


def test_three_heads_look_back_at_the_start(parts):
    """Constant terms, rotated as complex numbers, give one, two and three positions back most of the attention."""
    from mini_backbones import language

    parameters = language.look_back(to_params(language.Language(nnx.Rngs(0)))[1])
    query, key = (np.asarray(parameters[f"decoder/layers/attention/{name}_proj/bias"], np.float64) for name in "qk")
    query, key = (terms[..., :16] + 1j * terms[..., 16:] for terms in (query, key))
    rotation = np.exp(1j * np.arange(20)[:, None] * 10_000.0 ** -(np.arange(16) / 16))
    scores = np.einsum("lhd,td,lhd,sd->lhts", query, rotation, key.conj(), rotation.conj()).real / 32**0.5
    weights = np.exp(scores)[:, :, 10, :11]
    weights /= weights.sum(-1, keepdims=True)
    for head in range(3):
        assert weights[0, head, 9 - head] > 0.7
    np.testing.assert_allclose(weights[0, 3], 1 / 11)
    np.testing.assert_allclose(weights[1:], 1 / 11)


def test_every_language_parameter_has_a_gradient(parts):
    from mini_backbones import language

    pages, _, encode = parts
    graph, parameters = to_params(language.Language(nnx.Rngs(0)))
    rng = random.Random(0)
    batch, _ = pages.pack(lambda: pages.domain_page(encode, rng), 2, 184)
    gradient = jax.grad(partial(language.language_loss, graph))(parameters, batch)
    silent = {path for path, value in gradient.items() if not np.abs(value).max() > 0}
    assert all(np.isfinite(value).all() for value in gradient.values()) and not silent


def test_muon_updates_kernels_as_torch_does_and_all_else_by_nadam(parts):
    """Two steps on random gradients: the kernel of each layer as a matrix of inputs and outputs."""
    from mini_backbones import common, language

    parameters = to_params(language.Language(nnx.Rngs(0)))[1]
    rule, rng = common.muon(), np.random.default_rng(0)
    state, found = rule.init(parameters), dict(parameters)
    gradients = [{path: rng.normal(size=value.shape).astype(np.float32) for path, value in parameters.items()}
                 for _ in range(2)]
    for gradient in gradients:
        updates, state = rule.update(gradient, state, found)
        found = {path: value + 0.01 * updates[path] for path, value in found.items()}
    for path, value in parameters.items():
        if path.endswith("/kernel"):
            shape = (4, 384 if "down_proj" in path else 128, -1)
            layers = [torch.nn.Parameter(torch.tensor(layer)) for layer in np.reshape(value, shape)]
            optimizer = torch.optim.Muon(layers, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            for gradient in gradients:
                for layer, part in zip(layers, gradient[path].reshape(shape), strict=True):
                    layer.grad = torch.tensor(part)
                optimizer.step()
            right = np.stack([layer.detach().numpy() for layer in layers]).reshape(value.shape) - value
        else:
            mean = square = right = 0
            for t, g in enumerate((gradient[path] for gradient in gradients), 1):
                mean, square = 0.9 * mean + 0.1 * g, 0.98 * square + 0.02 * g * g
                ahead = 0.9 * mean / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
                right = right - 0.01 * ahead / (square / (1 - 0.98**t)) ** 0.5
        wrong = np.linalg.norm(found[path] - value - right) / np.linalg.norm(right)
        assert wrong < (0.15 if path.endswith("/kernel") else 1e-3), path  # torch orthogonalizes in bfloat16
