"""The probes: right by the boxes, balanced by closed form, in two languages, and scored as counted by hand."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.errors import UserError
from llava_jax.evaluate.probes.make_probes import FILE, KINDS, ProbesData, write_probes
from llava_jax.evaluate.probes.multilingual import Multilingual
from llava_jax.evaluate.probes.spatial import Spatial
from llava_jax.evaluate.probes.wording import parse_answer
from llava_jax.evaluate.tasks.base import Answer

SHARED = ("left/right", "above/below", "inside", "counting")  # kinds of which a set is one text of several pictures


def shapes(count: int, seed: int = 0) -> dict[str, tuple[scenes.Object, ...]]:
    rng = random.Random(seed)
    return {f"{number}.jpg": scenes.sample(rng) for number in range(count)}


def context(image: str, objects: tuple[scenes.Object, ...]) -> Context:
    boxes = [Box(f"{thing.colour} {thing.shape}", *((c + s) / scenes.SIZE for s in (-thing.radius, thing.radius)
                                                   for c in (thing.x, thing.y))) for thing in objects]
    return Context(image, image, ("",), tuple(boxes))


def photos() -> list[Context]:
    """Cats and dogs: side by side either way, one within the other's box or apart, one to three, a heap, a crowd."""
    cat, dog = ("cat", 0.05, 0.4, 0.25, 0.6), ("dog", 0.65, 0.4, 0.95, 0.6)
    flipped = [(name, 1 - x2, y1, 1 - x1, y2) for name, x1, y1, x2, y2 in (cat, dog)]
    within = [("cat", 0.3, 0.3, 0.5, 0.5), ("dog", 0.2, 0.2, 0.8, 0.8)]
    many = [("cat", 0.1 * n, 0.1 * n, 0.1 * n + 0.2, 0.1 * n + 0.2) for n in range(3)]
    tiny = [("tie", 0.1, 0.1, 0.12, 0.12), ("dog", 0.6, 0.1, 0.9, 0.3)]
    odd = [("gizmo", 0.05, 0.4, 0.25, 0.6), ("dog", 0.65, 0.4, 0.95, 0.6)]
    even = [(name, 1 - x2, y1, 1 - x1, y2) for name, x1, y1, x2, y2 in odd]
    tiny_even = [(name, 1 - x2, y1, 1 - x1, y2) for name, x1, y1, x2, y2 in tiny]
    heap = [("cat", 0.0, 0.2, 0.5, 0.8), ("dog", 0.2, 0.2, 0.7, 0.8), ("cow", 0.4, 0.2, 0.9, 0.8)]
    pictures = [(cat, dog), flipped, within, many[:1], many[:2], many, tiny, tiny_even, odd, even, heap] * 3
    contexts = [Context(str(n), f"{n}.jpg", ("a photo",), tuple(Box(*box) for box in boxes))
                for n, boxes in enumerate(pictures)]
    crowd = Box("dog", 0.1, 0.1, 0.9, 0.9, crowd=True)
    return [*contexts, Context("crowd", "crowd.jpg", ("a photo",), (crowd, Box("dog", 0.1, 0.1, 0.3, 0.3)))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures by name, the folder of their probes, and its lines."""
    folder, pictures = tmp_path_factory.mktemp("probes"), shapes(1500)
    write_probes((context(*picture) for picture in pictures.items()), str(folder), each=400)
    return pictures, folder, [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def photographed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_probes(photos(), str(folder), each=400)
    return folder, [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def true_answer(text: str, objects: tuple[scenes.Object, ...]) -> str:
    """From the objects themselves, by centres."""
    named = {f"{thing.colour} {thing.shape}": thing for thing in objects}
    if found := re.fullmatch("On which side of the (.*) is the (.*)?", text.rstrip("?")):
        b, a = (named[name] for name in found.groups())
        if abs(a.x - b.x) > abs(a.y - b.y):
            return "left" if a.x < b.x else "right"
        return "above" if a.y < b.y else "below"
    if found := re.fullmatch("Is the (.*) between the (.*) and the (.*)", text.rstrip("?")):
        c, a, b = (named[name] for name in found.groups())
        lengths = {pair: ((pair[0].x - pair[1].x) ** 2 + (pair[0].y - pair[1].y) ** 2) for pair in
                   ((a, b), (a, c), (b, c))}
        return "yes" if max(lengths, key=lengths.get) == (a, b) else "no"
    if found := re.fullmatch("Are the (.*), the (.*) and the (.*) in this order from left to right", text.rstrip("?")):
        a, b, c = (named[name] for name in found.groups())
        return "yes" if a.x < b.x < c.x else "no"
    if found := re.fullmatch("Is there an? (.*)", text.rstrip("?")):
        return "yes" if found[1] in named else "no"
    name = re.fullmatch("How many (.*) are there", text.rstrip("?"))[1].removesuffix("s").removesuffix("e")
    words = [word for word in name.split(" ") if word not in ("object", "objects")]
    fit = [o for o in objects if all(word in (o.colour, o.shape, o.shape.removesuffix("e")) for word in words)]
    return scenes.NUMBERS[len(fit)]


def test_every_answer_is_true_of_its_picture(made):
    pictures, _, lines = made
    assert {line["category"] for line in lines} == set(KINDS) - {"inside"}
    for line in lines:
        assert line["answer"] == true_answer(line["text"], pictures[line["image"]]), line


@pytest.mark.parametrize("source", ["made", "photographed"])
def test_a_set_has_every_possible_answer_once(source, request):
    *_, lines = request.getfixturevalue(source)
    sets = defaultdict(list)
    for line in lines:
        sets[line["set"]].append(line)
    for rows in sets.values():
        assert sorted(row["answer"] for row in rows) == sorted(rows[0]["choices"])
        pictures, texts = {row["image"] for row in rows}, {row["text"] for row in rows}
        if rows[0]["category"] in SHARED:
            assert len(texts) == 1 and len(pictures) == len(rows)
        else:
            assert len(texts) == len(rows) and len(pictures) == 1


@pytest.mark.parametrize("source", ["made", "photographed"])
@pytest.mark.parametrize("language", ["en", "ko"])
def test_who_knows_the_text_alone_does_no_better_than_guessing(source, language, request):
    *_, lines = request.getfixturevalue(source)
    rows = [{**(line if language == "en" else line["ko"]), "category": line["category"]}
            for line in lines if language == "en" or "ko" in line]
    for kind in {row["category"] for row in rows}:
        own = [row for row in rows if row["category"] == kind]
        guessing = sum(1 / len(row["choices"]) for row in own)
        constant = max(Counter(row["answer"] for row in own).values())
        assert constant == pytest.approx(guessing) if kind != "counting" else constant <= len(own) / 2
        by_text = defaultdict(Counter)
        for row in own:
            by_text[row["text"], tuple(row["choices"])][row["answer"]] += 1
        if kind not in ("between", "order"):  # their three names hardly ever meet again
            assert sum(max(answers.values()) for answers in by_text.values()) == pytest.approx(guessing)


def test_words_of_a_binding_are_all_in_the_picture(made):
    pictures, _, lines = made
    bound = [line for line in lines if line["category"] == "binding"]
    for line in bound:
        colour, shape = line["text"].removeprefix("Is there a").removeprefix("n").rstrip("?").split()
        objects = pictures[line["image"]]
        assert colour in {thing.colour for thing in objects} and shape in {thing.shape for thing in objects}
    assert len(bound) == 400


def test_photographs(photographed):
    _, lines = photographed
    kinds = Counter(line["category"] for line in lines)
    assert kinds["inside"] and kinds["left/right"] and kinds["counting"]
    assert not kinds["binding"] and not kinds["between"]  # names of one word; a heap that overlaps
    texts = {line["text"]: line for line in lines}
    inside = texts["Is the cat within the area that the dog takes up in the picture?"]
    assert inside["ko"] == {"text": "그림에서 고양이는 개가 차지하는 영역 안에 있나요?", "choices": ["네", "아니요"],
                            "answer": {"yes": "네", "no": "아니요"}[inside["answer"]]}
    assert texts["How many cats are there?"]["ko"]["text"] == "고양이가 몇 마리 있나요?"
    assert texts["On which side of the dog is the cat?"]["ko"]["text"] == "고양이는 개의 어느 쪽에 있나요?"
    assert "ko" not in texts["On which side of the dog is the gizmo?"]
    assert not any("tie" in text for text in texts)  # too small to be asked about
    assert all(line["image"] != "crowd.jpg" for line in lines)
    for line in lines:
        if line["text"].startswith("Is the cat within"):
            assert (int(line["image"].split(".")[0]) % 11 == 2) == (line["answer"] == "yes")


def test_korean_of_the_shapes(made):
    *_, lines = made
    rows = {line["text"]: line["ko"] for line in lines}
    assert rows["How many objects are there?"]["text"] == "도형이 몇 개 있나요?"
    assert rows["How many circles are there?"]["text"] == "원이 몇 개 있나요?"
    assert rows["How many red objects are there?"]["text"] == "빨간 도형이 몇 개 있나요?"
    patterns = {
        "left/right": "(.*)[은는] (.*)의 어느 쪽에 있나요[?]", "between": "(.*)[은는] (.*)[과와] (.*) 사이에 있나요[?]",
        "binding": "(.*)[이가] 있나요[?]", "counting": "(.*)[이가] 몇 개 있나요[?]",
    }  # fmt: skip
    for line in lines:
        if line["category"] in patterns:
            match = re.fullmatch(patterns[line["category"]], line["ko"]["text"])
            assert match, line["ko"]["text"]
            particle = line["ko"]["text"][match.end(1)]
            closed = (ord(match[1][-1]) - ord("가")) % 28 != 0  # the last syllable ends with a consonant
            assert (particle in "은이") == closed
            assert "/" not in line["ko"]["text"]


def test_no_more_than_asked_for_and_the_same_every_time(tmp_path):
    pictures = shapes(300, seed=3)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_probes as t; "
            "t.write_probes([t.context(*p) for p in t.shapes(300, seed=3).items()], sys.argv[2], each=31, seed=5)")
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "1")], check=True,
                   env=os.environ | {"PYTHONHASHSEED": "1"})
    counts = write_probes([context(*picture) for picture in pictures.items()], str(tmp_path / "here"), each=31, seed=5)
    assert len({(tmp_path / folder / FILE).read_bytes() for folder in ("1", "here")}) == 1
    assert counts["binding"] == 28 and max(counts.values()) <= 31
    write_probes([context(*picture) for picture in pictures.items()], str(tmp_path / "other"), each=31, seed=6)
    assert (tmp_path / "other" / FILE).read_bytes() != (tmp_path / "here" / FILE).read_bytes()


def test_made_from_coco_files(tmp_path, capsys):
    scenes.write(tmp_path, train=0, test=0, probe=200)
    names = {kind: str(tmp_path / "annotations" / f"{kind}_probe.json") for kind in ("captions", "instances")}
    assert ProbesData(str(tmp_path), **names, prefix="probe/", each=20).run() == 0
    assert "binding 20 questions in" in capsys.readouterr().out
    assert all(os.path.exists(question.images[0]) for question in Spatial().load(str(tmp_path)))
    with pytest.raises(UserError, match="boxes"):
        ProbesData(str(tmp_path), captions=names["captions"]).run()
    with pytest.raises(UserError, match="allow no question"):
        write_probes([photos()[0]], str(tmp_path / "none"), each=10)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("language", "text", "choices", "read"), [
    ("en", "Left.", "left right", "left"), ("en", "It is on the right-hand side", "left right", "right"),
    ("en", "It's bright", "left right", ""), ("en", "It is left, not right of it", "left right", "left"),
    ("en", "top-left", "left right", "left"), ("en", "underneath it", "above below", "below"),
    ("en", "YES!", "yes no", "yes"), ("en", "Nobody yesterday", "yes no", ""),
    ("en", "There is no dog.", "yes no", "no"), ("en", "2", "one two", "two"), ("en", "12", "one two", "more"),
    ("en", "There are three dogs, one left", "one two", "three"),
    ("en", "five", "one two three four", "more"), ("en", "0", "one two", "none"), ("en", "", "one two", ""),
    ("ko", "왼쪽에 있습니다.", "왼쪽 오른쪽", "왼쪽"), ("ko", "고양이는 개의 오른편에 있어요", "왼쪽 오른쪽", "오른쪽"),
    ("ko", "위치는 아래쪽입니다", "위쪽 아래쪽", "아래쪽"), ("ko", "개 위에 있습니다", "위쪽 아래쪽", "위쪽"),
    ("ko", "네, 있습니다.", "네 아니요", "네"), ("ko", "아니요, 없습니다.", "네 아니요", "아니요"),
    ("ko", "아니오", "네 아니요", "아니요"), ("ko", "예", "네 아니요", "네"), ("ko", "예전에", "네 아니요", ""),
    ("ko", "빨간 원은 없습니다", "네 아니요", "아니요"), ("ko", "사이에 있지 않습니다", "네 아니요", "아니요"),
    ("ko", "두 마리 있습니다", "1 2 3 4", "2"), ("ko", "2개", "1 2", "2"), ("ko", "네 개입니다", "1 2 3 4", "4"),
    ("ko", "네, 세 개입니다", "1 2 3 4", "3"), ("ko", "하나", "1 2", "1"), ("ko", "12마리", "1 2", "more"),
    ("ko", "다섯 개", "1 2", "more"), ("ko", "left", "왼쪽 오른쪽", ""),
])  # fmt: skip
def test_what_an_answer_says(language, text, choices, read):
    assert parse_answer(language, text, choices.split(" ")) == read


def test_scores_by_hand(tmp_path):
    rows = [("left/right", "s1", "left"), ("left/right", "s1", "right"), ("left/right", "s2", "left"),
            ("left/right", "s2", "right"), ("binding", "b1", "yes"), ("binding", "b1", "no")]
    korean = {"left": "왼쪽", "right": "오른쪽", "yes": "네", "no": "아니요"}
    lines = []
    for number, (kind, name, answer) in enumerate(rows):
        choices = ["left", "right"] if kind == "left/right" else ["yes", "no"]
        ko = {"text": f"질문 {number}?", "answer": korean[answer], "choices": [korean[choice] for choice in choices]}
        lines.append({"question_id": number, "image": "a.jpg", "text": f"Q{number}?", "answer": answer,
                      "choices": choices, "category": kind, "set": name, "ko": ko})
    path = tmp_path / FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = str(tmp_path)

    questions = Spatial().load(data)
    assert questions[0].text == "Q0?\nAnswer with one of these words: left, right."
    assert questions[0].choices == ("left", "right") and questions[0].images == (os.path.join(data, "a.jpg"),)
    texts = ["left", "The right one.", "left", "hm", "yes"]  # the last question has no answer
    scores = Spatial().score(data, questions, [Answer(n, text) for n, text in enumerate(texts)])
    assert scores.figures == {"all": 62.5, "guessing": 50.0, "left/right": 75.0, "left/right, sets": 50.0,
                              "binding": 50.0, "binding, sets": 0.0}
    assert scores.main == "all" and [item.score for item in scores.items] == [1, 1, 1, 0, 1]
    assert scores.notes[0].startswith("1 of 5 answers")

    both = Multilingual(name_choices=False).load(data)
    assert [question.id for question in both[:2]] == ["0-en", "0-ko"] and both[1].text == "질문 0?"
    said = ["left", "왼쪽", "right", "left", "left", "왼쪽", "right", "오른쪽", "yes", "아니요", "no", "아니요"]
    answers = [Answer(question.id, text) for question, text in zip(both, said, strict=True)]
    scores = Multilingual().score(data, both, answers)
    assert scores.figures == {"guessing": 50.0, "en": 100.0, "ko": 62.5, "both": pytest.approx(400 / 6),
                              "en left/right": 100.0, "en left/right, sets": 100.0, "en binding": 100.0,
                              "en binding, sets": 100.0, "ko left/right": 75.0, "ko left/right, sets": 50.0,
                              "ko binding": 50.0, "ko binding, sets": 0.0}
    assert any(note.startswith("1 of 6 answers to Korean questions have English words") for note in scores.notes)

    first = Multilingual().score(data, both[:1], answers[:1])  # what is known when a run has begun
    assert first.figures == {"guessing": 50.0, "en": 100.0, "en left/right": 100.0, "en left/right, sets": 100.0}

    with pytest.raises(UserError, match="no question '9'"):
        Spatial().score(data, questions, [Answer("9", "left")])
    path.write_text(json.dumps({key: value for key, value in lines[0].items() if key != "ko"}))
    with pytest.raises(UserError, match="en, ko"):
        Multilingual().load(data)
    path.write_text(json.dumps({key: value for key, value in lines[0].items() if key != "set"}))
    with pytest.raises(UserError, match="question 0 is no probe, which has .*set"):
        Spatial().load(data)
    path.write_text(json.dumps(lines[0] | {"choices": ["left", "starboard"]}))
    with pytest.raises(UserError, match="starboard"):
        Spatial().load(data)
