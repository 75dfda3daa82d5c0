import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from llava_jax import cli
from llava_jax.errors import UserError
from llava_jax.evaluate.scienceqa import problems
from llava_jax.evaluate.scienceqa.problems import (
    INPUTS,
    OUTPUTS,
    ScienceQAData,
    compose,
    find_image,
    read_problems,
    write_conversations,
)

# What LLaVA's converter makes of three made-up problems, run once: all its forms of questions and of answers.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "scienceqa.json").read_text(encoding="utf-8"))
PROBLEMS = GOLDEN["problems"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["3", "1", "2"], "minival": ["2"]}))
    return tmp_path


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def hub(tmp_path) -> Path:
    """Rows as Hugging Face has them, in files named as there."""
    own = ("image", "split")
    rows = [{key: problem[key] for key in problem if key not in own} for problem in PROBLEMS.values()]
    images = [None, {"bytes": png("red"), "path": "image.png"}, {"bytes": png("blue"), "path": None}]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, pick in (("train", [0, 1, 2]), ("validation", [2]), ("test", [1, 0])):
        table = pyarrow.Table.from_pylist([{"image": images[i], **rows[i]} for i in pick])
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001-0a1b2c.parquet")
    return tmp_path / "hub"


@pytest.mark.parametrize("form", INPUTS)
def test_questions_are_the_converters(form):
    assert [compose(problem, f"{form}-A")[0] for problem in PROBLEMS.values()] == GOLDEN["formats"][form]


@pytest.mark.parametrize("form", OUTPUTS)
def test_answers_are_the_converters(form):
    assert [compose(problem, f"QCM-{form}")[1] for problem in PROBLEMS.values()] == GOLDEN["formats"][form]


def test_files_are_the_converters_to_the_byte(folder):
    problems = {"1": PROBLEMS["1"] | {"question": "é?", "lecture": "", "solution": ""},
                "2": PROBLEMS["2"] | {"question": "Question: a colony?"}}
    write_conversations(problems, str(folder / "a.json"), "CQM-A")
    assert (folder / "a.json").read_bytes() == rb"""[
  {
    "id": "1",
    "conversations": [
      {
        "from": "human",
        "value": "Context: N/A\nQuestion: \u00e9?\nOptions: (A) newt (B) cat fish (C) a cow"
      },
      {
        "from": "gpt",
        "value": "The answer is C."
      }
    ]
  },
  {
    "id": "2",
    "image": "2/image.png",
    "conversations": [
      {
        "from": "human",
        "value": "Context: Look at\nthe map.\nQuestion: Question: a colony?\nOptions: (A) Ohio (B) Maine\n<image>"
      },
      {
        "from": "gpt",
        "value": "The answer is B."
      }
    ]
  }
]"""
    write_conversations(problems, str(folder / "a.jsonl"), "QCM-A", "jsonl")
    assert (folder / "a.jsonl").read_bytes() == (
        rb'{"id": "1", "instruction": "\u00e9?\nContext: N/A\nOptions: (A) newt (B) cat fish (C) a cow", '
        rb'"output": "The answer is C."}' b"\n"
        rb'{"id": "2", "image": "2/image.png", "instruction": "a colony?\nContext: Look at\nthe map.\n'
        rb'Options: (A) Ohio (B) Maine\n<image>", "output": "The answer is B."}' b"\n")


def test_the_command_writes_every_split_and_format(folder, capsys):
    assert cli.parse(ScienceQAData, [str(folder), "--out", str(folder / "made"), "--splits", "train", "minival",
                                     "--formats", "QCM-LEPA", "CQM-A", "--kind", "jsonl"]).run() == 0
    rows = [json.loads(line) for line in (folder / "made" / "scienceqa_train_QCM-LEPA.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["3", "1", "2"]  # as the split has them
    assert {path.name for path in (folder / "made").iterdir()} == {
        f"scienceqa_{split}_{form}.jsonl" for split in ("train", "minival") for form in ("QCM-LEPA", "CQM-A")}
    assert f"2 images are missing, the first is {folder}/images/train/3/choice.png" in capsys.readouterr().out


def test_nothing_is_overwritten_by_accident(folder):
    command = ScienceQAData(str(folder), splits=("train",), formats=("QCM-A",))
    command.run()
    with pytest.raises(UserError, match="llava_train_QCM-A.json: exists already; add --overwrite"):
        command.run()
    ScienceQAData(str(folder), splits=("train",), formats=("QCM-A",), overwrite=True).run()


def test_rows_of_the_hub_become_scienceqas_own_layout(hub, tmp_path, capsys):
    out = tmp_path / "out"
    ScienceQAData(str(hub), str(out), splits=("train",), formats=("QCM-LEA",)).run()
    assert json.loads((out / "pid_splits.json").read_text()) == {
        "train": ["train-0", "train-1", "train-2"], "val": ["val-0"], "test": ["test-0", "test-1"]}
    own = json.loads((out / "problems.json").read_text())
    for pid, like in (("train-0", "1"), ("train-1", "2"), ("train-2", "3"), ("val-0", "3"), ("test-1", "1")):
        expected = PROBLEMS[like] | {"split": pid.split("-")[0]}
        if expected["image"]:
            expected["image"] = "image.png"
        assert own[pid] == expected
    assert (out / "images" / "val" / "val-0" / "image.png").read_bytes() == png("blue")
    assert "missing" not in capsys.readouterr().out
    rows = json.loads((out / "llava_train_QCM-LEA.json").read_text())
    assert [row.get("image") for row in rows] == [None, "train-1/image.png", "train-2/image.png"]
    assert all((out / "images" / "train" / row["image"]).exists() for row in rows if "image" in row)


def test_the_hubs_rows_are_read_as_they_are_too(hub):
    problems = read_problems(str(hub), "test")
    assert list(problems) == ["test-0", "test-1"]
    assert find_image(str(hub), "test", "test-0", problems["test-0"]) == png("red")
    assert problems["test-1"]["image"] is None
    single = next((hub / "data").glob("validation*"))
    assert read_problems(str(single), "val") == read_problems(str(hub), "val")


def test_images_are_found_where_people_unpack_them(folder):
    problem = PROBLEMS["2"]
    for place in ("images/train/2", "train/2", "images/2", "2"):
        path = folder / place / "image.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png("red"))
        # minival is a part of train here, as the problem itself says
        assert find_image(str(folder), "minival", "2", problem) == str(path)
        path.unlink()
    assert find_image(str(folder), "minival", "2", problem) == str(folder / "images/train/2/image.png")


def test_a_download_is_one_call_and_its_failure_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)))
    problems.download(str(tmp_path))
    assert calls == [("derek-thomas/ScienceQA", {"repo_type": "dataset", "allow_patterns": "data/*.parquet",
                                                 "local_dir": str(tmp_path)})]

    def fail(*args, **options):
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded to .* \(no route\)"):
        problems.download(str(tmp_path))


def damage(folder, **fields):
    problems = json.loads(json.dumps(PROBLEMS))
    problems["1"] |= fields
    (folder / "problems.json").write_text(json.dumps(problems))


@pytest.mark.parametrize("fields, message", [
    ({"choices": list("abcdef")}, "problem 1: 'choices' is"),
    ({"answer": 3}, "problem 1: 'answer' is 3"),
    ({"hint": None}, "problem 1: 'hint' is None"),
])
def test_a_problem_that_is_none_is_named(folder, fields, message):
    damage(folder, **fields)
    with pytest.raises(UserError, match=message):
        read_problems(str(folder), "train")


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="no split 'test'; there are train, minival"):
        read_problems(str(folder), "test")
    with pytest.raises(UserError, match="format 'QCM-LAE': it must be"):
        ScienceQAData(str(folder), formats=("QCM-LAE",)).run()
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1", "77"], "test": []}))
    with pytest.raises(UserError, match="1 problems of the split train are not in it, the first is '77'"):
        read_problems(str(folder), "train")
    with pytest.raises(UserError, match="the split test has no problems"):
        read_problems(str(folder), "test")
    (folder / "problems.json").write_text("[")
    with pytest.raises(UserError, match="problems.json: not JSON"):
        read_problems(str(folder), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither problems.json"):
        ScienceQAData(str(tmp_path / "empty")).run()
