"""Damaged files and rows of every format: each becomes a Record or a named error of one line, never anything else."""

import copy
import json
import random

import pytest

from llava_jax.data.records import REASONS, BadRow, Record, parse_row
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.video import Video

TURNS = [{"from": "human", "value": "<image>\nWhat is this, café?"}, {"from": "gpt", "value": "A \"cat\".\n"}]
PARTS = [{"type": "text", "text": "And"}, {"type": "image", "index": 0, "text": None},
         {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
ROWS = [
    {"id": "7", "image": "a/1.jpg", "conversations": TURNS},
    {"id": 8, "image": ["1.jpg", "2.jpg"], "conversations": [{"from": "gpt", "value": "x"}, *TURNS, *TURNS]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": PARTS},
                  {"role": "assistant", "content": "Yes"}], "images": [{"bytes": b"\x89PNG", "path": "1.png"}]},
    {"videos": ["1.mp4"], "images": ["2.jpg"], "messages": [
        {"role": "user", "content": [{"type": "video", "video": "3.mp4"}, "<video>", {"type": "image"}, "So?"]},
        {"role": "assistant", "content": "Yes"}]},
    {"query": "<image>?", "response": "No", "history": [["a", "b"]], "images": ["1.jpg"], "system": None},
]  # fmt: skip
STRANGE = [None, True, -1, 0, 1.5, float("nan"), 10**30, "", "<image>", "\0", "\ud800", "../x", "http://x", "data:,",
           [], {}, [[]], [None], {"from": 1}, "human", "system", b"", [b"x"]]


def places(value, path=()):
    """Every place in a nested value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutate_row(row, rng):
    """Replaces, doubles or removes something somewhere, several times."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([path for path in places(row) if path] or [()])
        if not path:
            return rng.choice(STRANGE)
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        how = rng.random()
        if how < 0.5:
            parent[path[-1]] = copy.deepcopy(rng.choice(STRANGE))
        elif how < 0.75:
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(rng.randint(0, len(parent)), copy.deepcopy(parent[path[-1]]))
        else:
            name = rng.choice(["image", "images", "videos", "messages", "conversations", "from", "role", "type"])
            parent[name] = parent[path[-1]]
    return row


def mutate_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(content) + 1), rng.random()
        if how < 0.3 and at < len(content):
            content[at] = rng.randrange(256)
        elif how < 0.5:
            del content[at : at + rng.randint(1, 30)]
        elif how < 0.7:
            content[at:at] = rng.choice([b"\0", b"\xff", b"\n", b"{", b"[", b"]", b",", b"\\", b"\\ud800", b"<image>"])
        elif how < 0.85:
            content[at:at] = content[at : at + rng.randint(1, 60)]
        else:
            del content[at:]
    return bytes(content)


def check_row(read):
    try:
        record = read()
        assert isinstance(record, Record) and isinstance(record.id, str)
        marks = sum(turn["value"].count("<image>") for turn in record.turns)
        assert marks == len(record.images) and all(isinstance(image, str | bytes | Video) for image in record.images)
        roles = [turn["from"] for turn in record.turns]
        assert set(roles[1:]) <= {"human", "gpt"} and all(a != b for a, b in zip(roles, roles[1:], strict=False))
        return True
    except BadRow as bad:
        assert bad.reason in REASONS and "\n" not in str(bad) and len(str(bad)) < 1000
        return False


def check_file(path):
    """How many rows of the file are records, and how many are not."""
    try:
        source = open_mixture(path).sources[0]
    except UserError as error:
        assert str(path.parent) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return 0, 1
    good = sum(check_row(lambda i=i: source[i]) for i in range(len(source)))
    return good, len(source) - good


@pytest.fixture(params=[10, pytest.param(1, marks=pytest.mark.slow)], ids=["a tenth", "whole"])
def part(request) -> int:
    """Divides the number of mutations; the default run makes a tenth of them."""
    return request.param


def test_rows(part):
    rng, good = random.Random(0), 0
    for _ in range(8000 // part):
        row = mutate_row(rng.choice(ROWS), rng)
        good += check_row(lambda row=row: parse_row(row, "data.json, row 1"))
    assert 400 < good * part < 6000  # neither kind is rare


def test_json_files(part, tmp_path):
    rng, path, found = random.Random(1), tmp_path / "data.json", [0, 0]
    rows = [row for row in ROWS if "messages" not in row]
    messages = {"messages": [{"role": "user", "content": PARTS[:1]}, {"role": "assistant", "content": "Yes"}]}
    files = [json.dumps(rows[:2], indent=1), json.dumps([messages] * 3), json.dumps(rows[2:] * 2),
             "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:2] * 2), json.dumps(messages) + "\n",
             json.dumps({"mixture": [{"path": "data.json", "count": 3}]})]  # fmt: skip
    for _ in range(4000 // part):
        path.write_bytes(mutate_bytes(rng.choice(files).encode(), rng))
        found = [a + b for a, b in zip(found, check_file(path), strict=True)]
    assert min(found) * part > 1000


MIXTURE = {"mixture": [{"path": "data.json", "image_root": "images", "epochs": 1.5}, {"path": "b.json", "count": 3}]}


def test_mixture_files(part, tmp_path):
    rng, path, good = random.Random(4), tmp_path / "mixture.json", 0
    for name in ("data.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([ROWS[0]] * 4))
    for number in range(3000 // part):
        text = json.dumps(mutate_row(MIXTURE, rng), ensure_ascii=False, default=str)
        content = text.encode(errors="surrogatepass")
        path.write_bytes(content if number % 2 else mutate_bytes(json.dumps(MIXTURE).encode(), rng))
        good += check_file(path)[0] > 0
    assert 100 < good * part < 2900


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_metadata_of_tfds(name, part, tmp_path):
    pytest.importorskip("array_record")
    from llava_jax.prepare.pack import Pack

    (tmp_path / "data.json").write_text(json.dumps([{"conversations": TURNS[1:] + [TURNS[1] | {"from": "human"}]}] * 3))
    assert Pack(data=str(tmp_path / "data.json"), out=str(tmp_path / "set"), workers=0).run() == 0
    rng, path, good = random.Random(5), tmp_path / "set" / name, 0
    whole = path.read_text()
    for number in range(1500 // part):
        mutated = json.dumps(mutate_row(json.loads(whole), rng), default=str).encode()
        path.write_bytes(mutated if number % 2 else mutate_bytes(whole.encode(), rng))
        good += check_folder(tmp_path / "set")
    assert 20 < good * part < 1480


def check_folder(folder):
    """Whether all rows of a data set are records."""
    try:
        source = open_mixture(folder).sources[0]
        records = [check_row(lambda i=i: source[i]) for i in range(len(source))]
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return False
    return all(records)


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_parquet_files(compression, part, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rng, path, found = random.Random(2), tmp_path / "data.parquet", [0, 0]
    rows = [{"messages": [{"role": "user", "content": PARTS[:2]}, {"role": "assistant", "content": PARTS[:1]}],
             "images": [{"bytes": b"\x89PNG", "path": None}]}] * 5  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2, compression=compression)
    assert check_file(path) == (5, 0)
    whole = path.read_bytes()
    for _ in range(400 // part):
        path.write_bytes(mutate_bytes(whole, rng))
        found = [a + b for a, b in zip(found, check_file(path), strict=True)]
    assert found[1] * part > 100
