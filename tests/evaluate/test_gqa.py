import json
import random

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.gqa import Gqa, count_steps, parse_answer

STRUCTURES = ("verify", "query", "choose", "logical", "compare")
MEANINGS = ("attr", "cat", "global", "obj", "rel")
ANSWERS = ("yes", "no", "red", "left", "a man")


def step(operation, argument):
    return {"operation": operation, "dependencies": [], "argument": argument}


@pytest.fixture
def folder(tmp_path):
    draw, rows = random.Random(1), {}
    for n in range(60):
        rows[f"20{n:04}"] = {
            "question": " ".join(["Is", *["it"] * draw.randrange(1, 4), "red?"]), "answer": draw.choice(ANSWERS),
            "isBalanced": n % 10 != 9, "imageId": f"n{n}",
            "types": {"structural": draw.choice(STRUCTURES), "semantic": draw.choice(MEANINGS),
                      "detailed": "existAttrCommon" if n % 7 == 0 else "existAttr"},
            "groups": {"global": draw.choice((None, "colour", "place"))},
            "semantic": [step("select", "dog (1)"), step("exist", "?"), step("query", "name"),
                         step("choose name", "a|b")]
            + [step("filter color", "red")] * draw.randrange(3)}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/testdev_balanced_questions.json").write_text(json.dumps(rows))
    lines = [{"question_id": id, "image": f"{row['imageId']}.jpg", "text": row["question"]} for id, row in rows.items()
             if row["isBalanced"]]
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path, rows


def answers_to(questions, texts):
    return [Answer(question.id, text, question.text) for question, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("text, expected", [
    ("Yes.", "yes"), ("YES...", "yes"), ("yes. ", "yes. "), (" red", " red"), ("A.B.", "a.b"), ("", ""), ("...", ""),
])
def test_parse_answer(text, expected):
    assert parse_answer(text) == expected


def test_steps():
    row = {"semantic": [step("select", "dog"), step("exist", "?"), step("query", "name"), step("choose name", "a|b"),
                        step("query", "color"), step("relate", "to the left of,existing,o")]}
    assert count_steps(row) == 2  # the last one's argument has "exist" in it


@pytest.mark.parametrize("seed", range(8))
def test_figures(folder, seed):
    path, rows = folder
    questions = Gqa().load(str(path))
    texts = odd_texts(len(questions), seed, ("Yes", "yes.", "No", "red", "Red.", "left", "a man"))
    scores = Gqa().score(str(path), questions, answers_to(questions, texts))
    said = {question.id: text.rstrip(".").lower() for question, text in zip(questions, texts, strict=True)}
    balanced = [(id, row) for id, row in rows.items() if row["isBalanced"]]

    def percent(keep):
        rights = [said[id] == row["answer"] for id, row in balanced if keep(row)]
        return 100 * rights.count(True) / len(rights)

    expected = {"accuracy": percent(lambda row: True)}
    expected["binary"] = percent(lambda row: row["types"]["structural"] != "query")
    expected["open"] = percent(lambda row: row["types"]["structural"] == "query")
    weighted = []
    for group in ("colour", "place"):
        mine = [(row["answer"], said[id]) for id, row in balanced if row["groups"]["global"] == group]
        gold, predicted = [a for a, _ in mine], [b for _, b in mine]
        weighted += [(len(mine), sum((gold.count(a) - predicted.count(a)) ** 2 / gold.count(a) for a in set(gold)))]
    expected["distribution"] = sum(n * x for n, x in weighted) / sum(n for n, _ in weighted) / 100
    for kind, values in (("structural", STRUCTURES), ("semantic", MEANINGS)):
        for value in values:
            expected[f"{kind} type: {value}"] = percent(lambda row, k=kind, v=value: row["types"][k] == v)
    for n in (1, 2, 3):
        expected[f"steps: {n}"] = percent(lambda row, n=n: len(row["semantic"]) == n + 3)
    for n in (3, 4, 5):
        expected[f"words: {n}"] = percent(lambda row, n=n: len(row["question"].split(" ")) == n)
    assert scores.figures == pytest.approx(expected) and scores.main == "accuracy"
    assert len(scores.items) == len(questions) == 54


def test_validity_and_plausibility(folder):
    path, rows = folder
    choices = {id: {"valid": ["yes", "no"], "plausible": ["yes"]} for id in rows}
    (path / "data/testdev_balanced_choices.json").write_text(json.dumps(choices))
    questions = Gqa().load(str(path))
    texts = ["yes", "no", "color"] * 18
    scores = Gqa().score(str(path), questions, answers_to(questions, texts))
    common = [rows[question.id]["types"]["detailed"] == "existAttrCommon" for question in questions]
    valid = [(text == "color") if c else text in ("yes", "no") for c, text in zip(common, texts, strict=True)]
    plausible = [(text == "color") if c else text == "yes" for c, text in zip(common, texts, strict=True)]
    assert scores.figures["validity"] == pytest.approx(100 * sum(valid) / 54)
    assert scores.figures["plausibility"] == pytest.approx(100 * sum(plausible) / 54)


def test_part_and_doubles(folder, tmp_path):
    path, rows = folder
    questions = Gqa().load(str(path))
    right = answers_to(questions, [rows[question.id]["answer"].upper() + "." for question in questions])
    scores = Gqa().score(str(path), questions, right[:27])
    assert scores.figures["accuracy"] == 50 and any("27 of GQA's questions" in note for note in scores.notes)
    wrong = Answer(right[0].id, "wrong")
    assert Gqa().score(str(path), questions, [wrong, *right]).figures["accuracy"] == 100  # the last one counts
    assert Gqa().score(str(path), questions, right).figures["distribution"] == 0
    [written] = Gqa().write_submission(str(path), questions, right, str(tmp_path))
    assert json.load(open(written))[0] == {"questionId": "200000", "prediction": rows["200000"]["answer"]}
    assert written.endswith("testdev_balanced_predictions.json")


def test_without_the_questions_of_gqa(folder):
    path, _ = folder
    (path / "data/testdev_balanced_questions.json").unlink()
    questions = Gqa().load(str(path))
    scores = Gqa().score(str(path), questions, answers_to(questions, ["x"] * 54))
    assert scores.figures == {} and any("no score without testdev_balanced_questions" in note for note in scores.notes)


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows.pop("200000"), "no question '200000'"),
    (lambda rows: rows["200000"].pop("types"), "not GQA's questions"),
    (lambda rows: rows.clear(), "not GQA's questions"),
])
def test_questions_of_another_version(folder, change, message):
    path, rows = folder
    change(rows)
    (path / "data/testdev_balanced_questions.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        Gqa().load(str(path))
