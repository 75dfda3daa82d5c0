import json
import random
from collections import Counter

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks import pope_data
from llava_jax.evaluate.tasks.base import Answer, get_task
from llava_jax.evaluate.tasks.pope import Pope, parse_yes_no
from llava_jax.evaluate.tasks.pope_data import PopeData

SUFFIX = "\nAnswer the question using a single word or phrase."


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """The categories in one file as published: one after the other; ten questions each."""
    draw, questions = random.Random(0), []
    (tmp_path / "coco").mkdir()
    for number, category in enumerate(("adversarial", "popular", "random")):
        labels = [{"question_id": n, "image": f"{n // 6}.jpg", "text": f"Is there a {n}?",
                   "label": draw.choice(("yes", "no"))} for n in range(10)]
        write_lines(tmp_path / "coco" / f"coco_pope_{category}.json", labels)
        questions += [{"question_id": 1000 * number + row["question_id"], "image": row["image"],
                       "text": row["text"] + SUFFIX, "category": category} for row in labels]
    write_lines(tmp_path / "llava_pope_test.jsonl", questions)
    return tmp_path


def answers_to(questions, texts):
    return [Answer(question.id, text, question.text) for question, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("text, expected", [
    ("No, there is no dog.", "no"), ("Not visible", "yes"), ("not", "no"), ("no", "no"), ("NO", "yes"), ("no!", "yes"),
    ("It is.no", "yes"), ("yes. no", "yes"), ("n,o", "no"), ("No,", "no"), ("", "yes"), ("\nno", "yes"),
    ("a  no", "no"), ("no\tdog", "yes"), (".no", "yes"), ("nothing", "yes"), ("I do not know", "no"),
])
def test_says(text, expected):
    assert parse_yes_no(text) == expected


def brute(texts, labels):
    """TP, FP, TN, FN by a walk over characters."""
    counts = Counter()
    for text, label in zip(texts, labels, strict=False):
        words, word = [], ""
        for character in text:
            if character == ".":
                break
            if character == " ":
                words, word = [*words, word], ""
            elif character != ",":
                word += character
        said = "no" if any(w in ("No", "no", "not") for w in [*words, word]) else "yes"
        counts[("T" if said == label else "F") + ("P" if said == "yes" else "N")] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_those_of_the_counts(folder, seed):
    questions = Pope().load(str(folder))
    texts = odd_texts(30, seed, ("Yes", "No", "yes", "no", "No, not.", "Yes, there is."))
    scores = Pope().score(str(folder), questions, answers_to(questions, texts))
    f1 = []
    for start, category in enumerate(("adversarial", "popular", "random")):
        labels = [json.loads(line)["label"] for line in (folder / f"coco/coco_pope_{category}.json").open()]
        n = brute(texts[10 * start : 10 * start + 10], labels)
        figure = {name.removeprefix(f"{category} "): value for name, value in scores.figures.items()}
        assert [figure[name] for name in ("TP", "FP", "TN", "FN")] == [n["TP"], n["FP"], n["TN"], n["FN"]]
        assert figure["accuracy"] == pytest.approx(10 * (n["TP"] + n["TN"]))
        assert figure["yes ratio"] == pytest.approx(10 * (n["TP"] + n["FP"]))
        if n["TP"]:
            assert figure["precision"] == pytest.approx(100 * n["TP"] / (n["TP"] + n["FP"]))
            assert figure["recall"] == pytest.approx(100 * n["TP"] / (n["TP"] + n["FN"]))
        f1.append(200 * n["TP"] / max(1, 2 * n["TP"] + n["FP"] + n["FN"]))
        assert scores.figures[f"{category} F1"] == pytest.approx(f1[-1])
    assert scores.main == "F1" and scores.figures["F1"] == pytest.approx(sum(f1) / 3)
    assert [item.id for item in scores.items] == [question.id for question in questions]


def test_answers_meet_labels_by_their_order(folder):
    """As in the original, and with a note that says so."""
    questions = Pope().load(str(folder))
    answers = answers_to(questions, ["no" if n % 3 else "yes" for n in range(30)])
    in_order = Pope().score(str(folder), questions, answers)
    turned = Pope().score(str(folder), questions, answers[::-1])
    labels = [json.loads(line)["label"] for line in (folder / "coco/coco_pope_random.json").open()]
    assert turned.figures["random TP"] == brute([a.text for a in answers[20:][::-1]], labels)["TP"]
    assert any("order" in note for note in turned.notes) and not any("order" in note for note in in_order.notes)
    first = Pope().score(str(folder), questions, answers[:4])  # a run that was stopped
    assert first.figures["adversarial TP"] + first.figures["adversarial FN"] == sum(
        json.loads(line)["label"] == "yes" for line in list((folder / "coco/coco_pope_adversarial.json").open())[:4])
    assert any("popular: no answers" in note for note in first.notes)


def test_answers_to_other_questions(folder):
    questions = Pope().load(str(folder))
    with pytest.raises(UserError, match="no question 'x'"):
        Pope().score(str(folder), questions, [Answer("x", "yes")])


def test_no_yes_at_all_is_told(folder):
    questions = Pope().load(str(folder))
    scores = Pope().score(str(folder), questions, answers_to(questions, ["no"] * 30))
    assert scores.figures["F1"] == 0 and sum("divide by" in note for note in scores.notes) == 3


def test_reads_what_the_original_reads(folder):
    questions = get_task("pope")().load(str(folder))
    assert len(questions) == 30 and questions[0].images == (str(folder / "val2014" / "0.jpg"),)
    assert questions[0].text == "Is there a 0?" + SUFFIX and questions[0].choices == ("Yes", "No")
    assert Pope().load(str(folder / "llava_pope_test.jsonl")) == questions
    assert Pope(image_root="/pictures").load(str(folder))[0].images == ("/pictures/0.jpg",)


def drop_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "coco/coco_pope_random.json").unlink(), "coco_pope_random.json: no such file"),
    (lambda f: drop_line(f / "coco/coco_pope_popular.json"), "9 labels and .* 10 popular.*e3e39262.*2,910 random"),
    (lambda f: (f / "llava_pope_test.jsonl").unlink(), "llava_pope_test.jsonl"),
    (lambda f: (f / "llava_pope_test.jsonl").write_text('{"question_id": 1, "image": "x.jpg"}\n'), "line 1.*'text'"),
    (lambda f: (f / "llava_pope_test.jsonl").write_text('{"question_id": 1,\n'), "line 1: broken JSON"),
    (lambda f: (f / "llava_pope_test.jsonl").write_text("\n"), "no questions"),
    (lambda f: (f / "coco/coco_pope_random.json").write_text(
        (f / "coco/coco_pope_random.json").read_text().replace("1.jpg", "7.jpg")), "about 7.jpg.*commit e3e39262"),
    (lambda f: (f / "coco/coco_pope_random.json").write_text(
        (f / "coco/coco_pope_random.json").read_text().replace('"label"', '"answer"')), "neither yes nor no"),
])
def test_folder_of_another_version(folder, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Pope().load(str(folder))


KINDS = ["person", "chair", "apple", "car", "dog", "cup", "oven", "kite", "umbrella", "bear"]


@pytest.fixture
def instances(tmp_path):
    """COCO's form; common kinds come more often, and some pictures have too few."""
    draw, annotations = random.Random(3), []
    for image in range(40):
        for _ in range(draw.randrange(8)):
            annotations.append({"image_id": image, "category_id": min(draw.randrange(10), draw.randrange(10))})
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps({
        "images": [{"id": n, "file_name": f"{n:04}.jpg"} for n in range(40)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(KINDS)], "annotations": annotations}))
    return path, annotations


def test_builds_questions_from_instances(tmp_path, instances):
    path, annotations = instances
    PopeData(str(path), str(tmp_path / "out"), count=12, seed=5).run()
    there = {f"{n:04}.jpg": {KINDS[a["category_id"]] for a in annotations if a["image_id"] == n} for n in range(40)}
    questions = Pope().load(str(tmp_path / "out"))
    assert len(questions) == 12 * 6 * 3 == len({question.id for question in questions})
    labels = {c: [json.loads(line) for line in (tmp_path / f"out/coco/coco_pope_{c}.json").open()]
              for c in ("random", "popular", "adversarial")}
    asked = {}
    for category, rows in labels.items():
        for row in rows:
            thing = row["text"].removeprefix("Is there an " if row["text"][9:11] == "an" else "Is there a ")
            thing = thing.removesuffix(" in the image?")
            assert (row["label"] == "yes") == (thing in there[row["image"]])
            assert (row["text"][9:12] == "an ") == (thing[0] in "aeiou")
            asked.setdefault((category, row["image"]), []).append((thing, row["label"]))
    images = {image for _, image in asked}
    assert len(images) == 12
    for image in images:
        for category in labels:
            things = asked[category, image]
            assert len(set(things)) == 6 and [label for _, label in things] == ["yes", "no"] * 3
        assert len({tuple(t for t, label in asked[c, image] if label == "yes") for c in labels}) == 1
    number = Counter(thing for image in images for thing in there[image])
    for image in images:
        absent = [thing for thing, label in asked["popular", image] if label == "no"]
        others = set(number) - there[image] - set(absent)
        assert min(number[thing] for thing in absent) >= max((number[thing] for thing in others), default=0)
        before = set()
        for (thing, _), (other, _) in zip(*[iter(asked["adversarial", image])] * 2, strict=True):
            near = Counter(x for i in images if thing in there[i] for x in there[i] - {thing})
            candidates = {x: near[x] for x in number if x not in there[image] | before}
            assert candidates[other] == max(candidates.values())
            before.add(other)


def test_building_again_gives_the_same(tmp_path, instances):
    things = pope_data.read_objects(str(instances[0]))
    assert pope_data.make_questions(things, 10, 1) == pope_data.make_questions(things, 10, 1)
    assert pope_data.make_questions(things, 10, 1) != pope_data.make_questions(things, 10, 2)
    lines = tmp_path / "things.jsonl"
    write_lines(lines, [{"image": image, "objects": kinds} for image, kinds in things.items()])
    assert pope_data.read_objects(str(lines)) == things


def test_too_few_pictures_or_things(instances, tmp_path):
    with pytest.raises(UserError, match="3 kinds of things or more; 1,000 are wanted"):
        PopeData(str(instances[0]), str(tmp_path / "out"), count=1000).run()
    with pytest.raises(UserError, match="fewer than 3 are not in it"):
        pope_data.make_questions({"a.jpg": ["cup", "dog", "car"]}, 1, 0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not COCO's instances"):
        pope_data.read_objects(str(tmp_path / "x.json"))
