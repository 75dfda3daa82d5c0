"""The command line of synthesize, as a user has it: against a fake of OpenAI's API with its faults, and with rules."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import run_command
from fake_openai import FakeOpenAI, share_of_faults
from PIL import Image
from synthesis_data import answer_messages, write_images, write_prompts

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.endpoint import batch
from llava_jax.errors import UserError
from llava_jax.prepare import __main__ as prepare
from llava_jax.synthesize import __main__ as synthesize
from llava_jax.synthesize.prompts import KINDS

FAULTS = ["429-ms", "500", "502", "slow", "length", "drop", "cut", "empty", "nonsense", "never", "filter"]


def options_of(folder: Path, url: str, *more: str) -> list[str]:
    images = folder / "images.jsonl"
    return ["--data", str(images if images.exists() else write_images(folder)), "--out", str(folder / "out"),
            "--model", "teacher", "--base-url", url, "--prompts", str(write_prompts(folder)), *more]


def records_of(folder: Path) -> Counter:
    """(kind, id) of all records, accepted or rejected."""
    found = Counter()
    for kind in KINDS:
        with contextlib.suppress(FileNotFoundError):
            found.update((kind, record["id"]) for record in json.loads((folder / "out" / f"{kind}.json").read_text()))
    rejected = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    found.update((row["kind"], row["id"]) for row in map(json.loads, rejected))
    return found


def outputs_of(folder: Path) -> dict[str, bytes]:
    names = [*(f"{kind}.json" for kind in KINDS), "instruct.json", "rejected.jsonl", "flagged.jsonl"]
    return {name: (folder / "out" / name).read_bytes() for name in names}


def start(command: list[str], limit: str = "unlimited") -> subprocess.Popen:
    """`limit`: kilobytes beyond which no file may grow, which stands for a full disk."""
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash"]
    return subprocess.Popen([*shell, sys.executable, "-m", "llava_jax.synthesize", *command], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_answers(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until the log has so many lines, or the process has ended."""
    log = folder / "out" / "answers.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


@pytest.mark.parametrize("name", synthesize.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        synthesize.main([name, "--help"])
    assert ended.value.code == 0 and f"llava_jax.synthesize {name}" in capsys.readouterr().out


def test_from_captions_to_data_that_prepare_takes(tmp_path, capsys):
    with FakeOpenAI(answer=answer_messages).serve() as url:
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told[1:4]] == [[kind, "10", "10", "0", "0"] for kind in KINDS]
    assert told[4].startswith("30 answers: ") and told[5].endswith("instruct.json, rejected.jsonl, flagged.jsonl")
    assert records_of(tmp_path) == Counter((kind, f"{i:06d}") for kind in KINDS for i in range(10))
    assert not (tmp_path / "out" / "rejected.jsonl").read_text()
    for i in range(10):
        Image.new("RGB", (100, 80), (20 * i, 99, 9)).save(tmp_path / f"{i:06d}.jpg")
    for name in (*KINDS, "instruct"):
        assert prepare.main(["check", str(tmp_path / "out" / f"{name}.json"), "--image-root", str(tmp_path),
                             "--workers", "0", "--allow", "duplicate_id"]) == 0, capsys.readouterr().out


def test_the_same_command_again_asks_nothing(tmp_path):
    fake = FakeOpenAI(answer=answer_messages)
    with fake.serve() as url:
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
        before = outputs_of(tmp_path)
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
    assert fake.paid.total() == 30 and outputs_of(tmp_path) == before


def test_preview_is_not_paid_twice_and_estimate_learns_from_it(tmp_path, capsys):
    fake = FakeOpenAI(answer=answer_messages)
    (tmp_path / "prices.json").write_text('{"teacher": {"prompt": 1, "completion": 4, "batch": 0.5}}')
    with fake.serve() as url:
        options = options_of(tmp_path, url)
        assert synthesize.main(["preview", *options, "--dry-run"]) == 0
        assert not fake.paid and not (tmp_path / "out").exists()
        assert synthesize.main(["estimate", *options, "--prices", str(tmp_path / "prices.json")]) == 0
        assert "by the examples' answers" in capsys.readouterr().out and not fake.paid
        assert synthesize.main(["preview", *options, "-n", "4"]) == 0
        shown = capsys.readouterr().out
        assert fake.paid.total() == 4 and shown.count("accepted") == 4
        assert "Write a complex_reasoning." in shown and "stands to the left of a chair" in shown
        assert synthesize.main(["estimate", *options, "--prices", str(tmp_path / "prices.json")]) == 0
        estimated = capsys.readouterr().out
        assert "measured on 2 answers" in estimated and "2 of 10 are answered" in estimated and "USD" in estimated
        assert synthesize.main(["run", *options]) == 0
    assert fake.paid.total() == len(fake.paid) == 30


def check_after_faults(folder: Path, fake: FakeOpenAI, images: int, in_flight: int) -> None:
    """Every task once, every request answered once, and nothing paid for but that, and what was lost: answers that the
    server cut off, and those in flight at a kill."""
    assert records_of(folder) == Counter((kind, f"{i:06d}") for kind in KINDS for i in range(images))
    keys = [json.loads(line)["key"] for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(set(keys)) == len(keys) >= 3 * images
    lost = fake.paid.total() - len(keys)
    assert fake.refused["cut"] <= lost <= fake.refused["cut"] + in_flight
    assert json.loads((folder / "out" / "manifest.json").read_text())["complete"]


def test_faults_on_a_fifth_of_the_requests_and_a_kill(tmp_path):
    write_images(tmp_path, 20)
    fake = FakeOpenAI(answer=answer_messages, faults=lambda number: share_of_faults(0.2, FAULTS, number), slow=0.1,
                      latency=0.02)
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--timeout", "1", "--concurrency", "20")
        process = start(["run", *options])
        wait_for_answers(tmp_path, 20, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert synthesize.main(["run", *options]) == 0
    check_after_faults(tmp_path, fake, 20, in_flight=20)


class Held(FakeOpenAI):
    """Answers 20 requests, and the others when it is let go on."""

    def __init__(self):
        super().__init__(answer=answer_messages)
        self.go = threading.Event()

    async def _chat(self, body):
        while self.paid.total() >= 20 and not self.go.is_set():
            await asyncio.sleep(0.01)
        return await super()._chat(body)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_finishes_what_is_in_flight(tmp_path, sent, code):
    write_images(tmp_path, 40)
    fake = Held()
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--concurrency", "10")
        process = start(["run", *options])
        wait_for_answers(tmp_path, 20, process)
        status = run_command("synthesize", "status", tmp_path / "out")
        assert status.code == 0 and "running" in status.out
        process.send_signal(sent)
        assert process.stderr.readline() == "finishing what is in flight; once more to leave at once\n"
        fake.go.set()
        out, err = process.communicate()
        assert process.returncode == code and err == "stopped; the same command goes on\n"
        asked = fake.paid.total()
        written = records_of(tmp_path).total()
        assert 20 <= written == asked < 120  # all that was paid is used
        assert synthesize.main(["run", *options]) == 0
    assert fake.paid.total() == len(fake.paid) == records_of(tmp_path).total() == 120


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_second_signal_leaves_at_once_and_the_lock_with_it(tmp_path, sent, code):
    fake = Held()
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--concurrency", "10")
        process = start(["run", *options])
        wait_for_answers(tmp_path, 20, process)
        process.send_signal(sent)
        assert process.stderr.readline().startswith("finishing")
        process.send_signal(sent)
        _, err = process.communicate()
        assert process.returncode == code and "Traceback" not in err
        fake.go.set()
        assert synthesize.main(["run", *options]) == 0
    assert records_of(tmp_path).total() == 30


def test_sigterm_before_anything_was_asked(tmp_path):
    """While it looks whether the server is there."""
    class Silent(FakeOpenAI):
        async def respond(self, *request):
            process.send_signal(signal.SIGTERM)
            return await asyncio.sleep(3600)

    with Silent().serve() as url:
        process = start(["run", *options_of(tmp_path, url)])
        _, err = process.communicate()
    assert process.returncode == 75 and "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("llava_jax.endpoint.run._Run.send", bug)
    with FakeOpenAI(answer=answer_messages).serve() as url:
        code, _, err = run_command("synthesize", "run", *options_of(tmp_path, url))
    assert code == 1 and "Traceback" in err and "RuntimeError: a bug" in err


def test_nothing_answered_is_an_error_and_something_unanswered_is_no_success(tmp_path, capsys):
    write_images(tmp_path, 2)
    broken = {"from": 0}
    fake = FakeOpenAI(answer=answer_messages, faults=lambda number: "500" if number >= broken["from"] else None)
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--retries", "0", "--concurrency", "1")
        with pytest.raises(UserError, match="none of 6 requests was answered, the first for no_answer"):
            synthesize.main(["run", *options])
        with pytest.raises(UserError, match="none of 2 requests was answered"):
            synthesize.main(["preview", *options, "-n", "2"])
        broken["from"] = 8 + 2
        assert synthesize.main(["preview", *options, "-n", "3"]) == 1
        assert synthesize.main(["run", *options, "--retries", "1"]) == 1
        broken["from"] = 1e9
        assert synthesize.main(["run", *options]) == 0


def test_what_tries_without_an_answer_may_cost_is_kept(tmp_path, capsys):
    write_images(tmp_path, 2)
    (tmp_path / "prices.json").write_text('{"teacher": {"prompt": 100, "completion": 400}}')
    fake = FakeOpenAI(answer=answer_messages, faults=lambda number: "cut" if number else None)
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--prices", str(tmp_path / "prices.json"), "--max-new-tokens", "200",
                             "--concurrency", "1", "--retries", "0", "--max-cost", "1")
        assert synthesize.main(["run", *options]) == 1
        assert "tries that brought no answer may have cost up to 0." in capsys.readouterr().err
        lost = json.loads((tmp_path / "out" / "progress.json").read_text())["lost_usd"]
        assert 5 * 200 * 400 / 1e6 < lost < 0.9
        asked = fake.paid.total()
        for _ in range(10):  # none starts anew at nothing
            synthesize.main(["run", *options])
    assert asked < fake.paid.total() <= 1 / (200 * 400 / 1e6)


def test_limits_of_requests_and_cost(tmp_path, capsys):
    fake = FakeOpenAI(answer=answer_messages)
    (tmp_path / "prices.json").write_text('{"teacher": {"prompt": 100, "completion": 400}}')
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--prices", str(tmp_path / "prices.json"), "--max-new-tokens", "200")
        assert synthesize.main(["run", *options, "--max-requests", "7"]) == 3
        assert fake.paid.total() == 7 == records_of(tmp_path).total()
        assert "--max-requests 7 are used up; the same command goes on" in capsys.readouterr().err
        assert synthesize.main(["run", *options, "--max-cost", "0.6"]) == 3
        spent = json.loads((tmp_path / "out" / "manifest.json").read_text())["cost_usd"]
        assert 0.4 < spent <= 0.6 and 7 < fake.paid.total() < 30
        assert synthesize.main(["run", *options]) == 0
    assert fake.paid.total() == len(fake.paid) == 30


def test_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MIN_POLL_SECONDS", 0.01)
    fake = FakeOpenAI(answer=answer_messages, batch_end=lambda number: "completed" if number else "expired")
    with fake.serve() as url:
        assert synthesize.main(["run", *options_of(tmp_path, url, "--batch")]) == 0
    assert fake.paid.total() == len(fake.paid) == records_of(tmp_path).total() == 30 and len(fake.batches) == 2


def test_what_is_rejected_is_asked_again_and_then_told(tmp_path, capsys):
    asked = Counter()

    def answer(messages):
        asked[messages[-1]["content"]] += 1
        good = asked[messages[-1]["content"]] >= (2 if "dog" in messages[-1]["content"] else 9)
        return answer_messages(messages) if good else "I'm sorry, but I can't help with that."

    write_images(tmp_path, 2)
    with FakeOpenAI(answer=answer).serve() as url:
        options = options_of(tmp_path, url, "--detail", "0", "--complex", "0", "--concurrency", "1")
        assert synthesize.main(["run", *options]) == 0
    assert sorted(asked.values()) == [2, 3]
    (row,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (row["id"], row["reason"], row["attempts"]) == ("000001", "refusal", 3) and "sorry" in row["answer"]


def test_mistakes_are_found_before_any_work(tmp_path, monkeypatch):
    fake = FakeOpenAI(answer=answer_messages, key="right")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with fake.serve() as url, FakeOpenAI(chat=False, models=None).serve() as no_chat:
        options = options_of(tmp_path, url)
        for change, words in [
            ([], "refuses the API key"),
            (["--api-key-env", "OTHER_KEY"], "OTHER_KEY is not set"),
            (["--base-url", no_chat], "no chat API"),
            (["--base-url", "http://127.0.0.1:9/v1"], "127.0.0.1:9"),
            (["--base-url", "localhost"], "not the address of an API"),
            (["--max-cost", "3"], "--max-cost needs --prices"),
            (["--max-cost", "nan"], "--max-cost is nan: it must be at least 0"),
            (["--prices", str(tmp_path / "none.json")], "none.json"),
            (["--concurrency", "0"], "--concurrency is 0"),
        ]:
            with pytest.raises((ValueError, OSError), match=words):
                synthesize.main(["run", *options, *change])
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        for change, words in [
            (["--model", "teach"], "no model 'teach'; it has teacher"),
            (["--conversation", "99"], "--conversation 99: there are only 10 images"),
            (["--prompts", str(tmp_path)], "no such folder"),
            (["--language", "xx"], "xx"),
        ]:
            with pytest.raises((ValueError, OSError), match=words):
                synthesize.main(["run", *options, *change])
        assert not fake.paid and not (tmp_path / "out").exists()
        assert synthesize.main(["run", *options]) == 0


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    (tmp_path / "empty.json").write_text("")
    monkeypatch.chdir(tmp_path)
    for arguments in ("", "runn", "run --capt", "run --teacher rules --captions empty.json", "view ."):
        code, _, err = run_command("synthesize", *arguments.split())
        assert code == 2 and len(err.splitlines()) == bool(arguments), err
    assert sorted(os.listdir(tmp_path)) == ["empty.json"]


def test_a_broken_last_line_is_mended_and_told(tmp_path, capsys):
    fake = FakeOpenAI(answer=answer_messages)
    with fake.serve() as url:
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
        before = outputs_of(tmp_path)
        log = tmp_path / "out" / "answers.jsonl"
        log.write_bytes(log.read_bytes()[:-100])
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
    assert "the last line was broken" in capsys.readouterr().err
    assert fake.paid.total() == 31 and outputs_of(tmp_path).keys() == before.keys()
    assert records_of(tmp_path).total() == 30


def test_what_a_server_says_beside_the_text_breaks_nothing(tmp_path, capsys):
    """Of a name that is no UTF-8, and of a fingerprint, a date and tokens that are none."""
    write_images(tmp_path, 2)
    fake = FakeOpenAI(answer=answer_messages)
    fake.complete = lambda *args: FakeOpenAI.complete(fake, *args) | {
        "model": "\ud800", "system_fingerprint": {"a": 1}, "created": 1e30, "usage": {"prompt_tokens": -1}}
    with fake.serve() as url:
        options = options_of(tmp_path, url)
        assert synthesize.main(["run", *options]) == 0
    assert records_of(tmp_path).total() == fake.paid.total() == 6
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["teacher"]["answered_by"] == {"\ud800": 6} and manifest["tokens"]["prompt"] == 0
    assert manifest["teacher"]["first_answer"][:4] == str(time.gmtime().tm_year)
    assert synthesize.main(["view", str(tmp_path / "out")]) == 0


def test_what_got_no_answer_is_told_and_asked_again(tmp_path, capsys):
    write_images(tmp_path, 2)
    fake = FakeOpenAI(answer=answer_messages, faults=lambda number: "nonsense" if number == 1 else None)
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--retries", "0", "--concurrency", "1")
        assert synthesize.main(["run", *options]) == 1
        told = capsys.readouterr().err
        assert "1 tasks got no answer (no_answer: " in told and "no chat completion" in told
        assert records_of(tmp_path).total() == 6 and (tmp_path / "out" / "rejected.jsonl").read_text()
        progress = json.loads((tmp_path / "out" / "progress.json").read_text())
        assert progress["rejected_answers"] == {"request_failed": 1} and progress["requests"] == 6
        assert synthesize.main(["run", *options]) == 0
    assert not capsys.readouterr().err and not (tmp_path / "out" / "rejected.jsonl").read_text()
    assert fake.paid.total() == len(fake.paid) == records_of(tmp_path).total() == 6


def test_status_counts_what_was_paid(tmp_path, capsys):
    """Images that are the same for the teacher share an answer."""
    path = write_images(tmp_path, 1)
    row = json.loads(path.read_text())
    path.write_text("".join(json.dumps(row | {"id": str(i), "image": f"{i}.jpg"}) + "\n" for i in range(5)))
    fake = FakeOpenAI(answer=answer_messages)
    with fake.serve() as url:
        assert synthesize.main(["run", *options_of(tmp_path, url)]) == 0
    tokens = json.loads((tmp_path / "out" / "manifest.json").read_text())["tokens"]
    capsys.readouterr()
    assert synthesize.main(["status", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert fake.paid.total() == 3 and f"{tokens['prompt']:,} prompt and {tokens['completion']:,} completion" in shown
    (tmp_path / "out" / "progress.json").write_text("{")
    with pytest.raises(UserError, match="progress.json: not what a synthesis writes"):
        synthesize.main(["status", str(tmp_path / "out")])


def test_a_terminal_obeys_no_caption(tmp_path, capsys):
    path = write_images(tmp_path, 1)
    path.write_text(path.read_text().replace("Room 0", "\\u001b[2J\\u009bRoom 0"))
    assert synthesize.main(["preview", *options_of(tmp_path, "http://127.0.0.1:9/v1"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "\ufffd[2J\ufffdRoom 0" in shown and "\x1b" not in shown and "\x9b" not in shown


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    with FakeOpenAI(answer=answer_messages, latency=0.3).serve() as url:
        options = options_of(tmp_path, url, "--concurrency", "1")
        process = start(["run", *options])
        wait_for_answers(tmp_path, 1, process)
        with pytest.raises(UserError, match="another process is writing to it"):
            synthesize.main(["run", *options])
        process.kill()
        process.communicate()


def test_a_full_disk_loses_nothing(tmp_path):
    fake = FakeOpenAI(answer=answer_messages)
    with fake.serve() as url:
        options = options_of(tmp_path, url, "--concurrency", "1")
        process = start(["run", *options], limit="8")
        _, err = process.communicate()
        assert process.returncode == 2 and "could not be written" in err and len(err.splitlines()) == 1, err
        kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
        assert 0 < kept.count(b"\n") == fake.paid.total() - 1 and kept.endswith(b"\n")
        assert synthesize.main(["run", *options]) == 0
    assert fake.paid.total() == 31 and records_of(tmp_path).total() == 30


@pytest.mark.parametrize("language", ["en", "ko"])
def test_short_answers_by_rules(tmp_path, language):
    scenes.write(tmp_path, train=40, test=0)
    options = ["--teacher", "rules", "--short", "--captions", str(tmp_path / "annotations" / "captions_train.json"),
               "--instances", str(tmp_path / "annotations" / "instances_train.json"), "--detail", "0", "--complex", "0"]
    assert synthesize.main(["run", *options, "--out", str(tmp_path / "out"), "--language", language]) == 0
    records = json.loads((tmp_path / "out" / "conversation.json").read_text())
    turns = [record["conversations"] for record in records]
    answers = [turn["value"] for turn in sum(turns, []) if turn["from"] == "gpt"]
    assert len(records) >= 36 and len(answers) > 6 * len(records)
    assert max(len(answer.split(" ")) for answer in answers) <= 3
    demand = {"en": "Answer the question using a single word or phrase.", "ko": "한 단어나 짧은 구로 답해 주세요."}
    assert all(demand[language] in first["value"] for first, *_ in turns)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_rules_on_the_scenes(tmp_path, capsys, language):
    scenes.write(tmp_path, train=40, test=0)
    options = ["--teacher", "rules", "--captions", str(tmp_path / "annotations" / "captions_train.json"), "--instances",
               str(tmp_path / "annotations" / "instances_train.json"), "--out", str(tmp_path / "out")]
    assert synthesize.main(["run", *options, "--language", language]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    counts = Counter({kind: count["accepted"] for kind, count in manifest["counts"].items()})
    assert records_of(tmp_path).total() == 120 and counts.total() >= 110, manifest["counts"]
    assert manifest["flagged"]["records"] == 0 and manifest["tokens"]["prompt"] == 0
    for name in (*KINDS, "instruct"):
        assert prepare.main(["check", str(tmp_path / "out" / f"{name}.json"), "--image-root", str(tmp_path / "train"),
                             "--workers", "0", "--allow", "duplicate_id"]) == 0, capsys.readouterr().out
    assert synthesize.main(["view", str(tmp_path / "out"), "--image-root", str(tmp_path / "train"), "-n", "6"]) == 0
    assert synthesize.main(["status", str(tmp_path / "out")]) == 0
    assert "done, as of" in capsys.readouterr().out


@pytest.mark.slow
def test_five_kills_among_faults():
    script = Path(__file__).parents[2] / "scripts" / "bench_synthesize.py"
    ended = subprocess.run([sys.executable, str(script), "--images", "1000", "--least-share", "0"], capture_output=True,
                           text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
