import json
import random
import re
from collections import Counter
from hashlib import sha256

import pytest

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene
from llava_jax.errors import UserError
from llava_jax.synthesize import rules

CATEGORIES = tuple(f"{colour} {shape}" for colour, shape in scenes.PAIRS)
NUMBERS = ("zero", "one", "two", "three", "four")


def context_of(objects):
    return Context("", "x.jpg", tuple(scenes.captions(objects)), tuple(thing.to_box() for thing in objects))


def scene_of(objects):
    return Scene(context_of(objects))


def fits(phrase, thing):
    """Whether every word of "small red circle", "red objects" or "object at the top" holds of an object of the
    hidden scene.
    """
    phrase, _, place = phrase.partition(" at the ")
    words = {
        word: True
        for word in (
            thing.size,
            thing.colour,
            thing.shape,
            "object",
            thing.shape + "s",
            thing.shape + "es",
            "objects",
        )
    }
    return all(word in words for word in phrase.split()) and place in ("", thing.position)


def answer(question, objects):
    """The answer by the scene itself: cells and names, not boxes."""
    if match := re.fullmatch(r"What (colour|shape) is the (.*)\?", question):
        [thing] = [o for o in objects if fits(match[2], o)]
        return getattr(thing, match[1])
    if match := re.fullmatch(r"How many (.*) are there\?", question):
        return NUMBERS[sum(fits(match[1], o) for o in objects)]
    if match := re.fullmatch(r"Where is the (.*)\?", question):
        [thing] = [o for o in objects if fits(match[1], o)]
        return thing.position
    if match := re.fullmatch(r"Is there a (.*)\?", question):
        return "yes" if any(fits(match[1], o) for o in objects) else "no"
    match = re.fullmatch(r"On which side of the (.*) is the (.*)\?", question)
    [b], [a] = ([o for o in objects if fits(phrase, o)] for phrase in match.groups())
    across, down = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
    assert (across == 0) != (down == 0), "two sides would be right"
    return ("left" if across < 0 else "right") if across else ("above" if down < 0 else "below")


def test_short_answers_agree_with_the_hidden_scene():
    rng, counts = random.Random(0), Counter()
    for _ in range(400):
        objects = scenes.sample(rng, scenes.PAIRS)
        for question in rules.conversation(scene_of(objects), rng, CATEGORIES, turns=8):
            assert question.answer == answer(question.question, objects), (question, objects)
            counts[question.kind] += 1
    assert set(counts) == set(rules.KINDS) and min(counts.values()) > 100


def test_short_answers_about_larger_pictures():
    rng, counts = random.Random(5), Counter()
    for _ in range(200):
        size = rng.choice(((120, 120), (180, 60), (60, 180)))
        sign = scenes.sample_sign(rng, *size)
        objects = scenes.sample(rng, scenes.PAIRS, picture=size, sign=sign)
        boxes = [(f"{o.colour} {o.shape}", *o.box) for o in objects] + [(sign.category, *sign.box)]
        width, height = size
        context = Context("", "x.jpg", (), tuple(
            Box(name, x / width, y / height, (x + w) / width, (y + h) / height) for name, x, y, w, h in boxes))
        for question in rules.conversation(Scene(context), rng, CATEGORIES, turns=8):
            if question.kind == "sign":
                assert question.question == f"What does the {sign.colour} sign say?"
                assert question.answer == " ".join(sign.words)
            else:
                assert question.answer == answer(question.question, objects), (question, objects)
            about = {o.size for o in objects if f"{o.colour} {o.shape}" in question.about}
            assert not question.small or "small" in about
            counts[question.kind, question.small] += 1
    assert {kind for kind, small in counts if small} == {"colour", "shape", "position", "relation"}
    assert counts["sign", False] > 100


def test_no_answer_gives_itself_away():
    rng, answers = random.Random(1), {kind: Counter() for kind in rules.KINDS}
    for _ in range(1500):
        objects = scenes.sample(rng)
        for kind in rules.KINDS:
            if question := rules.ask(kind, scene_of(objects), rng, CATEGORIES):
                answers[kind][question.answer] += 1
    most = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    assert most["existence"] < 0.53 and most["relation"] < 0.28 and most["position"] < 0.14
    assert most["colour"] < 0.17 and most["shape"] < 0.25 and most["count"] < 0.5


def test_reasoning_and_detail_hold():
    rng = random.Random(4)
    for _ in range(300):
        objects = scenes.sample(rng)
        by_name = {f"{o.colour} {o.shape}": o for o in objects}
        text = rules.detail(scene_of(objects), rng).answer
        for thing in objects:
            assert f"{thing.size} {thing.colour} {thing.shape} is at the {thing.position}." in text
        question = rules.reasoning(scene_of(objects), rng)
        if question is None:
            continue
        if match := re.fullmatch(r"Which is (larger|higher), the (.*) or the (.*)\?", question.question):
            key = (lambda o: o.size == "small") if match[1] == "larger" else (lambda o: o.cell // 3)
            winner = min((match[2], match[3]), key=lambda name: key(by_name[name]))
            assert question.answer.startswith(f"The {winner}, because")
        elif match := re.fullmatch(
            r"Do the \w+ (\w+) and the \w+ (\w+) have the same shape\?", question.question
        ):
            assert question.answer.startswith("Yes" if match[1] == match[2] else "No")
        else:
            assert f"without it {NUMBERS[len(objects) - 1]} " in question.answer


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp("coco"), train=120, test=40, unseen=40, seed=1)


def test_records_are_llava_json(coco, tmp_path):
    assert rules.write_captions(coco, "train", tmp_path / "captions.json") == 120
    assert rules.write_instructions(coco, "train", tmp_path / "instructions.json", turns=8) == 120
    captions, instructions = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "instructions")
    )
    for record in captions + instructions:
        assert (coco / record["image"]).is_file()
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (
            len(record["conversations"]) // 2
        )
        assert record["conversations"][0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in record["conversations"]) == 1
    known = json.loads((coco / "annotations" / "captions_train.json").read_text())["annotations"]
    assert all(record["conversations"][1]["value"] in {c["caption"] for c in known} for record in captions)
    unseen = [f"{colour} {shape}" for colour, shape in scenes.UNSEEN]
    assert not any(pair in json.dumps(record) for pair in unseen for record in captions + instructions)
    rules.write_instructions(coco, "train", tmp_path / "again.json", turns=8)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "instructions.json").read_bytes()


def test_questions_about_unseen_pairs(coco, tmp_path):
    unseen = tuple(f"{colour} {shape}" for colour, shape in scenes.UNSEEN)
    count = rules.write_questions(coco, "unseen", tmp_path / "q.jsonl", about=unseen)
    contexts = rules.open_split(coco, "unseen")
    shown = {context.image: {box.category for box in context.boxes} for context in contexts}
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(lines) == count > 100
    assert {line["kind"] for line in lines} == set(rules.KINDS)
    for line in lines:
        if line["kind"] == "existence":
            assert any(pair in line["text"] for pair in unseen)
            assert (line["answer"] == "yes") == (
                line["text"].removeprefix("Is there a ").rstrip("?") in shown[line["image"]]
            )


def test_a_missing_split_is_named(coco):
    with pytest.raises(UserError, match="captions_absent"):
        rules.open_split(coco, "absent")


def test_the_miniature_is_what_its_backbones_were_trained_for(coco, tmp_path):
    """The shipped language backbone has seen this text; another wording would need another backbone."""
    rules.write_captions(coco, "train", tmp_path / "captions")
    rules.write_instructions(coco, "train", tmp_path / "instructions")
    rules.write_questions(coco, "test", tmp_path / "questions")
    rules.write_questions(coco, "unseen", tmp_path / "unseen", about=[" ".join(pair) for pair in scenes.UNSEEN])
    files = b"".join((tmp_path / name).read_bytes() for name in ("captions", "instructions", "questions", "unseen"))
    assert sha256(files).hexdigest() == "17a6bea6fcec0c4cbaeda80f4c80605d0cee478fc0e17707f6ffff3aef9bc70b"

    rng, asked = random.Random(3), []
    for _ in range(200):
        objects = scenes.sample(rng, scenes.PAIRS)
        asked += [
            *rules.conversation(scene_of(objects), rng, CATEGORIES, 8),
            rules.caption(context_of(objects), rng),
            rules.detail(scene_of(objects), rng),
            rules.reasoning(scene_of(objects), rng),
        ]
    text = json.dumps([[question.kind, question.question, question.answer] for question in asked if question])
    assert sha256(text.encode()).hexdigest() == "d0e36d2cc52dcb7329877bcf8c69eb823dc8270f7f6b29e52fa5a299809851b6"
