import json
import random
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI

from llava_jax import cli
from llava_jax.endpoint.server import Server
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.chat_model import ChatModel
from llava_jax.evaluate.scienceqa.ensemble import ScienceQAEnsemble, combine, disagreements, read_texts


def said(letter: str) -> str:
    return f"Because. The answer is {letter}."


def problem(answer: int, name: str = "", image: bool = False, split: str = "test") -> dict:
    return {"question": f"{name}: is it {answer}?", "choices": ["x", "y", "z"], "answer": answer, "hint": "",
            "lecture": "L", "solution": "S", "image": "image.png" if image else None, "subject": "natural science",
            "grade": "grade1", "split": split}


# problem -> its right letter, our letter, the language model's, the judge's; None is a text without a letter, "-" none
CASES = {
    "both": "BBB-", "ours": "AACA", "teacher": "CBCC", "judge": "ABCA", "none": "ABBA", "silent": ["A", "A", None, "-"],
    "silent, judged": ["A", "A", None, "C"], "judge says nothing": ["B", "B", "C", None], "no such choice": "AAEA",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    problems = {pid: problem("ABC".index(letters[0]), pid) for pid, letters in CASES.items()}
    train = {f"t{i}": problem(i, "train", image=i == 2, split="train") for i in range(3)}
    (tmp_path / "problems.json").write_text(json.dumps(problems | train))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems), "train": list(train)}))
    for name, place in (("ours.jsonl", 1), ("judge.jsonl", 3)):
        rows = [{"question_id": pid, "text": said(letters[place]) if letters[place] else "Who knows?"}
                for pid, letters in CASES.items() if letters[place] != "-"]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = {pid: said(letters[2]) if letters[2] else "I need the picture." for pid, letters in CASES.items()}
    (tmp_path / "teacher.json").write_text(json.dumps({"acc": 1, "outputs": outputs}))
    return tmp_path


def test_counts_by_hand(folder):
    ScienceQAEnsemble(str(folder / "ours.jsonl"), str(folder), str(folder / "out"), unread="wrong",
                      teacher=str(folder / "teacher.json"), judge=str(folder / "judge.jsonl")).run()
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["counts"] == {
        "ours": 6,  # both, ours, silent, silent judged, judge says nothing, no such choice
        "teacher": 2,  # both, teacher
        "complement": 4,  # these and the two silent ones
        "judge": 8,  # all but the silent one that was judged wrongly
        "upper": 7,  # all but judge and none
        "no_answer": 2, "drawn": 0, "total": 9}
    judged = json.loads((folder / "out" / "judge.json").read_text())
    assert list(judged) == ["acc", "correct", "count", "results", "outputs"] and judged["outputs"] == {}
    assert judged["correct"] == 8 and judged["acc"] == pytest.approx(800 / 9)
    assert judged["results"] == dict(zip(CASES, [1, 0, 2, 0, 0, 0, 2, 1, 0], strict=True))
    complement = json.loads((folder / "out" / "complement.json").read_text())
    assert complement["results"] == dict(zip(CASES, [1, 2, 2, 2, 1, 0, 0, 2, -1], strict=True))
    assert results["table"]["judge"]["Avg"] == results["table"]["judge"]["NAT"] == judged["acc"]


def test_draws_are_those_of_the_original(folder):
    """By question it draws for ours, the teacher's and the judge's, in this order, where there is no choice."""
    problems = {pid: problem(0) for pid in map(str, range(200))}
    rng = random.Random(7)
    texts = [{pid: rng.choice([said("A"), said("B"), said("Z"), "?"]) for pid in problems} for _ in range(3)]
    ensemble = combine(problems, *texts, seed=5)
    random.seed(5)
    expected = {name: 0 for name in ("ours", "teacher", "complement", "judge", "upper")}
    for pid in problems:
        letters = [text[pid][-2] if len(text[pid]) > 1 else None for text in texts]
        drawn = ["AB".index(x) if x in ("A", "B") else random.choice(range(3)) for x in letters]
        hits = [x == 0 for x in drawn]
        for name, hit in (("ours", hits[0]), ("teacher", hits[1]), ("complement", hits[1] if letters[1] else hits[0]),
                          ("judge", hits[2] if letters[2] else hits[0]), ("upper", hits[0] or hits[1])):
            expected[name] += hit
    assert expected.items() <= ensemble.counts.items()
    assert 100 < ensemble.counts["drawn"] < 600


def test_without_a_judge_a_lucky_draw_of_a_silent_teacher_is_not_in_the_upper_bound():
    problems = {str(i): problem(0) for i in range(50)}
    ours, teacher = {pid: said("B") for pid in problems}, {pid: "?" for pid in problems}
    assert combine(problems, ours, teacher).counts["upper"] == 0
    assert combine(problems, ours, teacher, {}).counts["upper"] > 0


def test_disagreements_are_different_letters(folder):
    problems = {pid: problem(0) for pid in CASES}
    ours, teacher = (read_texts(str(folder / name), problems, False) for name in ("ours.jsonl", "teacher.json"))
    assert disagreements(problems, ours, teacher) == [
        "ours", "teacher", "judge", "silent", "silent, judged", "judge says nothing", "no such choice"]


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[1:], "1 of 9 questions have no answer, the first is 'both'; --partial"),
    (lambda lines: lines + lines[:1], "answers 1 questions more than once"),
    (lambda lines: [*lines, '{"question_id": "other", "text": "A"}'], "an answer to 'other', which is no question"),
    (lambda lines: [*lines[:-1], lines[-1][:-5]], "line 9: not a line of JSON"),
    (lambda lines: [*lines, "[" * 10**5], "line 10: not a line of JSON"),
    (lambda lines: [*lines[:-1], '{"question_id": "both", "text": null}'], "line 9: not an answer"),
])
def test_files_of_answers_that_do_not_fit_are_named(folder, change, message):
    path = folder / "ours.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    command = ScienceQAEnsemble(str(path), str(folder), str(folder / "out"), teacher=str(folder / "teacher.json"))
    with pytest.raises(UserError, match=message):
        command.run()
    assert not (folder / "out").exists()


def test_partial_counts_what_both_have(folder, capsys):
    path = folder / "ours.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[2:]))
    args = [str(path), "--data", str(folder), "--out", str(folder / "out"), "--teacher", str(folder / "teacher.json")]
    assert cli.parse(ScienceQAEnsemble, [*args, "--partial"]).run() == 0
    assert json.loads((folder / "out" / "results.json").read_text())["counts"]["total"] == 7
    assert "3 answers name no choice in the words `The answer is X.`, and one was drawn (seed 0)" in (
        capsys.readouterr().out)  # the two silent ones, and one that is no such choice
    with pytest.raises(UserError, match="--teacher FILE"):
        ScienceQAEnsemble(str(path), str(folder), str(folder / "out")).run()


@pytest.fixture
def server():
    def answer(messages):
        question = messages[-1]["content"]
        if "[Second student]" in question:
            asked.append(("judge", question))
            return "I quote: The answer is B. But The answer is A." if len(asked) % 2 else said("A")
        asked.append(("solve", messages))
        return said("B") if "is it 1?" in question else "I would have to see the picture."

    asked: list = []
    fake = FakeOpenAI(answer=answer)
    with fake.serve() as url:
        yield fake, url, asked


def one_at_a_time(url: str) -> ChatModel:
    return ChatModel("teacher", url, server=Server(concurrency=1))


def test_a_language_model_is_asked_and_judges_and_is_never_paid_twice(folder, server):
    fake, url, asked = server
    command = ScienceQAEnsemble(str(folder / "ours.jsonl"), str(folder), str(folder / "out"), unread="wrong",
                                model=one_at_a_time(url))
    assert command.run() == 0
    solved = [messages for kind, messages in asked if kind == "solve"]
    judged = {question for kind, question in asked if kind == "judge"}
    system, question, answer, *_ = solved[0]
    assert "The answer is X" in system["content"] and len(solved[0]) == 6
    assert (question["content"], answer["content"]) in [
        (f"train: is it {i}?\nContext: N/A\nOptions: (A) x (B) y (C) z", f"L S The answer is {letter}.")
        for i, letter in enumerate("AB")]
    both = "[First student]\nBecause. The answer is A.\n\n[Second student]\nI would have"
    assert any(both in text for text in judged)

    teacher = [json.loads(line) for line in (folder / "out" / "teacher.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in teacher] == list(CASES)
    assert all((row["text"] == said("B")) == (CASES[row["question_id"]][0] == "B") for row in teacher)
    # A judgement that names two letters was asked for once more.
    judgements = [json.loads(line)["text"] for line in (folder / "out" / "judge.jsonl").read_text().splitlines()]
    assert judgements == [said("A")] * 7 and sum(kind == "judge" for kind, _ in asked) > 7
    counts = json.loads((folder / "out" / "results.json").read_text())["counts"]
    assert counts["total"] == len(solved) == 9 and counts["teacher"] == 2 and counts["no_answer"] == 7
    assert counts["complement"] == counts["upper"] == 6 and len(judged) == 7

    paid, before = fake.paid.total(), (folder / "out" / "results.json").read_text()
    assert command.run() == 0 and fake.paid.total() == paid and max(fake.paid.values()) <= 2
    again = json.loads((folder / "out" / "results.json").read_text())
    assert again["counts"] == json.loads(before)["counts"] and again["table"] == json.loads(before)["table"]
    # The files that it wrote are those that it reads.
    teacher, judge = (str(folder / "out" / f"{name}.jsonl") for name in ("teacher", "judge"))
    offline = ScienceQAEnsemble(str(folder / "ours.jsonl"), str(folder), str(folder / "offline"), unread="wrong",
                                teacher=teacher, judge=judge)
    assert offline.run() == 0 and fake.paid.total() == paid
    assert json.loads((folder / "offline" / "results.json").read_text())["counts"] == counts


def test_a_limit_of_requests_ends_with_3_and_the_same_command_goes_on(folder, server, capsys):
    fake, url, _ = server
    options = [str(folder / "ours.jsonl"), "--data", str(folder), "--out", str(folder / "out"), "--model", "teacher",
               "--base-url", url]
    assert cli.parse(ScienceQAEnsemble, [*options, "--max-requests", "4"]).run() == 3
    assert "--max-requests 4 are used up" in capsys.readouterr().err and not (folder / "out" / "results.json").exists()
    assert fake.paid.total() == 4
    assert cli.parse(ScienceQAEnsemble, options).run() == 0


def test_requests_without_an_answer_are_no_silent_score(folder, server, capsys):
    fake, url, _ = server
    fake.faults = lambda number: "context" if number == 5 else None
    command = ScienceQAEnsemble(str(folder / "ours.jsonl"), str(folder), str(folder / "out"), shots=0,
                                model=one_at_a_time(url))
    assert command.run() == 1
    assert "1 of 9 questions got no answer, the first is question silent: context_length" in capsys.readouterr().err
    assert not (folder / "out" / "results.json").exists()
    fake.faults = lambda number: None
    assert command.run() == 0
