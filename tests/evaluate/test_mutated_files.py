"""Every small file that evaluate reads, damaged at random: one line that names a file of the run, or a score."""

import json
import random
import re
import shutil

import pytest
from bench_files import write_all

from llava_jax.errors import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.tasks.base import TASKS, get_task

EACH = [2, pytest.param(20, marks=pytest.mark.slow)]
"""Number of damages of a file."""
SAID = {"pope": "Yes", "mme": "Yes", "seed": "A", "scienceqa": "B", "mmbench": "B"}
TOKENS = [b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000, b'"\\ud800"', b"[]", b"{}", b'""', b'"../../x"',
          b'"\\u0000"', b'"\\u001b[2J"', b"[[1]]"]
CONTENTS = [b"", b"null", b"[]", b"{}", b"\xff\xfe\x00", b"[" * 3000, b'{"a":' * 3000, b"1", b"9" * 6000]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Another value for one of JSON's, a flipped bit, a piece that is gone or doubled, or something else entirely."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    values = [match.span() for match in re.finditer(rb'"[^"]*"|-?[0-9.]+', data)]
    if rng.random() < 0.5 and values:
        start, end = rng.choice(values)
        return data[:start] + rng.choice(TOKENS) + data[end:]
    flipped = bytearray(data)
    flipped[start - 1] ^= 1 << rng.randrange(8)
    grown = data[:start] + rng.randbytes(4) + data[start:]
    return rng.choice([bytes(flipped), data[:start], data[:start] + data[end:], data[:end] + data[start:], grown,
                       rng.choice(CONTENTS), data.decode().encode("utf-16")])


def try_damages(path, command, names, capsys, each) -> int:
    whole, rng, told = path.read_bytes(), random.Random(path.name), 0
    for _ in range(each):
        path.write_bytes(damaged(whole, rng))
        try:
            evaluate.main(command)
        except UserError as error:
            told += 1
            assert any(name in str(error) for name in names), error
            assert len(str(error).splitlines()) == 1
        assert "\x1b" not in "".join(capsys.readouterr())
    path.write_bytes(whole)
    return told


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "mmbench-cn"])  # read as mmbench
def test_damaged_files_are_one_line_or_a_score(name, each, tmp_path, capsys):
    write_all(tmp_path)
    folder, out = tmp_path / name, tmp_path / "out"
    options = {"annotations": str(folder / "annotations.json")} if name in ("vqav2", "vizwiz") else {}
    rows = [{"question_id": question.id, "prompt": question.prompt or question.text, "text": SAID.get(name, "red"),
             "answer_id": f"a{n}", "model_id": "m", **question.fields}
            for n, question in enumerate(get_task(name)(**options).load(str(folder)))]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [name, "--data", str(folder), "--answers", str(folder / "answers.jsonl"), "--out", str(out),
               *(f"--{key}={value}" for key, value in options.items())]
    if name.startswith("llava"):
        prefix = get_task(name).prefix
        (folder / "reviews.jsonl").write_text("".join(json.dumps(
            {"question_id": row["question_id"], "answer2_id": row["answer_id"], "category": f"{prefix}conv",
             "content": "8 7", "tuple": [8, 7]}) + "\n" for row in rows))
        command += ["--reviews", str(folder / "reviews.jsonl")]
    assert evaluate.main(command) == 0  # undamaged
    told, names = 0, [str(tmp_path), *(path.name for path in folder.rglob("*") if path.is_file())]
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]:
        told += try_damages(path, command, names, capsys, each)
        if path.name == "reviews.jsonl":
            told += try_damages(path, ["reviews", str(path)], [path.name], capsys, each)
    told += try_damages(folder / "answers.jsonl", [*command, "--partial"], names, capsys, each)
    shutil.copytree(out / name, tmp_path / "other")
    compared = ["compare", str(out / name), str(tmp_path / "other")]
    for file in ("results.json", "items.jsonl"):
        told += try_damages(tmp_path / "other" / file, compared, names, capsys, each)
    assert told > 2 * each
