import dataclasses
import json
import random
import re
from collections import Counter, defaultdict

import korean_reader
import pytest
import rules_reader

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene
from llava_jax.errors import UserError
from llava_jax.evaluate.probes.make_probes import FILE, write_probes
from llava_jax.evaluate.probes.make_probes import KINDS as PROBE_KINDS
from llava_jax.synthesize import rules
from llava_jax.synthesize.rules.facts import questions
from llava_jax.synthesize.rules.phrases import PhraseTable

TEACHER = rules.RulesTeacher()
TABLES = PhraseTable("en"), PhraseTable("ko")
NUMBERS = ("zero", "one", "two", "three", "four")


POSITIONS = {"top-left": "왼쪽 위", "top": "위쪽 가운데", "top-right": "오른쪽 위", "left": "왼쪽 가운데",
             "centre": "한가운데", "right": "오른쪽 가운데", "bottom-left": "왼쪽 아래", "bottom": "아래쪽 가운데",
             "bottom-right": "오른쪽 아래"}  # fmt: skip
ANSWERS = {"yes": "네", "no": "아니요", "left": "왼쪽", "right": "오른쪽", "above": "위쪽", "below": "아래쪽",
           **{word: str(number) for number, word in enumerate(NUMBERS)},
           **{english: korean for korean, english in (korean_reader.COLOUR_NOUNS | korean_reader.NOUNS).items()}}


def translate(name):
    """The Korean of an English name such as "large red circles" or "object at the top"."""
    name, _, place = name.partition(" at the ")
    words = {"large": "큰", "small": "작은", "object": "도형"}
    words |= {english: korean for korean, english in (korean_reader.COLOURS | korean_reader.NOUNS).items()}
    words |= {many: words[one] for one, many in rules_reader.PLURALS.items() if one in words}
    korean = " ".join(words[word] for word in name.split(" "))
    return f"{POSITIONS[place]}에 있는 {korean}" if place else korean


def context_of(objects):
    return Context("", "x.jpg", tuple(scenes.captions(objects)), tuple(thing.to_box() for thing in objects))


def scene_of(objects):
    return Scene(context_of(objects))


def fits(phrase, thing):
    """Whether every word of "small red circle", "red objects" or "object at the top" holds of an object of the
    hidden scene.
    """
    phrase, _, place = phrase.partition(" at the ")
    words = {thing.size, thing.colour, thing.shape, thing.shape + "s", thing.shape + "es", "object", "objects"}
    return words.issuperset(phrase.split()) and place in ("", thing.position)


def answer(question, objects):
    """The answer by the scene itself: cells and names, not boxes."""
    def one(phrase):
        [thing] = [o for o in objects if fits(phrase, o)]
        return thing

    if match := re.fullmatch(r"What (colour|shape) is the (.*)\?", question):
        return getattr(one(match[2]), match[1])
    if match := re.fullmatch(r"How many (.*) are there\?", question):
        return NUMBERS[sum(fits(match[1], o) for o in objects)]
    if match := re.fullmatch(r"Where is the (.*)\?", question):
        return one(match[1]).position
    if match := re.fullmatch(r"Is there (an?) (.*)\?", question):
        assert (match[1] == "an") == (match[2][0] in "aeiou")
        return "yes" if any(fits(match[2], o) for o in objects) else "no"
    if match := re.fullmatch(r"Is the (.*) between the (.*) and the (.*)\?", question):
        (x, y), (u, v), (s, t) = ((o.cell % 3, o.cell // 3) for o in map(one, match.groups()))
        if (2 * x, 2 * y) == (u + s, v + t):
            return "yes"
        beyond = (x - u) * (s - u) + (y - v) * (t - v) <= 0 or (x - s) * (u - s) + (y - t) * (v - t) <= 0
        aside = abs((x - u) * (t - v) - (y - v) * (s - u)) > 0.3 * ((s - u) ** 2 + (t - v) ** 2)
        assert beyond or aside, "unclear"
        return "no"
    if match := re.fullmatch(r"Are the (.*), the (.*) and the (.*) in this order from left to right\?", question):
        centres = [one(phrase).x for phrase in match.groups()]
        return "yes" if centres == sorted(centres) else "no"
    match = re.fullmatch(r"On which side of the (.*) is the (.*)\?", question)
    b, a = map(one, match.groups())
    across, down = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
    assert (across == 0) != (down == 0), "two sides would be right"
    return ("left" if across < 0 else "right") if across else ("above" if down < 0 else "below")


def test_short_answers_agree_with_the_hidden_scene():
    rng, counts = random.Random(0), Counter()
    for _ in range(600):
        objects = scenes.sample(rng, scenes.PAIRS)
        for question in TEACHER.conversation(scene_of(objects), rng, turns=10):
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
        for question in TEACHER.conversation(Scene(context), rng, turns=10):
            if question.kind == "sign":
                assert question.question == f"What does the {sign.colour} sign say?"
                assert question.answer == " ".join(sign.words)
            elif question.kind == "between":
                three = map(rules_reader.Scene(context).one, re.findall(rules_reader.NAME, question.question))
                assert question.answer == ("yes" if rules_reader.between(*three) else "no")
            else:
                assert question.answer == answer(question.question, objects), (question, objects)
            about = {o.size for o in objects if f"{o.colour} {o.shape}" in question.about}
            assert not question.small or "small" in about
            counts[question.kind, question.small] += 1
    assert {kind for kind, small in counts if small} == {"colour", "shape", "position", "relation"}
    assert counts["sign", False] > 100


def test_no_answer_gives_itself_away():
    """Of single questions, and of those of conversations, where a question is asked once."""
    rng, single, asked = random.Random(1), defaultdict(Counter), defaultdict(Counter)
    for _ in range(1500):
        scene = scene_of(scenes.sample(rng))
        for kind in rules.KINDS:
            if question := TEACHER.question(kind, scene, rng):
                single[kind][question.answer] += 1
        for question in TEACHER.conversation(scene, rng, turns=10):
            asked[question.kind][question.answer] += 1
    for answers, most in ((single, 0.57), (asked, 0.6)):
        shares = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
        assert max(shares[kind] for kind in ("existence", "between", "order")) < most, shares
        assert shares["relation"] < 0.3 and shares["position"] < 0.14, shares
        assert shares["colour"] < 0.17 and shares["shape"] < 0.25 and shares["count"] < 0.5, shares


def test_a_hard_no_about_between():
    """Many a "no" names three objects in a line, with an outer one first."""
    rng, no = random.Random(2), Counter()
    for _ in range(1500):
        objects = scenes.sample(rng)
        question = TEACHER.question("between", scene_of(objects), rng)
        if question and question.answer == "no":
            names = re.fullmatch(r"Is the (.*) between the (.*) and the (.*)\?", question.question).groups()
            cells = sorted(o.cell for o in objects if f"{o.colour} {o.shape}" in names)
            no[tuple(cells) in scenes.LINES] += 1
    assert no[True] > 0.3 * no.total() and no[False] > 0.3 * no.total() > 20, no


def test_a_question_asks_one_picture_in_both_languages():
    """The Korean of a question has the same kind, names and answer as the English, which is known to be right."""
    ko, rng, counts = rules.RulesTeacher("ko"), random.Random(3), Counter()
    for index in range(300):
        scene = scene_of(scenes.sample(rng))
        both = (teacher.conversation(scene, random.Random(index), 10) for teacher in (TEACHER, ko))
        for one, other in zip(*both, strict=True):
            words = POSITIONS if one.kind == "position" else ANSWERS
            assert one.kind == other.kind and words[one.answer] == other.answer, (one, other)
            names = list(map(translate, re.findall(rules_reader.NAME, one.question)))
            korean = re.findall(korean_reader.NAME, re.sub("몇 개", "", other.question))  # 개 is a dog, too
            assert (names[::-1] if one.kind == "relation" else names) == korean, (one, other)
            counts[one.kind] += 1
    assert set(counts) == set(rules.KINDS)


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
                re.fullmatch(r"Is there an? (.*)\?", line["text"])[1] in shown[line["image"]]
            )


def test_a_missing_split_is_named(coco):
    with pytest.raises(UserError, match="captions_absent"):
        rules.open_split(coco, "absent")


def test_probes_ask_as_the_teacher_does(tmp_path):
    """Where both ask the same question, they use the same words in both languages, and give the same answer."""
    rng, taught, contexts = random.Random(6), {}, []
    for number in range(600):
        context = context_of(scenes.sample(rng, scenes.PAIRS))
        contexts.append(dataclasses.replace(context, image=str(number)))
        for kind, groups in questions(Scene(context), rng).items():
            for fact in sum(groups, []) if kind in rules.KINDS else ():
                (question, answer), (korean, other) = (table.say_short(fact) for table in TABLES)
                taught[str(number), question] = answer, korean, other
    write_probes(contexts, str(tmp_path), each=100)
    lines, counts = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()], Counter()
    for line in lines:
        if (line["image"], line["text"]) in taught:
            assert taught[line["image"], line["text"]] == (line["answer"], line["ko"]["text"], line["ko"]["answer"])
            counts[line["category"]] += 1
    assert set(counts) == set(PROBE_KINDS) - {"inside"} and counts.total() > 0.6 * len(lines), counts
