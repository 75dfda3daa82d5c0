"""The README of tasks is followed step by step, and the README of evaluate names every benchmark."""

import json
import re
from pathlib import Path

from PIL import Image

import llava_jax.evaluate
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.tasks.base import TASKS

ROOM = Path(llava_jax.evaluate.__file__).parent


def test_a_benchmark_in_five_steps(tmp_path, monkeypatch, capsys):
    text = (ROOM / "tasks/README.md").read_text()
    row, module, entry = re.findall(r"```(?:json|python)\n(.*?)```", text, flags=re.DOTALL)
    row = json.loads(row)
    rows = [row, row | {"question_id": 1, "answer": "black", "kind": "night"},
            row | {"question_id": 2, "answer": "no", "kind": "night"}]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / row["image"])
    (tmp_path / "sky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question_id": 0, "text": "Blue."}, {"question_id": 1, "text": ""}, {"question_id": 2, "text": "no"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    (tmp_path / "sky.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    name, path = re.fullmatch(r'"(\w+)": "([\w.:]+)",', entry.strip()).groups()
    monkeypatch.setitem(TASKS, name, path.removeprefix("llava_jax.evaluate.tasks."))
    arguments = [name, "--data", str(tmp_path), "--answers", str(tmp_path / "answers.jsonl")]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 answers are empty" in printed and "the published file has 100" in printed
    result = json.loads((tmp_path / "out/sky/results.json").read_text())
    assert {name: round(value, 2) for name, value in result["figures"].items()} == {
        "overall": 66.67, "day": 100, "night": 50}


def test_every_benchmark_is_in_the_table():
    table = [line for line in (ROOM / "README.md").read_text().splitlines() if line.startswith("| ")]
    names = re.findall(r"`([\w-]+)`", " ".join(table))
    names += [f"llava-bench{name}" for name in names if name == "-wild"]
    assert set(TASKS) <= set(names)
