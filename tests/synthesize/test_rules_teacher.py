"""The rules teacher against a reader of its English that knows nothing of how it writes: every sentence must be
understood, and hold of the boxes."""

import random
import re
from collections import Counter

import pytest
from drawn_scenes import shapes
from english_grammar import agrees
from rules_reader import CAPTIONS, NUM, THINGS, Scene, evaluate, form, read

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene as TeacherScene
from llava_jax.errors import UserError
from llava_jax.synthesize.parse import Reject, parse
from llava_jax.synthesize.rules import RulesTeacher
from llava_jax.synthesize.rules.facts import description

KINDS = ("conversation", "detail_description", "complex_reasoning")


def things(number, rng):
    boxes = []
    for _ in range(rng.randint(1, 8)):
        width, height = rng.uniform(0.03, 0.7), rng.uniform(0.03, 0.7)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        boxes.append(Box(rng.choice(THINGS), x, y, x + width, y + height, rng.random() < 0.05))
    return Context(f"t{number}", "", CAPTIONS, tuple(boxes))


def replies(make, number, **options):
    rng, teacher = random.Random(0), RulesTeacher(**options)
    for index in range(number):
        context = make(index, rng)
        for kind in KINDS:
            yield kind, teacher.answer(kind, context), context


@pytest.mark.parametrize("make", [shapes, things])
def test_every_sentence_is_understood_and_holds(make):
    said = Counter()
    for kind, text, context in replies(make, 200):
        if text:
            evaluate(kind, text, Scene(context))
            said[kind] += 1
    assert min(said.values()) > 180


def test_the_reader_notices_what_is_false():
    """Of replies with one word changed, nearly all fail; those that pass are about what the word leaves true."""
    noticed, rng = Counter(), random.Random(3)
    swaps = {"left": "right", "right": "left", "above": "below", "below": "above", "upper": "lower", "two": "three",
             "three": "two", "yes": "no"}  # fmt: skip
    for make in (shapes, things):
        for kind, text, context in replies(make, 150):
            parts = re.split(r"(?<=[.?!])([ \n]+)", text)
            places = [(i, word) for i, part in enumerate(parts) for word in swaps
                      if re.search(rf"\b{word}\b(?! more| on)", part, re.I)
                      and not re.search(r"nothing|empty|no object|\?|would|ing ", part, re.I)]  # fmt: skip
            if places:
                index, word = rng.choice(places)
                parts[index] = re.sub(rf"\b{word}\b", swaps[word], parts[index], count=1, flags=re.I)
                try:
                    evaluate(kind, "".join(parts), Scene(context))
                    noticed[False] += 1
                except (AssertionError, ValueError, TypeError, IndexError, StopIteration):
                    noticed[True] += 1
    assert noticed[True] > 0.95 * noticed.total() > 600, noticed


def test_more_than_two_hundred_forms_of_each_kind():
    """The forms of a reasoned answer are those of its own sentences, not of what it first tells of the picture."""
    forms = {kind: Counter() for kind in KINDS}
    for kind, text, _ in replies(shapes, 700):
        sentences = re.split(r"(?<=[.?!])\s+", re.sub(r"(?:\n|^)(?:===|Question:|Answer:)(?=\n)", "", text))
        forms[kind].update(map(form, filter(None, sentences)))
    told = set(forms["detail_description"])
    own = [found for found in forms["complex_reasoning"] if found not in told]
    sizes = len(forms["conversation"]), len(told), len(own)
    assert min(sizes) >= 200, sizes
    for counts in forms.values():
        assert counts.most_common(1)[0][1] < 0.1 * counts.total()


@pytest.mark.parametrize("language", ["en", "ko"])
def test_replies_are_what_the_parser_accepts(language):
    """All of the shapes'; of other things those that give enough to say."""
    reasons = Counter()
    for make in (shapes, things):
        for kind, text, _ in replies(make, 150, language=language):
            try:
                parse(kind, text, question="What do you see?", language=language)
                reasons[make, "accepted"] += 1
            except Reject as reject:
                reasons[make, reject.reason] += 1
                assert reject.reason in ("empty", "too_short"), (reject, text)
    assert reasons[shapes, "accepted"] > 0.985 * 450 and reasons[things, "accepted"] > 0.8 * 450, reasons


def test_the_same_seed_says_the_same():
    one, same, other = (list(replies(shapes, 30, seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert sum(a[1] == b[1] for a, b in zip(one, other, strict=True)) < 5


def test_what_has_no_boxes_is_told_by_its_captions():
    teacher = RulesTeacher()
    bare = Context("1", "", ("A dog on a beach", "Two people watch a dog."))
    assert set(re.split(r"(?<=\.) ", teacher.answer("detail_description", bare))) <= {
        "A dog on a beach.", "Two people watch a dog."}  # fmt: skip
    assert teacher.answer("conversation", bare).count("Question:") == 1
    assert teacher.answer("complex_reasoning", bare) == ""
    assert RulesTeacher("ko").answer("conversation", bare) == ""


def test_objects_of_one_name_are_told_together_or_one_by_one():
    boxes = Box("red circle", 0.05, 0.05, 0.2, 0.2), Box("red circle", 0.6, 0.65, 0.98, 0.98)
    rng, scene = random.Random(0), TeacherScene(Context("", "", (), boxes))
    apart, together = re.compile("(?i)a small red circle.*a large red circle"), re.compile("(?i)two red circles.* one ")
    texts = [RulesTeacher().description(scene, rng).answer for _ in range(60)]
    assert all(bool(apart.search(text)) != bool(together.search(text)) for text in texts)
    assert 15 < sum(bool(apart.search(text)) for text in texts) < 45


def test_a_shape_whose_position_is_unclear_is_described():
    boxes = Box("red circle", 0.25, 0.25, 0.45, 0.45), Box("blue square", 0.75, 0.05, 0.95, 0.25)
    rng, scene = random.Random(0), TeacherScene(Context("", "", (), boxes))
    texts = [RulesTeacher(language).description(scene, rng).answer for language in ("en", "ko") for _ in range(20)]
    assert all("red circle" in text or "빨간 원" in text for text in texts)


def test_descriptions_add_facts_of_different_kinds():
    rng, added = random.Random(0), Counter()
    objects = {"total", "total_one", "list", "thing", "group", "group_at", "all_at", "nothing_else"}
    for number in range(300):
        scene = TeacherScene(shapes(number, rng))
        keys = [fact.key for fact in description(scene, rng) if fact.key not in objects]
        assert len(set(keys)) == len(keys) or len(scene.objects) == 1, keys
        added.update(keys)
    assert max(added.values()) < 0.25 * added.total() and len(added) >= 10, added


WORDS = {"stays": "stay|still|not disappear", "hidden": "hidden|out of sight|(?<!not )disappear|not be seen",
         "alike": "but shape|shapes? is the same|colours differ|In colour they",
         "unlike": "share neither|neither in|in both|in nothing[.]"}


def test_conclusions_of_the_named_keys_come_evenly_and_hold():
    rng, teacher, said, asked = random.Random(0), RulesTeacher(), Counter(), 0
    for number in range(400):
        context = shapes(number, rng)
        answer = teacher.reasoning(TeacherScene(context), rng, keys=("open", "share_nothing", "covered", "share_shape"))
        if answer:
            assert all(holds for *_, holds in read(answer.answer, context, answer.question)), answer
            asked += 1
            said.update(what for what, pattern in WORDS.items() if re.search(pattern, answer.answer))
    assert said.total() == asked
    assert 0.8 < said["stays"] / said["hidden"] < 1.25 and min(said.values()) > 20, said
    one = Context("", "", (), (Box("red circle", 0.1, 0.1, 0.2, 0.2),))
    assert teacher.reasoning(TeacherScene(one), rng, keys=("share_shape",)) is None
    assert teacher.reasoning(TeacherScene(one), rng)


def test_a_crowd_is_not_counted():
    boxes = tuple(Box("person", x / 20, 0.4, x / 20 + 0.03, 0.5) for x in range(12))
    teacher = RulesTeacher()
    for crowd in (boxes, (*boxes[:2], Box("person", 0, 0, 1, 0.3, crowd=True))):
        for seed in range(40):
            context = Context(str(seed), "", ("A place.",), (*crowd, Box("dog", 0.7, 0.7, 0.9, 0.9)))
            for kind in KINDS:
                text = teacher.answer(kind, context)
                assert not re.search(rf"\b(?:{NUM}|both|person) (?:people|person)", text), text


def test_only_english_and_korean():
    with pytest.raises(UserError, match="writes en and ko, not 'fr'"):
        RulesTeacher("fr")
    with pytest.raises(KeyError):
        RulesTeacher().answer("poem", Context("1", "", ("A dog.",)))


def test_brackets_of_a_category_stay():
    context = Context("1", "", ("A picture",), (Box("dog [big]", 0.1, 0.1, 0.2, 0.2), Box("{n}", 0.7, 0.1, 0.9, 0.3)))
    text = " ".join(RulesTeacher(seed=seed).answer("detail_description", context) for seed in range(5))
    assert "dog [big]" in text and "{n}" in text and "dog big" not in text


def test_a_question_without_a_short_answer_is_refused():
    context = Context("", "", (), (Box("red circle", 0.1, 0.1, 0.3, 0.3), Box("blue square", 0.7, 0.1, 0.9, 0.3)))
    with pytest.raises(KeyError, match="first"):
        RulesTeacher().question("first", TeacherScene(context), random.Random(0))


def test_read_tells_grammar_from_truth():
    """Every sentence of the teacher is read as true. A false one is parsed; a broken one is not."""
    rng, teacher, sentences = random.Random(7), RulesTeacher(), 0
    for number in range(150):
        context = shapes(number, rng)
        for one in (teacher.description(TeacherScene(context), rng), teacher.reasoning(TeacherScene(context), rng)):
            found = read(one.answer, context, one.question * (one.kind == "reasoning")) if one else []
            assert all(parsed and holds for _, parsed, holds in found), (found, context)
            sentences += len(found)
    assert sentences > 800
    context = Context("", "", (), (Box("red circle", 0.1, 0.1, 0.3, 0.3), Box("blue square", 0.7, 0.1, 0.9, 0.3)))
    for text, parsed, holds in (
        ("There are two objects.", True, True), ("There are three objects.", True, False),
        ("The red circle is left of the blue square.", True, True),
        ("The red circle is right of the blue square.", True, False),
        ("The green ring is right of the green ring.", True, False), ("There two are objects objects.", False, False),
        ("The red circle has the colour red.", False, False),
    ):  # fmt: skip
        assert read(text, context) == [(text, parsed, holds)]
    third = Context("", "", (), (*context.boxes, Box("green ring", 0.4, 0.7, 0.6, 0.9)))
    for phrase in ("Furthest {} is the {}.", "Nothing is further {} than the {}.", "The object furthest {} is the {}.",
                   "Of all the objects, the one furthest {} is the {}.", "What is furthest {} is the {}.",
                   "No object is further {} than the {}."):  # fmt: skip
        for way, name in (("to the left", "red circle"), ("to the right", "blue square"), ("down", "green ring")):
            for said in ("red circle", "blue square", "green ring"):
                text = phrase.format(way, said)
                assert read(text, third) == [(text, True, said == name)]
    for text, holds in (
        ("Of the red circle and the green ring, the red circle is higher up and to the left.", True),
        ("Of the red circle and the green ring, the green ring is higher up and to the left.", False),
        ("Of the red circle and the blue square, the green ring lies to the left.", False),
        ("From the green ring, the blue square lies higher up and to the right.", True),
        ("From the green ring, the red circle lies higher up and to the right.", False),
        ("The colours are red, blue and green.", True), ("The colours are red and blue.", False),
    ):  # fmt: skip
        assert read(text, third) == [(text, True, holds)]
    for text in ("The colours are a red circle and a blue square.",
                 "The red circle is a blue square and a green ring."):  # fmt: skip
        assert read(text, third) == [(text, False, False)]
    for text in (
        "There is two objects.", "There are two object.", "There are one object.", "There are a red circle.",
        "A red circle are at the top-left.", "Red circles is at the top-left.", "A red circles is at the top-left.",
        "A orange ring is at the centre.", "An red circle is at the top-left.", "Both object are at the top.",
        "There is one objects.", "Both the red circle and the blue square is red.", "If one goes, two is left.",
    ):  # fmt: skip
        assert not agrees(text) and not read(text, context)[0][1], text
    assert agrees("One from three is two.") and agrees("So one of the four corners is free.")
    question = "If the red circle were taken away, how many objects would be left?"
    answer = "There are two objects, and the red circle is one of them. Without it, {} left."
    assert all(holds for *_, holds in read(answer.format("one object is"), context, question))
    assert not all(holds for *_, holds in read(answer.format("two objects are"), context, question))
    context = Context("", "", (), (*context.boxes, Box("red square", 0.1, 0.7, 0.3, 0.9)))
    for question, odd in (("Which object differs in colour from all the rest?", "blue square"),
                          ("Which shape is the odd one out?", "red circle")):  # fmt: skip
        for name in ("red circle", "blue square", "red square", "green ring"):
            end = f"So the {name} is the one that differs."
            assert read(end, context, question) == [(end, True, name == odd)]
