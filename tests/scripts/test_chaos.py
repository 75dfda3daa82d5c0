"""What scripts/chaos judges others with: damages are seeded and change the file, and no outcome hides another."""

import json
import os
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from llava_jax.errors import UserError

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "chaos"))

import forks  # noqa: E402
import mutations  # noqa: E402

CONTENTS = {
    "a.json": json.dumps({"a": [1, {"b": "c"}], "d": None}).encode(),
    "a.jsonl": b'{"a": 1}\n{"b": [2, 3]}\n',
    "a.safetensors": save({"x": np.arange(6, dtype=np.float32)}),
    "a.txt": b"any text",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_damages_are_seeded_and_told(name, tmp_path):
    path, seen = tmp_path / name, set()
    for seed in range(200):
        results = []
        for _ in range(2):
            path.write_bytes(CONTENTS[name])
            results.append((mutations.mutate(path, random.Random(seed)), path.read_bytes()))
        assert results[0] == results[1]
        seen.add(results[0][1])
    assert len(seen) > 80 and sum(content == CONTENTS[name] for content in seen) <= 1


def test_a_changed_header_keeps_the_length_before_it():
    for seed in range(100):
        content, what = mutations.change_header(CONTENTS["a.safetensors"], random.Random(seed))
        (length,) = struct.unpack("<Q", content[:8])
        assert what.startswith("header length") or content[8 + length :] == CONTENTS["a.safetensors"][-24:]
    assert load(CONTENTS["a.safetensors"])["x"].tolist() == list(range(6))


def _raise(error: Exception) -> None:
    raise error


def _loop() -> None:
    while True:
        pass


def _fill() -> int:
    blocks = [np.ones(2**25) for _ in range(12)]
    return len(blocks)


@pytest.mark.parametrize("kind, call", [
    ("ok", lambda: {"a": 1}), ("told", lambda: _raise(UserError("file: wrong"))),
    ("traceback", lambda: _raise(KeyError("x"))), ("traceback", lambda: _raise(ValueError("x"))),
    ("hang", _loop), ("memory", _fill), ("died", lambda: os._exit(3)), ("died", lambda: os.kill(os.getpid(), 9)),
])
def test_every_outcome_is_told_apart(kind, call, tmp_path):
    result = forks.attempt(call, tmp_path, seconds=1 if kind == "hang" else 60)
    assert result.kind == kind, result


def test_the_memory_of_this_process_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "LARGEST", 2**30 // 3)
    held = np.ones(2**26)  # 512 MiB
    assert forks.attempt(lambda: 1, tmp_path, seconds=60).kind == "ok" and held.all()
