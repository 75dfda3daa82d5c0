import json
from collections import defaultdict

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks import evalai
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.vqa import VizWiz, VqaV2

SUFFIX = "\nAnswer the question using a single word or phrase."


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    questions = [{"question_id": 100 + n, "image": f"{n}.jpg", "text": f"What is {n}?{SUFFIX}"} for n in range(12)]
    write_lines(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", questions)
    write_lines(tmp_path / "llava_test.jsonl", questions)
    return tmp_path


def answers_to(questions, texts):
    return [Answer(question.id, text, question.text) for question, text in zip(questions, texts, strict=True)]


def test_vqav2_upload_has_all_of_test(folder, tmp_path):
    task = VqaV2()
    questions = task.load(str(folder))
    answers = answers_to(questions, ["Two.", "a cat", "None", "", *["x"] * 8])
    assert any("all of test2015" in note for note in task.score(str(folder), questions, answers).notes)
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": n} for n in (99, 100, 101, 102, 103, 7)])
    scores = task.score(str(folder), questions, answers)
    assert scores.figures == {} and len(scores.items) == 12
    assert not any("all of test2015" in note for note in scores.notes)
    [path] = task.write_submission(str(folder), questions, [answers[1], *answers[:3], answers[3]], str(tmp_path))
    assert json.load(open(path)) == [{"question_id": id, "answer": text} for id, text in (
        (99, ""), (100, "2"), (101, "cat"), (102, "0"), (103, ""), (7, ""))]


def test_vizwiz_upload(folder, tmp_path):
    task = VizWiz()
    questions = task.load(str(folder))
    answers = answers_to(questions, ["Unanswerable", "The U.S.", *["x"] * 10])
    [path] = task.write_submission(str(folder), questions, answers[::-1], str(tmp_path))
    rows = json.load(open(path))
    assert rows[:2] == [{"image": "0.jpg", "answer": "unanswerable"}, {"image": "1.jpg", "answer": "us"}]
    assert len(rows) == 12
    assert task.write_submission(str(folder), questions, answers[1:], str(tmp_path)) == []
    assert any("1 questions have no answer" in note for note in task.score(str(folder), questions, answers[1:]).notes)


@pytest.mark.parametrize("seed", range(6))
def test_scores_with_annotations(folder, seed):
    """Leave-one-out by hand. VQAv2's tool normalises the punctuation of human answers that differ; VizWiz's none."""
    usual = ("yes", "no", "stop-sign", "stop sign", "2", "two", "1,000", "a cat")
    human = [odd_texts(10, 50 * seed + n, usual[: 1 + n % 8]) for n in range(12)]
    human[5] = ["stop-sign"] * 10  # the same from all: compared as it is
    rows = [{"question_id": 100 + n, "image": f"{n}.jpg", "answer_type": "other" if n % 2 else "number",
             "question_type": f"what {n % 3}",
             "answers": [{"answer": text, "answer_id": k} for k, text in enumerate(human[n])]} for n in range(12)]
    (folder / "vqa.json").write_text(json.dumps({"annotations": rows}))
    (folder / "vizwiz.json").write_text(json.dumps(rows))
    texts = [human[n][seed] if n % 2 else text for n, text in enumerate(odd_texts(12, seed, usual))]
    texts[5] = "stop-sign"
    for task, plain in ((VqaV2(annotations=str(folder / "vqa.json")), False),
                         (VizWiz(annotations=str(folder / "vizwiz.json")), True)):
        questions = task.load(str(folder))
        scores = task.score(str(folder), questions, answers_to(questions, texts))
        groups = defaultdict(list)
        for row, text, references in zip(rows, texts, human, strict=True):
            said = evalai.challenge_form(evalai.process(text))
            if not plain and any(reference != references[0] for reference in references):
                references = [evalai.punctuation(reference) for reference in references]
            total = 0
            for left_out in range(10):
                total += min(1, sum(said == r for k, r in enumerate(references) if k != left_out) / 3)
            for group in ("accuracy", f"answer type: {row['answer_type']}", f"question type: {row['question_type']}"):
                groups[group].append(total / 10)
        assert scores.figures == pytest.approx({name: 100 * sum(g) / len(g) for name, g in groups.items()})
        assert list(scores.figures)[0] == scores.main == "accuracy"
        assert scores.items[5].score == 0  # "stop sign" is not "stop-sign"
        part = task.score(str(folder), questions, answers_to(questions, texts)[:-1])
        whole = task.score(str(folder), questions, answers_to(questions, [*texts[:-1], ""]))
        assert part.figures == whole.figures and len(part.items) == 11  # a missing answer is an empty one


@pytest.mark.parametrize("content, message", [
    ({}, "not annotations of VQAv2"), ({"annotations": [{"question_id": 100, "answers": []}]}, "not annotations"),
    ({"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]}, "no annotation of 100"),
])
def test_annotations_of_another_split(folder, content, message):
    (folder / "vqa.json").write_text(json.dumps(content))
    task = VqaV2(annotations=str(folder / "vqa.json"))
    questions = task.load(str(folder))
    with pytest.raises(UserError, match=message):
        task.score(str(folder), questions, [])
