"""The judge's command against a fake of OpenAI's API: what it asks, what it makes of the replies, and what it costs."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI, share_of_faults

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.evaluate.judge.command import JudgeAnswers
from llava_jax.evaluate.judge.reviews import SummarizeReviews
from llava_jax.evaluate.judge.rules import PUBLISHED_SYSTEM, JudgeRules

CATEGORIES = ("conv", "detail", "complex")
COUNT = 12
FIELDS = ["id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple"]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def task(tmp_path) -> Path:
    """In-the-Wild with 12 questions on two images; the candidate's answers are in reverse order."""
    write(tmp_path / "questions.jsonl", [{"question_id": n, "image": f"{n % 2}.jpg", "category": CATEGORIES[n % 3],
                                          "text": f"Q{n}?"} for n in range(COUNT)])
    write(tmp_path / "answers_gpt4.jsonl", [{"question_id": n, "text": f"R{n}."} for n in range(COUNT)])
    write(tmp_path / "context.jsonl", [{"id": n, "image": f"{n}.jpg", "caption": [f"It is {n}.", "So."]}
                                       for n in range(2)])
    write(tmp_path / "answers.jsonl", [{"question_id": n, "prompt": f"Q{n}?", "text": f"A{n}.", "answer_id": f"a{n}",
                                        "model_id": "m"} for n in reversed(range(COUNT))])
    return tmp_path


def options_of(task: Path, url: str, *more: str) -> list[str]:
    return ["llava-bench-wild", "--answers", str(task / "answers.jsonl"), "--data", str(task), "--out",
            str(task / "out"), "--model", "teacher", "--base-url", url, *more]


def judge(task: Path, fake: FakeOpenAI, *more: str) -> int:
    with fake.serve() as url:
        return cli.parse(JudgeAnswers, options_of(task, url, *more)).run()


def number_of(messages: list[dict]) -> int:
    return int(messages[-1]["content"].split("[Question]\nQ")[1].split("?")[0])


def pair_of(n: int) -> tuple[int, int]:
    """Scores of the reference and the candidate."""
    return 10 - n % 2, 2 + n % 7


def say(messages: list[dict], swapped: int = 0) -> str:
    """A judge's reply; `swapped` is added to a candidate that comes first."""
    n, content = number_of(messages), messages[-1]["content"]
    reference, candidate = pair_of(n)
    first = f"[Assistant 1]\nR{n}." in content
    return f"{reference} {candidate}\nFor." if first else f"{candidate + swapped} {reference}\nFor."


def expected_of(pairs: dict[int, tuple]) -> dict[str, float]:
    groups = {"all": list(pairs.values())}
    for n, pair in pairs.items():
        groups.setdefault(CATEGORIES[n % 3], []).append(pair)
    return {name: 100 * sum(c for _, c in group) / sum(r for r, _ in group) for name, group in groups.items()}


PAIRS = {n: pair_of(n) for n in range(COUNT)}


def test_what_is_asked_and_what_comes_of_it(task, capsys):
    fake = FakeOpenAI(answer=say)
    assert judge(task, fake) == 0
    body = next(body for body in fake.bodies if number_of(body["messages"]) == 4)
    rule = JudgeRules.load().rules["llava_bench_detail"]
    assert rule.role == "Assistant" and "the two scores and nothing else" in rule.prompt
    assert body["messages"] == [
        {"role": "system", "content": JudgeRules.load().system},
        {"role": "user", "content": "[Context]\nIt is 0.\nSo.\n\n[Question]\nQ4?\n\n[Assistant 1]\nR4.\n\n[End of "
                                    "Assistant 1]\n\n[Assistant 2]\nA4.\n\n[End of Assistant 2]\n\n[System]\n"
                                    f"{rule.prompt}\n\n"}]
    assert body["max_completion_tokens"] == 2048 and "temperature" not in body
    reviews = read(task / "out/reviews/reviews_1.jsonl")
    assert [list(review) for review in reviews] == [FIELDS] * COUNT
    assert reviews[4] == {"id": 5, "question_id": 4, "answer1_id": 4, "answer2_id": "a4",
                          "category": "llava_bench_detail", "content": "10 6\nFor.", "tuple": [10.0, 6.0]}
    found = json.loads((task / "out/judge.json").read_text())
    assert found["figures"] == pytest.approx(expected_of(PAIRS))
    assert found["judgements"] == 12 and found["failed"] == 0 and found["deviations"] == {}
    assert found["judge"] | {"base_url": "", "replied": []} == {
        "model": "teacher", "base_url": "", "parameters": {"max_completion_tokens": 2048},
        "prompts": JudgeRules.load().hash, "replied_as": {"teacher-2026-06-01": 12}, "fingerprints": ["fp_fake"],
        "replied": []}
    assert set(found["files"]) == {"questions", "references", "context", "answers"} and found["date"]
    printed = capsys.readouterr()
    assert f"{expected_of(PAIRS)['all']:.1f}" in printed.out and "note: 12 questions; the published file has 60" in (
        printed.err)


def test_a_rule_file_of_the_users(task):
    rules = {f"llava_bench_{name}": {"role": "Expert", "prompt": f"Rate {name}."} for name in CATEGORIES}
    (task / "rule.json").write_text(json.dumps({"coding": {"role": "A", "prompt": "B"}, **rules}))
    fake = FakeOpenAI(answer=lambda messages: "8 7")
    assert judge(task, fake, "--rules", str(task / "rule.json"), "--temperature", "0.2",
                 "--max-new-tokens", "1024") == 0
    system, user = fake.bodies[0]["messages"]
    assert system["content"] == PUBLISHED_SYSTEM and "[Expert 1]\nR" in user["content"]
    assert user["content"].endswith(".\n\n[End of Expert 2]\n\n[System]\nRate "
                                    f"{CATEGORIES[number_of([user]) % 3]}.\n\n")
    assert fake.bodies[0]["temperature"] == 0.2 and fake.bodies[0]["max_completion_tokens"] == 1024
    found = json.loads((task / "out/judge.json").read_text())
    assert found["judge"]["prompts"] != JudgeRules.load().hash and "rules" in found["files"]


def test_the_same_command_pays_for_nothing_and_another_run_for_itself(task):
    fake = FakeOpenAI(answer=say)
    assert judge(task, fake) == 0
    first = (task / "out/reviews/reviews_1.jsonl").read_bytes()
    assert judge(task, fake) == 0 and len(fake.bodies) == COUNT
    assert judge(task, fake, "--runs", "2", "--swap") == 0 and len(fake.bodies) == 4 * COUNT
    assert (task / "out/reviews/reviews_1.jsonl").read_bytes() == first
    assert len(list((task / "out/reviews").iterdir())) == 4
    assert judge(task, fake) == 0 and len(fake.bodies) == 4 * COUNT
    assert [path.name for path in (task / "out/reviews").iterdir()] == ["reviews_1.jsonl"]  # of this command alone


def test_failed_judgements_are_asked_again_then_left_out_and_counted(task, capsys):
    """0: refuses twice, then judges; 1: 11/10; 2: rambles; 3: nothing; 4: out of range."""
    replies = {0: ["I'm sorry, but I can't do that.", "As an AI language model, no.", "9 5"], 1: ["11/10"],
               2: ["Well, the first one is good, and the second one, I would say, is 7."], 3: [""], 4: ["11 9"]}
    asked = Counter()

    def answer(messages):
        n = number_of(messages)
        asked[n] += 1
        return replies[n][min(asked[n], len(replies[n])) - 1] if n in replies else say(messages)

    fake = FakeOpenAI(answer=answer)
    assert judge(task, fake) == 4
    assert asked == {**dict.fromkeys(range(5), 3), **dict.fromkeys(range(5, COUNT), 1)}
    failed = read(task / "out/failed.jsonl")
    assert {row["question_id"]: row["reason"] for row in failed} == {
        1: "unreadable", 2: "unreadable", 3: "empty", 4: "out_of_range"}
    kept = {n: pair for n, pair in PAIRS.items() if n not in range(1, 5)} | {0: (9, 5)}
    found = json.loads((task / "out/judge.json").read_text())
    assert found["figures"] == pytest.approx(expected_of(kept))
    assert (found["judgements"], found["failed"]) == (12, 4)
    assert found["failed_for"] == {"unreadable": 2, "empty": 1, "out_of_range": 1}
    assert [review["question_id"] for review in read(task / "out/reviews/reviews_1.jsonl")] == sorted(kept)
    printed = capsys.readouterr()
    assert "12 judgements by teacher" in printed.out and "; 4 failed and are left out" in printed.out
    assert "- question 1: unreadable: '11/10'\n- question 2: unreadable: 'Well, the first" in printed.out
    assert "more than --max-failed 0.05" in printed.err
    assert judge(task, fake, "--max-failed", "0.34") == 0 and sum(asked.values()) == 22


def test_compat_keeps_pairs_of_minus_one_and_asks_once(task, capsys):
    replies = {1: "8, 7\nno", 2: "Scores: 8 7", 3: "", 4: "11 0"}
    fake = FakeOpenAI(answer=lambda messages: replies.get(number_of(messages)) if number_of(messages) in replies
                      else say(messages))
    assert judge(task, fake, "--compat") == 4 and len(fake.bodies) == COUNT
    pairs = PAIRS | dict.fromkeys((1, 2, 3), (-1, -1)) | {4: (11, 0)}
    lines = ["reviews_1"]
    for name in ("all", *(f"llava_bench_{category}" for category in sorted(CATEGORIES))):
        group = [pair for n, pair in pairs.items() if name in ("all", f"llava_bench_{CATEGORIES[n % 3]}")]
        a, b = (round(statistics.fmean(pair[side] for pair in group), 3) for side in (0, 1))
        lines.append(f"{name} {round(b / a * 100, 1)} {round(a * 10, 1)} {round(b * 10, 1)}")
    assert capsys.readouterr().out.splitlines() == [*lines, "=" * 33]
    reviews = read(task / "out/reviews/reviews_1.jsonl")
    assert [review["tuple"] for review in reviews[:5]] == [[10, 2], [-1, -1], [-1, -1], [-1, -1], [11, 0]]
    found = json.loads((task / "out/judge.json").read_text())
    assert found["failed"] == 3 and found["failed_for"] == {"unreadable": 3}
    assert SummarizeReviews((str(task / "out/reviews"),), compat=True).run() == 0
    assert capsys.readouterr().out.splitlines() == [*lines, "=" * 33]


def test_both_orders_and_several_runs(task, capsys):
    """A judge who likes what comes first, by 2 in the first run and by 1 in the second."""
    seen = Counter()

    def answer(messages):
        content = messages[-1]["content"]
        seen[content] += 1
        return say(messages, swapped=3 - seen[content])

    assert judge(task, FakeOpenAI(answer=answer), "--swap", "--runs", "2", "--concurrency", "1") == 0
    found = json.loads((task / "out/judge.json").read_text())
    swapped = [expected_of({n: (r, c + more) for n, (r, c) in PAIRS.items()}) for more in (2, 1)]
    first = expected_of(PAIRS)
    orders = found["orders"]
    assert list(orders) == ["reference first", "candidate first", "difference", "both orders"]
    assert found["figures"] == orders["reference first"]["figures"] == pytest.approx(first)
    for name in ("all", *CATEGORIES):
        ratios = [ratio[name] for ratio in swapped]
        assert orders["candidate first"]["figures"][name] == pytest.approx(statistics.fmean(ratios))
        assert orders["candidate first"]["deviations"][name] == pytest.approx(statistics.stdev(ratios))
        assert orders["difference"]["figures"][name] == pytest.approx(statistics.fmean(ratios) - first[name])
        assert found["deviations"][name] == pytest.approx(0, abs=1e-9)
    total = sum(r for r, _ in PAIRS.values())
    both = statistics.fmean(100 * sum(2 * c + more for _, c in PAIRS.values()) / (2 * total) for more in (2, 1))
    assert orders["both orders"]["figures"]["all"] == pytest.approx(both)
    review = read(task / "out/reviews/reviews_2_swapped.jsonl")[3]
    assert review["tuple"] == [9, 6] and review["swapped"] and review["content"].startswith("6 9")
    assert review["answer1_id"] == 3 and review["answer2_id"] == "a3"
    printed = capsys.readouterr().out
    assert "candidate first" in printed and "difference" in printed and "±" in printed and "+" in printed


def test_the_difference_is_of_questions_that_both_orders_have(task):
    def answer(messages):
        swapped = "[Assistant 1]\nA0." in messages[-1]["content"]
        return "?" if swapped else say(messages)

    assert judge(task, FakeOpenAI(answer=answer), "--swap", "--max-failed", "0.1") == 0
    orders = json.loads((task / "out/judge.json").read_text())["orders"]
    assert orders["candidate first"]["figures"]["all"] != pytest.approx(orders["reference first"]["figures"]["all"])
    assert orders["difference"]["figures"]["all"] == pytest.approx(0)


FAULTS = ["429-ms", "500", "502", "drop", "cut", "nonsense", "error200", "length", "empty", "filter"]


def test_faults_of_the_server_change_no_score(task):
    fake = FakeOpenAI(answer=say, faults=lambda number: share_of_faults(0.4, FAULTS, number))
    assert judge(task, fake, "--attempts", "6") == 0
    found = json.loads((task / "out/judge.json").read_text())
    assert found["failed"] == 0 and found["figures"] == pytest.approx(expected_of(PAIRS))


def test_requests_that_fail_are_counted_and_asked_again_next_time(task):
    broken = {"now": True}
    fake = FakeOpenAI(answer=say, faults=lambda number: "context" if broken["now"] and number % 3 == 1 else None)
    assert judge(task, fake) == 4
    found = json.loads((task / "out/judge.json").read_text())
    assert found["failed"] == 4 and found["failed_for"] == {"request_failed": 4}
    assert "context_length" in read(task / "out/failed.jsonl")[0]["detail"]
    broken["now"] = False
    assert judge(task, fake) == 0 and len(fake.bodies) == COUNT
    assert json.loads((task / "out/judge.json").read_text())["figures"] == pytest.approx(expected_of(PAIRS))


def test_one_request_that_fails_is_no_success(task, capsys):
    broken = {"now": True}
    fake = FakeOpenAI(answer=say, faults=lambda number: "context" if broken["now"] and number == 1 else None)
    assert judge(task, fake, "--max-failed", "0.5") == 1
    assert "1 requests got no answer (context_length" in capsys.readouterr().err
    broken["now"] = False
    assert judge(task, fake, "--max-failed", "0.5") == 0


def test_a_judge_that_answers_nothing_is_an_error(task):
    fake = FakeOpenAI(answer=say, faults=lambda number: "context")
    with pytest.raises(UserError, match="none of .* requests was answered, the first for context_length"):
        judge(task, fake, "--max-failed", "1")
    assert not (task / "out/judge.json").exists()


def test_a_limit_of_requests_stops_it_and_leaves_no_figures(task, capsys):
    fake = FakeOpenAI(answer=say)
    assert judge(task, fake, "--max-requests", "5") == 3
    assert "--max-requests 5 are used up; the same command goes on" in capsys.readouterr().err
    assert not (task / "out/judge.json").exists() and len(fake.bodies) == 5
    assert judge(task, fake) == 0 and len(fake.bodies) == COUNT and set(fake.paid.values()) == {1}


PROGRAM = ("import sys; from llava_jax import cli; from llava_jax.evaluate.judge.command import JudgeAnswers; "
           "cli.run(lambda args: cli.parse(JudgeAnswers, args).run())")


@pytest.mark.parametrize("sent, code", [
    (signal.SIGKILL, -9), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)])
def test_killed_and_resumed(task, sent, code):
    fake = FakeOpenAI(answer=say, faults=lambda number: "slow" if number >= 4 else None, slow=0.3)
    with fake.serve() as url:
        command = [sys.executable, "-c", PROGRAM, *options_of(task, url, "--concurrency", "2")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        log = task / "out/judged.jsonl"
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 4):
            time.sleep(0.01)  # until it is in the middle
        process.send_signal(sent)
        process.communicate()
        assert process.returncode == code and not (task / "out/judge.json").exists()
        before = len(read(log))
        assert before < COUNT
        fake.faults = lambda number: None
    assert judge(task, fake) == 0
    assert json.loads((task / "out/judge.json").read_text())["figures"] == pytest.approx(expected_of(PAIRS))
    assert set(fake.paid.values()) == {1} or sent == signal.SIGKILL  # what was in flight is lost to SIGKILL
    assert sum(fake.paid.values()) <= COUNT + 2


@pytest.mark.parametrize("change, more, message", [
    (lambda rows: rows[1:], [], "1 of 12 questions have no answer, the first is 11; --partial"),
    (lambda rows: [*rows, rows[0]], [], "1 questions have more than one answer, the first is 11"),
    (lambda rows: [*rows, rows[0] | {"question_id": 99}], [], "questions that LLaVA-Bench .In-the-Wild. does not have"),
    (lambda rows: [rows[0] | {"prompt": "Other?"}, *rows[1:]], [], "question 11 was asked as 'Other.'"),
    (lambda rows: [rows[0] | {"model_id": "n"}, *rows[1:]], [], "the answers are of 2 models"),
    (lambda rows: rows, ["--runs", "0"], "--runs is 0"), (lambda rows: rows, ["--attempts", "0"], "--attempts is 0"),
    (lambda rows: rows, ["--max-failed", "5"], "--max-failed is 5"),
    (lambda rows: rows, ["--model", ""], "--model NAME"),
    (lambda rows: rows, ["--concurrency", "0"], "--concurrency is 0"),
    (lambda rows: [], [], "the file has no answers"),
    (lambda rows: [{"question_id": 99, "text": ""}], ["--partial"], "none of its answers is to a question"),
])
def test_mistakes_are_named_before_anything_is_asked(task, change, more, message):
    write(task / "answers.jsonl", change(read(task / "answers.jsonl")))
    fake = FakeOpenAI(answer=say)
    with pytest.raises(UserError, match=message):
        judge(task, fake, *more)
    assert not fake.bodies and not (task / "out").exists()


@pytest.mark.parametrize("rules, message", [
    ("[]", "not a table of rules"), ("{", "not JSON"), ('{"a": {"role": "x"}}', "rule of 'a' needs the texts role"),
    ('{"conv": {"role": "A", "prompt": "B"}}', "has no rule for 'llava_bench_complex'; it has conv"),
])
def test_rules_that_do_not_fit_are_named(task, rules, message):
    (task / "rule.json").write_text(rules)
    with pytest.raises(UserError, match=message):
        judge(task, FakeOpenAI(answer=say), "--rules", str(task / "rule.json"))


def test_partial_judges_what_is_there(task, capsys):
    write(task / "answers.jsonl", read(task / "answers.jsonl")[5:])
    assert judge(task, FakeOpenAI(answer=say), "--partial") == 0
    found = json.loads((task / "out/judge.json").read_text())
    assert found["figures"] == pytest.approx(expected_of({n: PAIRS[n] for n in range(7)}))
    assert "note: 5 of 12 questions have no answer, and are left out" in capsys.readouterr().err
    assert [review["id"] for review in read(task / "out/reviews/reviews_1.jsonl")] == list(range(1, 8))


def test_a_server_without_the_model_is_a_mistake(task):
    with pytest.raises(UserError, match="has no model 'teacher'"):
        judge(task, FakeOpenAI(answer=say, models={"other": {}}))
    assert os.listdir(task / "out") == ["judged.jsonl"]
