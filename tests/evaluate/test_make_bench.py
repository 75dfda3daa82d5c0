"""A task made of ten images by rules and by a fake teacher, then judged."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI
from synthesis_data import write_answer, write_images

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.command import JudgeAnswers
from llava_jax.evaluate.judge.make_bench import MakeBench
from llava_jax.evaluate.tasks.llava_bench import LlavaBenchCoco

FILES = ["answers_reference.jsonl", "context.jsonl", "questions.jsonl"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options_of(folder: Path, url: str = "", *more: str) -> list[str]:
    asked = ["--model", "teacher", "--base-url", url] if url else []
    images = folder / "images.jsonl"
    data = images if images.exists() else write_images(folder)
    return ["--data", str(data), "--out", str(folder / "out"), "--count", "4", *asked, *more]


def make(folder: Path, fake: FakeOpenAI | None = None, *more: str) -> int:
    if fake is None:
        return cli.parse(MakeBench, options_of(folder, "", *more)).run()
    with fake.serve() as url:
        return cli.parse(MakeBench, options_of(folder, url, *more)).run()


def kind_of(messages: list[dict]) -> str:
    """What is asked for: an answer, or one of the two kinds of questions."""
    if "\n\nQuestion:\n" in messages[-1]["content"]:
        return "answer"
    return "conversation" if "You write conversations" in messages[0]["content"] else "complex_reasoning"


def room_of(messages: list[dict]) -> tuple[str, str]:
    return re.search(r"Room (\d+) with a (\w+)", messages[-1]["content"]).groups()


def answer(messages: list[dict]) -> str:
    kind, (room, animal) = kind_of(messages), room_of(messages)
    if kind == "answer":
        return f"In room {room} there is a {animal} to the left of a chair."
    return write_answer(kind, room, animal)


def bench_of(folder: Path) -> dict[str, list[dict]]:
    return {name: read(folder / "out" / name) for name in FILES}


def test_by_rules_without_any_model(tmp_path, capsys):
    assert make(tmp_path) == 0
    made = bench_of(tmp_path)
    questions, references, contexts = (made[name] for name in ("questions.jsonl", "answers_reference.jsonl",
                                                               "context.jsonl"))
    assert [row["question_id"] for row in questions] == [row["question_id"] for row in references] == list(range(12))
    assert [row["category"] for row in questions] == [row["category"] for row in references] == (
        ["conv", "detail", "complex"] * 4)
    images = [row["image"] for row in contexts]
    assert [row["image"] for row in questions] == [image for image in images for _ in range(3)]
    assert images == sorted(images) and len(set(images)) == 4
    assert all(row["text"].strip() and row["model_id"] == "rules" for row in references)
    assert len({row["answer_id"] for row in references}) == 12
    known = {row["image"]: row for row in read(tmp_path / "images.jsonl")}
    for row in contexts:
        assert row["captions"] == known[row["image"]]["captions"]
        animal, chair = row["instances"]
        assert animal == {"category": known[row["image"]]["boxes"][0]["category"], "bbox": [0.05, 0.25, 0.35, 0.75]}
        assert chair == {"category": "chair", "bbox": [0.6, 0.25, 0.85, 0.875]}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["questions_by"], manifest["references_by"], manifest["images"]) == ("rules", "rules", 4)
    assert "12 questions about 4 images" in capsys.readouterr().out
    before = bench_of(tmp_path)
    assert make(tmp_path) == 0 and bench_of(tmp_path) == before
    assert make(tmp_path, None, "--seed", "1") == 0 and bench_of(tmp_path) != before


def test_the_made_bench_is_read_and_judged(tmp_path):
    assert make(tmp_path) == 0
    out = tmp_path / "out"
    questions = LlavaBenchCoco(image_root=str(tmp_path)).load(str(out))
    assert len(questions) == 12 and questions[0].images[0] == str(tmp_path / read(out / "context.jsonl")[0]["image"])
    lines = [{"question_id": question.id, "prompt": question.text, "text": "A chair.", "answer_id": f"a{question.id}"}
             for question in questions]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake = FakeOpenAI(answer=lambda messages: "8 4")
    with fake.serve() as url:
        assert JudgeAnswers("llava-bench-coco", str(tmp_path / "answers.jsonl"), str(out), str(tmp_path / "judged"),
                     cli.parse(MakeBench, options_of(tmp_path, url)).model).run() == 0
    assert json.loads((tmp_path / "judged/judge.json").read_text())["figures"] == dict.fromkeys(
        ("conv", "detail", "complex", "all"), 50)
    context = fake.bodies[0]["messages"][1]["content"]
    assert re.match(r"\[Context\]\nA \w+ stands to the left of a chair\.\nRoom \d+ .*\n\n\w+: \[0\.05, 0\.25, 0\.35, "
                    r"0\.75\]\nchair: \[0\.6, 0\.25, 0\.85, 0\.875\]\n\n\[Question\]\n", context)


def test_by_a_teacher(tmp_path):
    fake = FakeOpenAI(answer=answer)
    assert make(tmp_path, fake) == 0
    assert sum(fake.paid.values()) == len(fake.bodies) == 4 * 5  # two questions, three answers
    made = bench_of(tmp_path)
    by = {category: {row["text"] for row in made["questions.jsonl"] if row["category"] == category}
          for category in ("conv", "detail", "complex")}
    assert by["conv"] == {"Which animal is in the picture?"}
    assert by["complex"] == {"What might the animal do in the next minutes, and why?"}
    assert all(row["text"].startswith("In room") and row["model_id"] == "teacher"
               for row in made["answers_reference.jsonl"])
    asked = next(body["messages"] for body in fake.bodies if kind_of(body["messages"]) == "answer")
    content = asked[-1]["content"]
    assert re.fullmatch(r"A \w+ stands .*\nRoom .*\n\n\w+: \[.*\]\nchair: \[.*\]\n\nQuestion:\n.*", content)
    assert "Never say or hint" in asked[0]["content"]
    assert make(tmp_path, fake) == 0 and len(fake.bodies) == 20 and bench_of(tmp_path) == made


def test_questions_by_rules_and_answers_by_a_teacher(tmp_path):
    assert make(tmp_path) == 0
    by_rules = bench_of(tmp_path)
    fake = FakeOpenAI(answer=answer)
    assert make(tmp_path, fake, "--questions", "rules") == 0
    assert {kind_of(body["messages"]) for body in fake.bodies} == {"answer"} and len(fake.bodies) == 12
    made = bench_of(tmp_path)
    assert made["questions.jsonl"] == by_rules["questions.jsonl"]
    assert {row["model_id"] for row in made["answers_reference.jsonl"]} == {"teacher"}


def test_images_of_which_something_cannot_be_had_give_way_to_others(tmp_path, capsys):
    """Of one image the teacher refuses to ask, of another its answers contradict the boxes, of a third one answer tells
    of captions."""
    first = FakeOpenAI(answer=answer)
    assert make(tmp_path, first) == 0
    used = [row["id"] for row in read(tmp_path / "out/context.jsonl")]
    (tmp_path / "out").rename(tmp_path / "before")

    def trouble(messages):
        room, animal = room_of(messages)
        number = f"{int(room):06d}"
        if number == used[0] and kind_of(messages) == "conversation":
            return "I'm sorry, but I can't help with that."
        if number == used[1] and kind_of(messages) == "answer":
            return "There are three elephants in the picture." if animal != "elephant" else "There are nine zebras."
        if number == used[2] and messages[-1]["content"].endswith("Which animal is in the picture?"):
            return f"The caption says that there is a {animal}."
        return answer(messages)

    fake = FakeOpenAI(answer=trouble)
    assert make(tmp_path, fake) == 0
    now = [row["id"] for row in read(tmp_path / "out/context.jsonl")]
    assert len(now) == 4 and set(used[:3]).isdisjoint(now) and used[3] in now
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["passed_over"] == 3
    # Three answers, or one question or answer, three attempts at each.
    assert manifest["rejects"] == {"contradiction": 9, "mentions_source": 3, "refusal": 3}
    assert "3 images were passed over" in capsys.readouterr().out
    made, paid = bench_of(tmp_path), len(fake.bodies)
    assert make(tmp_path, fake) == 0 and len(fake.bodies) == paid and bench_of(tmp_path) == made
    with pytest.raises(UserError, match="--count 10: only [67] of 10 images give all three .*refusal"):
        make(tmp_path, fake, "--count", "10")
    assert bench_of(tmp_path) == made


def test_replies_that_cannot_be_taken_are_asked_for_again(tmp_path):
    fake = FakeOpenAI(answer=answer, faults=lambda number: {1: "length", 2: "empty", 15: "filter"}.get(number))
    assert make(tmp_path, fake) == 0 and len(fake.bodies) == 23
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rejects"] == {"truncated": 1, "empty": 1, "refusal": 1} and manifest["passed_over"] == 0


def test_limits_and_kills_leave_no_bench_and_the_same_command_goes_on(tmp_path, capsys):
    fake = FakeOpenAI(answer=answer)
    assert make(tmp_path, fake, "--max-requests", "10") == 3
    assert not (tmp_path / "out/questions.jsonl").exists() and len(fake.bodies) == 10
    assert "--max-requests 10 are used up" in capsys.readouterr().err
    program = ("from llava_jax import cli; from llava_jax.evaluate.judge.make_bench import MakeBench; "
               "cli.run(lambda args: cli.parse(MakeBench, args).run())")
    fake.faults, fake.slow = (lambda number: "slow"), 0.3
    with fake.serve() as url:
        command = [sys.executable, "-c", program, *options_of(tmp_path, url, "--concurrency", "2")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        log = tmp_path / "out/asked.jsonl"
        while process.poll() is None and log.read_bytes().count(b"\n") < 12:
            time.sleep(0.01)  # until it is in the middle
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -9 and not (tmp_path / "out/questions.jsonl").exists()
    fake.faults = lambda number: None
    assert make(tmp_path, fake) == 0 and sum(fake.paid.values()) <= 22
    assert len(read(tmp_path / "out/questions.jsonl")) == 12


def test_a_server_that_does_not_answer_makes_no_smaller_bench(tmp_path, capsys):
    fake = FakeOpenAI(answer=answer, faults=lambda number: "500" if number == 3 else None)
    assert make(tmp_path, fake, "--retries", "0") == 1
    told = capsys.readouterr().err
    assert "requests got no answer, the first is no_answer" in told and "asks them again" in told
    assert not (tmp_path / "out/questions.jsonl").exists()
    assert make(tmp_path, fake) == 0 and set(fake.paid.values()) == {1}


def test_a_server_that_answers_nothing_at_all(tmp_path):
    fake = FakeOpenAI(answer=answer, faults=lambda number: "500")
    with pytest.raises(UserError, match="none of .* requests was answered, the first for no_answer"):
        make(tmp_path, fake, "--retries", "0", "--count", "1")


def test_mistakes(tmp_path):
    for more, message in ((["--count", "11"], "there are only 10 images"), (["--count", "0"], "must be at least 1")):
        with pytest.raises(UserError, match=message):
            make(tmp_path, None, *more)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/questions.jsonl").write_text("mine")
    with pytest.raises(UserError, match="that make-bench has not made"):
        make(tmp_path)
