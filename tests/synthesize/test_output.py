"""Every task once in what a run leaves, whatever its answers were; whole files; a manifest that others can check."""

import hashlib
import json
import random
from collections import Counter

import pytest
from synthesis_data import fill, good_answer, make_synthesis, reply, write_images, write_prompts

from llava_jax.annotations.context import AnnotationSource
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.prices import Price
from llava_jax.errors import UserError
from llava_jax.synthesize import output
from llava_jax.synthesize.output import check_folder, write_outputs
from llava_jax.synthesize.prompts import KINDS
from llava_jax.synthesize.synthesis import Synthesis, SynthesisSettings

FILES = [f"{kind}.json" for kind in KINDS]


def read(folder):
    """Records by file, rejects and flags."""
    lists = {name: json.loads((folder / name).read_text()) for name in (*FILES, "instruct.json")
             if (folder / name).exists()}
    lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
             for name in ("rejected", "flagged")}
    return lists | lines


def answer_at_random(synthesis, log, seed):
    """Good, bad and no answers, and failures; returns where each task must end up, and the failures."""
    rng, expected, failures = random.Random(seed), {}, {}
    for task in synthesis:
        case = rng.choice(["good", "second", "bad", "none", "half", "failed"])
        ends = {"good": "accepted", "second": "accepted", "bad": "rejected", "failed": "rejected"}
        expected[task.name] = ends.get(case)
        fill(log, task, *{"good": [good_answer(task)], "second": ["", good_answer(task)], "bad": ["x", "", "nothing"],
                          "half": ["", "I'm sorry, I can't."]}.get(case, []))
        if case == "failed":
            failures[task.name] = "no_answer: after 9 tries"
    return expected, failures


@pytest.mark.parametrize("seed", range(3))
def test_every_task_ends_once(tmp_path, seed):
    synthesis = make_synthesis(tmp_path, 40, seed=seed)
    with AnswerLog(synthesis.settings.log) as log:
        expected, failures = answer_at_random(synthesis, log, seed)
        manifest = write_outputs(synthesis, log, failures)
    found = read(tmp_path / "out")
    accepted = Counter((kind, record["id"]) for kind in KINDS for record in found[f"{kind}.json"])
    rejected = Counter((row["kind"], row["id"]) for row in found["rejected"])
    assert accepted == Counter(name for name, end in expected.items() if end == "accepted")
    assert rejected == Counter(name for name, end in expected.items() if end == "rejected")
    for kind in KINDS:
        ends = Counter(str(end) for (its, _), end in expected.items() if its == kind)
        counts = manifest["counts"][kind]
        assert [counts[name] for name in ("asked", "accepted", "rejected", "unanswered")] == [
            40, ends["accepted"], ends["rejected"], ends["None"]]
    assert {row["reason"] for row in found["rejected"] if (row["kind"], row["id"]) in failures} == {"request_failed"}
    assert not manifest["complete"]


def test_records_are_llavas_and_in_the_order_of_the_images(tmp_path):
    synthesis = make_synthesis(tmp_path)
    with AnswerLog(synthesis.settings.log) as log:
        for task in synthesis:
            fill(log, task, good_answer(task))
        manifest = write_outputs(synthesis, log, {})
    assert manifest["complete"] and manifest["answers"] == 30
    for name in FILES:
        records = json.loads((tmp_path / "out" / name).read_text())
        assert [record["id"] for record in records] == [f"{i:06d}" for i in range(10)]
        for record in records:
            assert record["image"] == f"{record['id']}.jpg" and list(record) == ["id", "image", "conversations"]
            assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
            assert sum(turn["value"].count("<image>") for turn in record["conversations"]) == 1


def test_the_merged_file_is_a_shuffle_of_the_three(tmp_path):
    orders = []
    for seed in (0, 0, 1):
        synthesis = make_synthesis(tmp_path, 30, seed=seed)
        with AnswerLog(synthesis.settings.log) as log:
            for task in synthesis:
                if task.key(0) not in log:
                    fill(log, task, good_answer(task))
            write_outputs(synthesis, log, {})
        found = read(tmp_path / "out")
        rows = [json.dumps(record) for record in found["instruct.json"]]
        assert sorted(rows) == sorted(json.dumps(record) for name in FILES for record in found[name])
        orders.append([(record["id"], len(record["conversations"][1]["value"])) for record in found["instruct.json"]])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_the_same_log_gives_the_same_bytes_in_any_order(tmp_path):
    synthesis, contents = make_synthesis(tmp_path, 30), []
    for order in (1, -1):
        (tmp_path / "out" / "answers.jsonl").unlink(missing_ok=True)
        with AnswerLog(synthesis.settings.log) as log:
            for task in list(synthesis)[::order]:
                fill(log, task, good_answer(task))
            write_outputs(synthesis, log, {})
        names = (*FILES, "instruct.json", "rejected.jsonl")
        contents.append([(tmp_path / "out" / name).read_bytes() for name in names])
    assert contents[0] == contents[1]


def test_the_answers_of_an_earlier_image_are_a_duplicate(tmp_path):
    synthesis = make_synthesis(tmp_path, 3, detail=0, complex=0)
    with AnswerLog(synthesis.settings.log) as log:
        for task in synthesis:
            fill(log, task, good_answer(synthesis[1 if task is not synthesis[0] else 0]).replace("dog", "animal"))
        write_outputs(synthesis, log, {})
    found = read(tmp_path / "out")
    assert len(found["conversation.json"]) == 1 + (found["rejected"] == [])
    assert [row["reason"] for row in found["rejected"]] == ["duplicate"] * (2 - len(found["conversation.json"]) + 1)


def test_contradictions_are_listed(tmp_path):
    synthesis = make_synthesis(tmp_path, 3, conversation=0, complex=0)
    with AnswerLog(synthesis.settings.log) as log:
        for task in synthesis:
            wrong = " There are three chairs in the room." if task.context.id == "000001" else ""
            fill(log, task, good_answer(task) + wrong)
        manifest = write_outputs(synthesis, log, {})
    found = read(tmp_path / "out")
    assert len(found["detail_description.json"]) == 3
    assert [row["id"] for row in found["flagged"]] == ["000001"] and manifest["flagged"]["records"] == 1
    assert found["flagged"][0]["score"] < 1 and "chairs" in json.dumps(found["flagged"][0]["findings"])


def test_the_manifest_can_be_checked(tmp_path):
    synthesis = make_synthesis(tmp_path)
    price = Price(prompt=10.0, completion=100.0, cached=1.0)
    with AnswerLog(synthesis.settings.log) as log:
        for task in synthesis:
            fill(log, task, "", good_answer(task))
        write_outputs(synthesis, log, {}, price)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for path, about in [(tmp_path / "out" / name, about) for name, about in manifest["outputs"].items()]:
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    source = manifest["inputs"][0]
    assert source["sha256"] == hashlib.sha256((tmp_path / "images.jsonl").read_bytes()).hexdigest()
    assert manifest["answers"] == 60 and manifest["tokens"] == {"prompt": 6000, "cached": 3600, "completion": 1200}
    assert manifest["cost_usd"] == pytest.approx((2400 * 10 + 3600 * 1 + 1200 * 100) / 1e6)
    teacher = manifest["teacher"]
    assert teacher["answered_by"] == {"teacher-2026": 60} and teacher["fingerprints"] == {"fp": 60}
    assert teacher["first_answer"] == teacher["last_answer"] == "2026-09-21T14:13:20+00:00"
    assert manifest["prompts_sha256"] == synthesis.teacher.prompts.hash


def test_an_error_leaves_the_old_files(tmp_path, monkeypatch):
    synthesis = make_synthesis(tmp_path, 3)
    with AnswerLog(synthesis.settings.log) as log:
        write_outputs(synthesis, log, {})
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "answers.jsonl"}
        for task in synthesis:
            fill(log, task, good_answer(task))

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(output, "_merge", full)
        with pytest.raises(UserError, match="No space"):
            write_outputs(synthesis, log, {})
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "answers.jsonl"}
    assert after == before


def test_a_kind_that_is_no_more_asked_for_leaves_no_file(tmp_path):
    for settings, there in (({}, FILES), ({"conversation": 0}, FILES[1:])):
        synthesis = make_synthesis(tmp_path, 3, **settings)
        with AnswerLog(synthesis.settings.log) as log:
            write_outputs(synthesis, log, {})
        assert [name for name in FILES if (tmp_path / "out" / name).exists()] == there


def test_an_answer_that_is_no_text_is_kept_in_rejected(tmp_path):
    synthesis = make_synthesis(tmp_path, 1, detail=0, complex=0, attempts=1)
    with AnswerLog(synthesis.settings.log) as log:
        log.append(synthesis[0].key(0), reply("half \ud83d"))
        write_outputs(synthesis, log, {})
    assert read(tmp_path / "out")["rejected"][0]["answer"] == "half \ud83d"


def test_files_of_others_are_not_replaced(tmp_path):
    (tmp_path / "instruct.json").write_text("[]")
    with pytest.raises(UserError, match="it has a file instruct.json that synthesize has not made"):
        check_folder(str(tmp_path))
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_folder(str(tmp_path / "instruct.json"))
    (tmp_path / "answers.jsonl").write_text("")
    check_folder(str(tmp_path))


def test_what_a_killed_process_left_is_removed(tmp_path):
    synthesis = make_synthesis(tmp_path, 2)
    (tmp_path / "out" / ".instruct.json.12345.tmp").write_text("[")
    (tmp_path / "out" / ".mine").write_text("")
    with AnswerLog(synthesis.settings.log) as log:
        write_outputs(synthesis, log, {})
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".mine"]


def test_two_images_of_the_same_captions_share_a_paid_answer(tmp_path):
    path = write_images(tmp_path, 1)
    row = json.loads(path.read_text())
    path.write_text("".join(json.dumps(row | {"id": name, "image": f"{name}.jpg"}) + "\n" for name in "ab"))
    settings = SynthesisSettings(AnnotationSource(data=str(path)), out=str(tmp_path), model="teacher", detail=0,
                                 complex=0, prompts=str(write_prompts(tmp_path)))
    synthesis = Synthesis(settings)
    with AnswerLog(settings.log) as log:
        fill(log, synthesis[0], good_answer(synthesis[0]))
        manifest = write_outputs(synthesis, log, {})
    assert manifest["answers"] == 1 and manifest["tokens"]["prompt"] == 100
    assert manifest["counts"]["conversation"]["rejects"] == {"duplicate": 1} and manifest["complete"]
