"""Members of a JSON object, read as a stream, against json.load."""

import json
import random

import pytest

from llava_jax.data import json_rows
from llava_jax.data.json_rows import read_members
from llava_jax.errors import UserError


def flattened(content: dict) -> list:
    return [pair for key, value in content.items()
            for pair in ([(key, item) for item in value] if isinstance(value, list) else [(key, value)])]


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return rng.choice([None, True, -3, 10**25, 0.1, 1e-7, "", "plain", "é 日本 😀 \\ \" ] } , : [", "x" * 300])
    if kind < 8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{i}é": random_value(rng, depth + 1) for i in range(rng.randrange(4))}


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_members_are_those_of_json_load(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_rows, "SMALL_PIECE_BYTES", piece)
    rng, path = random.Random(piece), tmp_path / "file.json"
    for number in range(60):
        content = {f"key {i}": random_value(rng) for i in range(rng.randrange(6))}
        text = json.dumps(content, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        path.write_text(rng.choice(["", "\n \t", "\ufeff"]) + text + rng.choice(["", " \r\n"]), encoding="utf-8")
        assert list(read_members(str(path))) == flattened(content), number


@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_a_file_that_is_cut_anywhere_is_told_with_its_line(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_rows, "SMALL_PIECE_BYTES", piece)
    path = tmp_path / "cut.json"
    text = json.dumps({"a": [{"b": 12}, [1.5]], "c": {"d": "é"}}, indent=1, ensure_ascii=False).encode()
    for length in range(1, len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(UserError, match=r"cut.json, line (\d+): broken JSON \(.+\); copy the file again") as error:
            list(read_members(str(path)))
        line = int(str(error.value).partition("line ")[2].partition(":")[0])
        assert 1 <= line <= text[:length].count(b"\n") + 1 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[1]", "must be one JSON object"),
        (b"\x1f\x8b123", "is packed with gzip"),
        (b"PK\x03\x04", "is a zip archive"),
        (b'{"a": [1 2]}', "line 1: broken JSON .a comma or the end of the list is missing"),
        (b'{"a": 1\n "b": 2}', "line 2: broken JSON .a comma or the end of the object is missing"),
        (b'{\n1: 2}', "line 2: broken JSON .a key or its colon is missing"),
        (b'{"a": ["\xff"]}', "broken JSON .*decode byte 0xff"),
        (b'{"a": ' + b"1" * 5000 + b"}", "broken JSON .*4300 digits"),
        (b'{"a": ' + b"[" * 200_000, "broken JSON .*recursion"),
    ],
)
def test_other_files_give_one_line(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}.*{message}") as error:
        list(read_members(str(path)))
    assert "\n" not in str(error.value)
