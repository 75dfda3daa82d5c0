import json

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks import evalai
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.textvqa import TextVqa, parse_question

SUFFIX = "Answer the question using a single word or phrase."


@pytest.mark.parametrize("prompt, question", [
    (f"What Brand?\nReference OCR token: A, B\n{SUFFIX}", "what brand?"),
    (f"Reference OCR token: A, B\nWhat Brand?\n{SUFFIX}", "what brand?"),
    (f"What brand?\n{SUFFIX}", "what brand?"),
    ("OCR tokens: a, b. Question: What\nBrand? Short answer:", "what\nbrand?"),
    ("OCR tokens: Question: x. Question: y Short answer: z Short answer:", "x. question: y"),
    (f"Reference OCR token: A\n{SUFFIX}", "reference ocr token: a"),  # two lines: the first, whatever it is
])
def test_parse_question(prompt, question):
    assert parse_question(prompt) == question


@pytest.mark.parametrize("prompt", ["", "one line", "1\n2\n3", "a\nReference OCR token: x\nb\nc", "OCR tokens: x",
                                    "a\nReference OCR token:\nb"])
def test_prompts_of_no_form(prompt):
    with pytest.raises(UserError, match="none of the known forms"):
        parse_question(prompt)


@pytest.fixture
def folder(tmp_path):
    """Two questions of each of five images, in three forms."""
    pool = odd_texts(400, 9, ("yes", "no", "Coca-Cola", "coca cola", "2", "two", "dont"))
    rows, questions = [], []
    for n in range(10):
        image, text = f"image{n // 2}", f"What is {n}?"
        references = [pool[(7 * n + k * (n % 3)) % 400] for k in range(10)]
        rows.append({"image_id": image, "question": text, "answers": references})
        read = "Reference OCR token: a"
        lines = ([text, read, SUFFIX], [read, text, SUFFIX], [text, SUFFIX])[n % 3]
        questions.append({"question_id": image, "image": f"{image}.jpg", "text": "\n".join(lines)})
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return tmp_path, rows


def leave_one_out(said, references):
    """The original's score, with lists in place of counts."""
    accuracies = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        accuracies.append(min(1, len([other for other in others if other == said]) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("seed", range(10))
def test_accuracy(folder, seed):
    path, rows = folder
    questions = TextVqa().load(str(path))
    texts = odd_texts(10, seed, tuple(rows[seed]["answers"]))
    answers = [Answer(question.id, text, question.text) for question, text in zip(questions, texts, strict=True)]
    scores = TextVqa().score(str(path), questions, answers[::-1])  # found by image and question, in any order
    expected = [leave_one_out(evalai.process(text), [evalai.process(a) for a in row["answers"]])
                for text, row in zip(texts, rows, strict=True)]
    assert [item.score for item in scores.items] == expected[::-1]
    assert scores.figures["accuracy"] == pytest.approx(10 * sum(expected))
    part = TextVqa().score(str(path), questions, answers[:3])
    assert part.figures["accuracy"] == pytest.approx(100 * sum(expected[:3]) / 3)


def test_a_question_that_does_not_fit_is_named_with_its_file(folder):
    path, _ = folder
    file = path / "llava_textvqa_val_v051_ocr.jsonl"
    questions = TextVqa().load(str(path))
    with pytest.raises(UserError, match=f"{path}: the answer to question 'image0': TextVQA: a prompt of none"):
        TextVqa().score(str(path), questions, [Answer("image0", "yes", "one line")])
    file.write_text(file.read_text().replace('"question_id": "image3"', '"question_id": "other"'))
    with pytest.raises(UserError, match=f"{file}, question 'other': TextVQA: TextVQA_0.5.1_val.json has no question"):
        TextVqa().load(str(path))


def test_all_right(folder):
    path, rows = folder
    questions = TextVqa().load(str(path))
    for row in rows:
        row["answers"] = ["The  Answer.", *["answer"] * 3, *["x"] * 6]
    (path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    answers = [Answer(question.id, "ANSWER", question.text) for question in questions]
    assert TextVqa().score(str(path), questions, answers).figures["accuracy"] == pytest.approx(100)


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows.pop(), "different versions"),
    (lambda rows: rows[0]["answers"].pop(), "needs 10 human answers; the counts here are 9, 10"),
    (lambda rows: rows[3].pop("answers"), "not TextVQA's annotations"),
])
def test_annotations_of_another_version(folder, change, message):
    path, rows = folder
    change(rows)
    (path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    with pytest.raises(UserError, match=message):
        TextVqa().load(str(path))


def test_missing_annotations(folder):
    (folder[0] / "TextVQA_0.5.1_val.json").unlink()
    with pytest.raises(UserError, match="TextVQA_0.5.1_val.json"):
        TextVqa().load(str(folder[0]))
