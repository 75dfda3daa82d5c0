import json
import random

import pytest
from odd_texts import odd_texts

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer
from llava_jax.evaluate.tasks.seed import Seed

TYPES = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}


@pytest.fixture
def folder(tmp_path):
    """Ids are digits in SEED-Bench's file and numbers in LLaVA's; some are neither."""
    draw, rows, lines = random.Random(2), [], []
    for n in range(40):
        id = f"v{n}" if n % 13 == 5 else str(100 + n)
        kind = draw.choice(list(TYPES.values()))
        rows.append({"question_id": id, "question_type_id": kind, "data_type": "video" if kind == 10 else "image",
                     "answer": draw.choice("ABCD")})
        image = f"SEED-Bench-{'video-image' if kind == 10 else 'image'}/{n}.png"
        lines.append({"question_id": id if id[0] == "v" else int(id), "image": image, "text": "Q?", "category": kind})
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"question_type": TYPES, "questions": rows}))
    (tmp_path / "llava-seed-bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    return tmp_path, rows


def answers_to(questions, texts):
    return [Answer(question.id, text) for question, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("seed", range(10))
def test_only_the_letter_counts(folder, seed):
    path, rows = folder
    questions = Seed().load(str(path))
    texts = odd_texts(40, seed, ("A", "B", "C", "D", "A.", " B", "c"))
    scores = Seed().score(str(path), questions, answers_to(questions, texts))
    right = {str(question.id): text for question, text in zip(questions, texts, strict=True)}

    def percent(keep):
        chosen = [row for row in rows if keep(row)]
        return 100 * sum(right[row["question_id"]] == row["answer"] for row in chosen) / len(chosen)

    expected = {name: percent(lambda row, n=number: row["question_type_id"] == n) for name, number in TYPES.items()}
    expected["total"] = percent(lambda row: True)
    expected |= {kind: percent(lambda row, k=kind: row["data_type"] == k) for kind in ("image", "video")}
    assert scores.figures == pytest.approx(expected) and scores.main == "total"
    assert list(scores.figures) == [*TYPES, "total", "image", "video"]
    assert questions[0].images[0].startswith(str(path / "SEED-Bench-"))


def test_ids_that_are_digits_in_both_files_would_never_meet(folder):
    path, _ = folder
    file = path / "llava-seed-bench.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"question_id": str(row["question_id"])}) + "\n" for row in rows))
    with pytest.raises(UserError, match="has no question '139'"):
        Seed().load(str(path))


def test_missing_is_wrong_and_the_last_counts(folder, tmp_path):
    path, rows = folder
    questions = Seed().load(str(path))
    truth = {row["question_id"]: row["answer"] for row in rows}
    right = answers_to(questions, [truth[str(question.id)] for question in questions])
    assert Seed().score(str(path), questions, right).figures["total"] == 100
    part = Seed().score(str(path), questions, right[:10])
    assert part.figures["total"] == 25 and any("30 questions have no answer" in note for note in part.notes)
    assert Seed().write_submission(str(path), questions, right[:10], str(tmp_path)) == []
    changed = [*right, Answer(right[0].id, "no letter")]
    assert Seed().score(str(path), questions, changed).figures["total"] == 97.5
    [written] = Seed().write_submission(str(path), questions, changed, str(tmp_path))
    lines = [json.loads(line) for line in open(written)]
    assert [line["question_id"] for line in lines] == [row["question_id"] for row in rows]
    assert [line["prediction"] for line in lines] == [row["answer"] for row in rows[:-1]] + ["no letter"]


def test_letters_as_text_are_not_ids(folder):
    """An answer whose id is digits is of no question, as in the original."""
    path, rows = folder
    questions = Seed().load(str(path))
    answers = [Answer(row["question_id"], row["answer"]) for row in rows]
    right = sum(row["question_id"][0] == "v" for row in rows)
    assert Seed().score(str(path), questions, answers).figures["total"] == pytest.approx(100 * right / 40)


@pytest.mark.parametrize("content, message", [
    ({"questions": []}, "not SEED-Bench"), ([], "not SEED-Bench"),
    ({"question_type": TYPES, "questions": [{"question_id": 1}]}, "not SEED-Bench"),
    ({"question_type": TYPES, "questions": [{"question_id": "1", "question_type_id": 1, "data_type": "image",
                                            "answer": "A"}]}, "different versions"),
])
def test_another_version(folder, content, message):
    (folder[0] / "SEED-Bench.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        Seed().load(str(folder[0]))
