import json
from pathlib import Path

import pytest

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, get_task
from llava_jax.evaluate.tasks.llava_bench import LlavaBenchCoco, LlavaBenchWild

CATEGORIES = ("conv", "detail", "complex")


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions_of() -> list[dict]:
    return [{"question_id": n, "image": f"{n // 3:03d}.jpg", "category": CATEGORIES[n % 3], "text": f"Q{n}?\nWell?"}
            for n in range(6)]


@pytest.fixture
def wild(tmp_path) -> Path:
    folder = tmp_path / "wild"
    write(folder / "questions.jsonl", questions_of())
    write(folder / "answers_gpt4.jsonl",
          [{"question_id": n, "text": f"R{n}", "answer_id": f"ref{n}"} for n in range(6)])
    write(folder / "context.jsonl", [{"id": 0, "image": "000.jpg", "caption": ["One.", "Two."]},
                                     {"id": 1, "image": "001.jpg", "caption": "Whole."}])
    return folder


@pytest.fixture
def coco(tmp_path) -> Path:
    """As LLaVA's repository has it."""
    folder = tmp_path / "playground/data/coco2014_val_qa_eval"
    write(folder / "qa90_questions.jsonl", questions_of())
    write(folder / "qa90_gpt4_answer.jsonl",
          [{"question_id": n, "text": f"R{n}", "category": CATEGORIES[n % 3]} for n in range(6)])
    write(tmp_path / "llava/eval/table/caps_boxes_coco2014_val_80.jsonl", [
        {"id": n, "image": f"{n:03d}.jpg", "captions": ["A", "B"],
         "instances": [{"category": "dog", "bbox": [0.63, 0.1, 1.0, 0.532]}, {"category": "cup", "bbox": [0, 1, 2, 3]}]}
        for n in range(2)])
    return folder


def answers_of() -> list[Answer]:
    return [Answer(n, f"A{n}", f"Q{n}?\nWell?", {"question_id": n, "text": f"A{n}", "answer_id": f"a{n}"})
            for n in range(6)]


def review(n: int, pair: list, prefix: str = "llava_bench_", **more) -> dict:
    return {"id": n + 1, "question_id": n, "answer1_id": f"ref{n}", "answer2_id": f"a{n}",
            "category": prefix + CATEGORIES[n % 3], "content": "", "tuple": pair} | more


def test_the_sets_are_registered():
    assert get_task("llava-bench-wild") is LlavaBenchWild and get_task("llava-bench-coco") is LlavaBenchCoco
    assert LlavaBenchWild.max_new_tokens == LlavaBenchCoco.max_new_tokens == 1024
    assert (LlavaBenchCoco.num_published, LlavaBenchWild.num_published) == (90, 60)


def test_wild(wild):
    task = LlavaBenchWild()
    questions = task.load(str(wild))
    assert [question.id for question in questions] == list(range(6)) and questions[4].text == "Q4?\nWell?"
    assert questions[4].images == (str(wild / "images" / "001.jpg"),)
    cases = task.cases(task.paths(str(wild)))
    assert [case.category for case in cases[:3]] == [f"llava_bench_{name}" for name in CATEGORIES]
    assert (cases[0].context, cases[3].context) == ("One.\nTwo.", "Whole.")
    assert cases[5].reference["text"] == "R5"
    other = write(wild / "bard.jsonl", [{"question_id": n, "text": f"B{n}"} for n in range(6)])
    paths = task.paths(str(wild / "questions.jsonl"), reference=other)
    assert task.cases(paths)[1].reference["text"] == "B1"


def test_coco(coco):
    task = LlavaBenchCoco()
    case = task.cases(task.paths(str(coco)))[1]
    assert case.category == "detail"
    assert case.context == "A\nB\n\ndog: [0.63, 0.1, 1.0, 0.532]\ncup: [0, 1, 2, 3]"
    (coco / "val2014").mkdir()
    (coco / "val2014" / "COCO_val2014_000.jpg").touch()
    images = [question.images[0] for question in task.load(str(coco))]
    assert {Path(image).name for image in images} == {"COCO_val2014_000.jpg", "001.jpg"}


def change(path: Path, n: int, **fields) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[n] = {key: value for key, value in (rows[n] | fields).items() if value is not None}
    write(path, rows)


@pytest.mark.parametrize("name, n, fields, message", [
    ("questions", 1, {"category": "coding"}, "question 1 has as category 'coding'.*conv, detail, complex"),
    ("questions", 1, {"category": None}, "question 1 has as category None"),
    ("questions", 1, {"question_id": 0}, "question 0 is there twice"),
    ("questions", 1, {"question_id": 9}, "answers_gpt4.jsonl: no answer to question 9"),
    ("questions", 1, {"image": "x.jpg"}, "context.jsonl: nothing about x.jpg, the image of question 1"),
    ("answers_gpt4", 1, {"text": None}, "line 2: not an answer"),
    ("answers_gpt4", 1, {"question_id": 0}, "line 2: question 0 is there twice"),
    ("answers_gpt4", 1, {"category": "conv"}, "question 1 is 'conv', and 'detail' in .*different versions"),
    ("context", 1, {"caption": None}, "line 2: not the context of an image of LLaVA-Bench .In-the-Wild., which needs"),
    ("context", 1, {"caption": 3}, "line 2: not the context"),
])
def test_files_that_do_not_belong_together_are_named(wild, name, n, fields, message):
    change(wild / f"{name}.jsonl", n, **fields)
    task = LlavaBenchWild()
    with pytest.raises(UserError, match=message):
        task.cases(task.paths(str(wild)))


def test_files_that_are_not_there(wild, coco):
    with pytest.raises(UserError, match="qa90_questions"):
        LlavaBenchCoco().load(str(coco.parent))
    (coco / "qa90_gpt4_answer.jsonl").unlink()
    with pytest.raises(UserError, match="qa90_gpt4_answer"):
        LlavaBenchCoco().paths(str(coco))
    with pytest.raises(UserError, match="nowhere.json"):
        LlavaBenchWild().paths(str(wild), context="nowhere.json")
    with pytest.raises(UserError, match="line 1: not the context.*captions, and instances"):
        task = LlavaBenchCoco()  # the context of the other set
        task.cases(task.paths(str(wild), reference=str(wild / "answers_gpt4.jsonl")))


def test_without_reviews_there_is_no_score_but_the_command(wild):
    task = LlavaBenchWild()
    scores = task.score(str(wild), task.load(str(wild)), answers_of())
    assert scores.figures == {} and scores.main == ""
    assert "6 questions; the published file has 60" in scores.notes
    assert any("evaluate judge llava-bench-wild --answers" in note for note in scores.notes)
    assert [(item.reference, item.score, item.category) for item in scores.items[:2]] == [
        ("R0", None, "conv"), ("R1", None, "detail")]


def test_scores_from_reviews(wild):
    pairs = [[8, 4], [5, 5], [10, 9], [6, 6], [-1, -1], [10, 1]]
    path = write(wild / "reviews.jsonl", [review(n, pair) for n, pair in enumerate(pairs)])
    task = LlavaBenchWild(reviews=path)
    questions = task.load(str(wild))
    scores = task.score(str(wild), questions, answers_of())
    assert list(scores.figures) == ["conv", "detail", "complex", "all"] and scores.main == "all"
    expected = {"conv": 1000 / 14, "detail": 100, "complex": 50, "all": 2500 / 39}
    assert scores.figures == pytest.approx(expected)
    assert [item.score for item in scores.items] == [0.4, 0.5, 0.9, 0.6, None, 0.1]
    assert any("1 of 6 judgements failed, and are left out" in note for note in scores.notes)
    scores = LlavaBenchWild(reviews=path, compat=True).score(str(wild), questions, answers_of())
    assert scores.figures == {"conv": 71.4, "detail": 100.0, "complex": 50.0, "all": 63.2}  # 4.0 / 6.333
    write(wild / "reviews.jsonl", [review(0, [8, 4])])
    scores = task.score(str(wild), questions, answers_of())
    assert scores.figures == {"conv": 50, "all": 50} and "5 of 6 answers have no review" in scores.notes[-1]


def test_the_figures_of_several_files_of_reviews_are_their_means(wild):
    paths = [write(wild / f"reviews_{run}.jsonl", [review(n, [10, (n + run) % 7 + 1]) for n in range(6)])
             for run in range(3)]
    questions = LlavaBenchWild().load(str(wild))
    single = [LlavaBenchWild(reviews=path).score(str(wild), questions, answers_of()) for path in paths]
    scores = LlavaBenchWild(reviews=tuple(paths)).score(str(wild), questions, answers_of())
    for name, value in scores.figures.items():
        assert value == pytest.approx(sum(one.figures[name] for one in single) / 3)
    for n, item in enumerate(scores.items):
        assert item.score == pytest.approx(sum(one.items[n].score for one in single) / 3)
    assert any("the mean of 3 files of reviews, whose all is " in note for note in scores.notes)
    write(wild / "reviews_1.jsonl", [review(0, [8, 0])])
    assert LlavaBenchWild(reviews=paths[1]).score(str(wild), questions, answers_of()).figures == {"conv": 0, "all": 0}


@pytest.mark.parametrize("row, message", [
    (review(0, [8, 7], question_id=9), "question 9 has no answer here"),
    (review(1, [8, 7]), "question 1 is reviewed twice"),
    (review(0, [8, 7], answer2_id="other"), "of question 0 is of answer 'other', and the answer here is 'a0'"),
    (review(0, [8, 7], prefix=""), "in category 'conv', and of LLaVA-Bench .In-the-Wild. it would be in 'llava_bench"),
])
def test_reviews_of_something_else_are_named(wild, row, message):
    path = write(wild / "reviews.jsonl", [review(1, [8, 8]), row])
    task = LlavaBenchWild(reviews=path)
    with pytest.raises(UserError, match=message):
        task.score(str(wild), task.load(str(wild)), answers_of())
