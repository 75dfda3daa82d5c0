"""The command line: a made-up POPE, asked and scored in every way that should come to the same, and wrong files."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.config import Lora
from llava_jax.errors import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.tasks.base import PHRASE_INSTRUCTION, TASKS
from llava_jax.inference.llava import Llava
from llava_jax.weights import load_checkpoint, save_peft
from llava_jax.weights.source import shapes

SCRIPT = Path(__file__).with_name("evaluate_process.py")
COUNT = 45


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three times fifteen questions about five pictures."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "coco").mkdir()
    (folder / "val2014").mkdir()
    for i in range(5):
        Image.new("RGB", (30, 20), (50 * i, 250 - 50 * i, 99)).save(folder / "val2014" / f"{i}.jpg")
    questions = []
    for start, category in enumerate(("random", "popular", "adversarial")):
        labels = []
        for i in range(15):
            text = f"Is there a thing number {i} in the {category} image?"
            questions.append({"question_id": 100 * start + i, "image": f"{i % 5}.jpg",
                              "text": text + PHRASE_INSTRUCTION,
                              "category": category})
            labels.append({"question_id": i, "image": f"{i % 5}.jpg", "text": text, "label": ("yes", "no")[i % 2]})
        (folder / "coco" / f"coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


@pytest.fixture(scope="module")
def arguments(data, talker) -> list[str]:
    return ["pope", "--data", str(data), "--model", str(talker), "--name", "talker", "--batch-size", "4"]


def out_folder(tmp_path_factory, arguments, *more):
    out = tmp_path_factory.mktemp("out")
    assert evaluate.main([*arguments, "--out", str(out), *more]) == 0
    return out / "pope"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments) -> Path:
    """The folder of a run from beginning to end."""
    return out_folder(tmp_path_factory, arguments)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "answers.jsonl")]


def figures(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["figures"]


def start(*arguments: str, kill: int = 0, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(kill), *arguments], env=os.environ | environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_answers_are_those_of_one_question_at_a_time(whole, data, talker):
    questions = [json.loads(line) for line in open(data / "llava_pope_test.jsonl")]
    assert [line["question_id"] for line in lines(whole)] == [question["question_id"] for question in questions]
    llava = llava_jax.load(talker)
    for question, line in list(zip(questions, lines(whole), strict=True))[::7]:
        answer = llava.generate(question["text"], data / "val2014" / question["image"], max_new_tokens=128)
        assert line["text"] == answer.text.strip()
        assert line["prompt"] == question["text"] and line["model_id"] == "talker" and line["metadata"] == {}
    assert {"F1", "random TP"} <= set(figures(whole))
    assert sorted(os.listdir(whole)) == ["answers.jsonl", "items.jsonl", "results.html", "results.json", "results.md",
                                         "run.json"]


def test_a_killed_run_goes_on(whole, arguments, tmp_path, capsys):
    process = start(*arguments, "--out", str(tmp_path), kill=20)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    broken = (tmp_path / "pope" / "answers.jsonl").read_bytes()
    assert broken.count(b"\n") == 20 and not broken.endswith(b"\n")
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 0
    errors = capsys.readouterr().err
    assert "20 of 45 answers are there" in errors and "is cut (35 bytes)" in errors
    assert (tmp_path / "pope" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert figures(tmp_path / "pope") == figures(whole)


def test_a_run_that_is_whole_asks_nothing(whole, arguments, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "pope")
    monkeypatch.setattr("llava_jax.inference.llava.load", lambda *_: pytest.fail("the model was loaded"))
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "pope" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert evaluate.main([*arguments, "--out", str(tmp_path), "--limit", "20"]) == 0
    assert "the first 20 questions only" in capsys.readouterr().out
    assert len(lines(tmp_path / "pope")) == COUNT  # answers beyond the limit are kept
    assert len(open(tmp_path / "pope" / "items.jsonl").readlines()) == 20


def test_parts_that_know_nothing_of_each_other_come_to_the_same(whole, arguments, tmp_path, capsys):
    for index in (2, 0):
        assert evaluate.main([*arguments, "--out", str(tmp_path), "--num-chunks", "3", "--chunk-idx", str(index)]) == 0
        assert "questions of other parts are not yet" in capsys.readouterr().out
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 0  # goes on as one
    assert (tmp_path / "pope" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert not list((tmp_path / "pope").glob("answers-*"))


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_processes_that_know_each_other_come_to_the_same(whole, arguments, tmp_path, shared):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / ("x" if shared else str(i)) for i in range(2)]
    processes = [start(*arguments, "--out", str(folders[i]), JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                       JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)) for i in range(2)]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert (folders[0] / "pope" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert figures(folders[0] / "pope") == figures(whole) and printed[1][0] == ""
    assert not [*folders[0].glob("pope/answers-*"), *folders[1].glob("pope/answers-*")]


def test_a_file_of_answers_is_scored_as_it_is(whole, data, tmp_path, capsys):
    file = whole / "answers.jsonl"
    assert evaluate.main(["pope", "--data", str(data), "--answers", str(file), "--out", str(tmp_path)]) == 0
    assert figures(tmp_path / "pope") == figures(whole)
    assert lines(tmp_path / "pope") == lines(whole)
    result = json.loads((tmp_path / "pope" / "results.json").read_text())
    assert result["name"] == "talker" and result["model"] is None and result["answers_file"] == str(file)
    assert evaluate.main(["pope", "--data", str(data), "--answers", str(file)]) == 0
    assert "| talker " in capsys.readouterr().out
    # A part of it: refused, and with --partial the original's figure.
    (tmp_path / "part.jsonl").write_bytes(b"".join(file.read_bytes().splitlines(True)[:40]) + b'{"question')
    part = ["pope", "--data", str(data), "--answers", str(tmp_path / "part.jsonl")]
    with pytest.raises(UserError, match="line 41: the last line is broken off"):
        evaluate.main(part)
    assert evaluate.main([*part, "--partial"]) == 0
    assert "broken off and left out" in capsys.readouterr().out


def test_the_likeliest_choice(arguments, tmp_path_factory, data, talker):
    folder = out_folder(tmp_path_factory, arguments, "--score-by", "likelihood", "--limit", "6")
    llava, question = llava_jax.load(talker), json.loads(open(data / "llava_pope_test.jsonl").readline())
    scores = llava.log_likelihood({"messages": question["text"], "images": [data / "val2014" / "0.jpg"]}, ["Yes", "No"])
    first = lines(folder)[0]
    wanted = dict(zip(["Yes", "No"], scores, strict=True))
    assert first["metadata"]["log_likelihoods"] == pytest.approx(wanted, abs=1e-3)
    assert first["text"] == max(first["metadata"]["log_likelihoods"], key=first["metadata"]["log_likelihoods"].get)


def test_a_blind_run_is_another_run(arguments, tmp_path_factory, whole):
    folder = out_folder(tmp_path_factory, arguments[:5] + arguments[7:], "--baseline", "blind", "--limit", "6")
    assert json.loads((folder / "results.json").read_text())["name"] == "model (blind)"


def test_an_adapter_is_another_model(arguments, tmp_path_factory, whole, talker):
    config, parameters = load_checkpoint(talker)
    config = replace(config, lora=Lora(rank=2, alpha=200.0))
    rng = np.random.default_rng(0)
    parameters |= {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes(config).items()
                   if path not in parameters}
    adapter = tmp_path_factory.mktemp("adapter") / "adapter"
    save_peft(adapter, config, parameters, talker)
    adapted = out_folder(tmp_path_factory, arguments, "--adapter", str(adapter), "--limit", "8")
    assert [line["text"] for line in lines(adapted)] != [line["text"] for line in lines(whole)[:8]]
    hashes = [json.loads((folder / "run.json").read_text())["model"]["hash"] for folder in (whole, adapted)]
    assert hashes[1].startswith(f"{hashes[0]}+")


def test_questions_are_asked_in_the_template_that_is_named(arguments, tmp_path_factory, data, talker):
    folder = out_folder(tmp_path_factory, arguments, "--template", "llava_v0", "--limit", "3")
    llava = llava_jax.load(talker)
    llava = Llava(replace(llava.config, template="llava_v0"), llava.parameters, llava.tokenizer)
    question = json.loads(open(data / "llava_pope_test.jsonl").readline())
    answer = llava.generate(question["text"], data / "val2014" / "0.jpg", max_new_tokens=128)
    assert lines(folder)[0]["text"] == answer.text.strip()
    assert json.loads((folder / "results.json").read_text())["model"]["template"] == "llava_v0"


def test_one_overlong_question_costs_its_own_answer_alone(whole, arguments, data, tmp_path, capsys, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    rows = [json.loads(line) for line in open(data / "llava_pope_test.jsonl")]
    rows[1]["text"] = "Is it there? " * 400
    (moved / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["pope", "--data", str(moved), *arguments[3:], "--out", str(tmp_path), "--limit", "4"]
    assert evaluate.main(command) == 0
    first = capsys.readouterr()
    told = r"1 of 4 questions of .*pope_test\.jsonl were not asked; .* scores an empty one \(question 1: its prompt"
    assert re.search(told, first.out) and re.search(r"test\.jsonl, question 1 is not asked: its prompt has", first.err)
    assert [line["text"] for line in lines(tmp_path / "pope")] == [
        "" if n == 1 else line["text"] for n, line in enumerate(lines(whole)[:4])]
    monkeypatch.setattr("llava_jax.inference.llava.load", lambda *_: pytest.fail("the model was loaded"))
    assert evaluate.main(command) == 0
    assert re.search(told, capsys.readouterr().out)
    assert re.search(told, json.loads((tmp_path / "pope" / "results.json").read_text())["notes"][1])


@pytest.mark.parametrize(("more", "message"), [
    (["--name", "other"], r"differs in name \(talker, not other\)"),
    (["--name", "talker", "--dtype", "bfloat16"], r"differs in dtype \(float32, not bfloat16\)"),
    (["--name", "talker", "--score-by", "likelihood"], "differs in score_by"),
    (["--name", "talker", "--template", "llava_v0"], r"differs in template \(vicuna_v1, not llava_v0\)"),
    (["--name", "talker", "--template", "v1"], None),
    (["--name", "talker", "--baseline", "shuffled"], r"differs in baseline \(none, not shuffled\)"),
    (["--name", "talker", "--image-root", "elsewhere", "--limit", "1"], None),
])
def test_answers_of_other_settings_are_never_mixed(whole, arguments, tmp_path, more, message):
    shutil.copytree(whole, tmp_path / "pope")
    command = [*arguments[:5], *more, "--out", str(tmp_path)]
    if message is None:
        assert evaluate.main(command) == 0
        return
    with pytest.raises(UserError, match=f"holds answers of another run, which {message}.*--overwrite"):
        evaluate.main(command)
    assert (tmp_path / "pope" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_another_model_in_the_same_place_is_noticed(whole, arguments, data, talker, tmp_path):
    shutil.copytree(whole, tmp_path / "pope")
    shutil.copytree(talker, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="differs in model"):
        evaluate.main(["pope", "--data", str(data), "--model", str(tmp_path / "model"), "--name", "talker", "--out",
                       str(tmp_path)])
    (tmp_path / "pope" / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json beside it says which model's answers these are"):
        evaluate.main([*arguments, "--out", str(tmp_path)])
    assert evaluate.main([*arguments, "--out", str(tmp_path), "--overwrite", "--limit", "2"]) == 0
    assert len(lines(tmp_path / "pope")) == 2


def test_mistakes_are_told_before_the_model_is_loaded(arguments, data, talker, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.inference.llava.load", lambda *_: pytest.fail("the model was loaded"))
    out = ["--out", str(tmp_path / "out")]
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    (moved / "val2014" / "3.jpg").unlink()
    for command, message in (
        (["mope"], "knows no 'mope'; there are scenes, pope,"),
        (["pope", "--data", str(data)], "either --model DIR, .* or --answers FILE"),
        ([*arguments, "--answers", "x"], "either --model"),
        (arguments, "give --out DIR"),
        ([*arguments, *out, "--limit", "0"], "must be at least 1"),
        ([*arguments, *out, "--num-chunks", "2", "--chunk-idx", "2"], "must be in 0..1"),
        ([*arguments, *out, "--num-chunks", "2", "--overwrite"], "one would throw away what another has answered"),
        ([*arguments, *out, "--template", "vicuna"], "unknown template 'vicuna'"),
        ([*arguments, *out, "--template", "plain"], "'plain' writes an image alone and no question; .* v1_mmtag"),
        ([*arguments, "--out", str(data / "llava_pope_test.jsonl")], "llava_pope_test.jsonl.*(Not a directory|exists)"),
        (["pope", "--data", str(data), "--answers", "x", "--template", "v1"], "--template is for --model"),
        ([*arguments, *out, "--partial"], "--partial is for --answers"),
        ([*arguments[:3], *arguments[5:], *out], "model"),
        (["pope", "--data", str(tmp_path), *arguments[3:], *out], r"llava_pope_test\.jsonl: no such file"),
        (["pope", "--data", str(moved), *arguments[3:], *out], r"3\.jpg: no such image; 1 of 5 images are missing"),
        (["scenes", "--data", str(whole / "answers.jsonl"), *arguments[3:], *out], "not a question of Scenes"),
        (["pope", "--data", str(data), "--answers", str(whole / "items.jsonl")], "line 1: not an answer"),
        (["pope", "--data", str(data), "--answers", str(whole / "answers.jsonl"), "--out", str(whole.parent)],
         "holds the answers of a model that was asked"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate.main(command)
    with pytest.raises(UserError, match="no such directory"):
        evaluate.main(["pope", "--data", str(data), "--model", str(tmp_path / "none"), *out])


def test_a_file_that_cannot_be_scored_leaves_no_results(data, whole, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text((whole / "answers.jsonl").read_text() + '{"question_id": "other", "text": "x"}\n')
    command = ["pope", "--data", str(data), "--answers", str(path), "--out", str(tmp_path / "out")]
    for more, message in (([], "1 of 46 answers have no 'prompt'"), (["--partial"], "there is no question 'other'")):
        with pytest.raises(UserError, match=message):
            evaluate.main([*command, *more])
    assert not (tmp_path / "out").exists()


def test_answers_without_prompts_where_the_score_needs_them(tmp_path):
    rows = [{"question_id": "p", "image": "p.jpg", "text": "Q?" + PHRASE_INSTRUCTION}]
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps(
        {"data": [{"image_id": "p", "question": "Q?", "answers": ["a"] * 10}]}))
    (tmp_path / "answers.jsonl").write_text('{"question_id": "p", "text": "a"}\n')
    command = ["textvqa", "--data", str(tmp_path), "--answers", str(tmp_path / "answers.jsonl")]
    for more in ([], ["--partial"]):
        with pytest.raises(UserError, match=r"answers\.jsonl: the answer to question 'p' has no prompt"):
            evaluate.main([*command, *more])


def test_missing_images_are_told_before_anything_is_made_or_thrown_away(whole, arguments, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    (moved / "val2014" / "3.jpg").unlink()
    shutil.copytree(whole, tmp_path / "kept" / "pope")
    for out, more in (("kept", ["--overwrite"]), ("none", [])):
        with pytest.raises(UserError, match=r"3\.jpg: no such image"):
            evaluate.main(["pope", "--data", str(moved), *arguments[3:], "--out", str(tmp_path / out), *more])
    assert lines(tmp_path / "kept" / "pope") == lines(whole) and not (tmp_path / "none").exists()


def test_the_list_names_every_benchmark(capsys):
    assert evaluate.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in [*TASKS, *evaluate.COMMANDS])
    assert evaluate.main(["published", "mme"]) == 0
    assert "1510.7" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing published is known of 'x'"):
        evaluate.main(["published", "x"])


def test_scoring_a_file_needs_no_jax(whole, data):
    code = ("import sys; from llava_jax.evaluate import __main__ as evaluate; "
            f"evaluate.main(['pope', '--data', {str(data)!r}, '--answers', {str(whole / 'answers.jsonl')!r}]); "
            "assert 'jax' not in sys.modules")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
