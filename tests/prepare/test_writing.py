"""Rows written as they are stored, in three formats; image paths that lead to the same files; nothing half-written."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
from llava_jax.prepare import writing
from llava_jax.prepare.subsets import Mix, Sample, Split

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "naïve café 日本語 😀 \u2028"}]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="


def chat(*parts):
    content = [*parts, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "That"}]}


LLAVA = [
    {"id": "a", "image": "x/1.jpg", "conversations": TURNS, "extra": {"kept": [1, 2.5, None, True]}},
    {"id": 2, "image": ["x/2.jpg"], "conversations": TURNS},
    {"id": 3, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    {"id": 4, "image": PIXEL, "conversations": TURNS},
]
CHATS = [
    chat({"type": "image_url", "image_url": {"url": "x/1.jpg", "detail": "low"}}),
    chat({"type": "image_url", "image_url": PIXEL}),
    chat({"type": "image", "path": "x/2.jpg"}, {"type": "image", "image": "x/3.jpg"}),
    chat({"type": "image"}) | {"images": ["x/4.jpg"]},
    {"messages": [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}],
     "images": [{"bytes": None, "path": "x/5.jpg"}]},
]
SWIFT = [{"query": "<image>What?", "response": "That", "images": ["x/1.jpg"]}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


def rows_of(path):
    source = open_source(path)
    return [source.row(i) for i in range(len(source))]


def sample(data, out, **options):
    return Sample(data=str(data), out=str(out), fraction=1, workers=0, **options).run()


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("rows", [LLAVA, CHATS, SWIFT])
def test_rows_stay_as_they_are(rows, suffix, tmp_path, capsys):
    data = write(tmp_path / "data.json", rows)
    out = tmp_path / f"new/folder/out.{suffix}"
    assert sample(data, out) == 0
    assert rows_of(out) == rows
    assert f"--image-root {tmp_path}\n" in capsys.readouterr().out
    text = out.read_text()
    lines = text.split("\n")
    assert rows == (json.loads(text) if suffix == "json" else [json.loads(line) for line in lines[:-1]])
    assert lines[-1] == ""
    assert os.stat(out).st_mode & 0o777 == os.stat(data).st_mode & 0o777


def test_half_a_character_stays_an_escape(tmp_path):
    rows = [{"id": "\ud83d", "conversations": TURNS}, {"id": "é", "conversations": TURNS}]
    data = write(tmp_path / "data.json", rows)
    sample(data, tmp_path / "out.jsonl")
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["\ud83d", "é"]
    with pytest.raises(UserError, match="do not fit the columns of a parquet file"):
        sample(data, tmp_path / "out.parquet")
    assert sorted(os.listdir(tmp_path)) == ["data.json", "out.jsonl"]


@pytest.mark.parametrize("rows", [LLAVA, CHATS, SWIFT])
def test_images_are_the_same_under_another_root(rows, tmp_path, capsys):
    """Every format is moved by a mixture of two roots; the records then name the files that they named before."""
    write(tmp_path / "one/two/a.json", rows)
    absolute = json.loads(json.dumps(rows).replace("x/1.jpg", f"{tmp_path}/one/abs.jpg"))
    write(tmp_path / "one/b.json", absolute)
    parts = (f"{tmp_path}/one/two/a.json", f"{tmp_path}/one/b.json")
    Mix(out=str(tmp_path / "out.jsonl"), parts=parts, materialise=True, workers=0).run()
    assert f"--image-root {tmp_path}/one\n" in capsys.readouterr().out
    before = [open_source(part)[i].images for part in parts for i in range(len(rows))]
    moved = open_source(tmp_path / "out.jsonl", tmp_path / "one")
    assert sorted(map(str, before)) == sorted(str(moved[i].images) for i in range(len(moved)))
    assert any(isinstance(image, bytes) for images in before for image in images) == (rows is not SWIFT)


def image_rows(count):
    image = {"bytes": b"\xff\xd8 not decoded here", "path": None}
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "That"}]}]
    return [{"number": i, "messages": messages, "images": [image]} for i in range(count)]


def test_parquet_keeps_types_and_notes(tmp_path):
    table = pyarrow.Table.from_pylist(image_rows(250))
    table = table.set_column(0, "number", table["number"].cast(pyarrow.int16()))
    table = table.replace_schema_metadata({"huggingface": '{"info": "features"}'})
    data, out = tmp_path / "data.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(table, data, row_group_size=70)
    sample(data, out)
    assert pyarrow.parquet.read_table(out).equals(pyarrow.parquet.read_table(data), check_metadata=True)
    assert pyarrow.parquet.read_metadata(out).num_row_groups == 3
    with pytest.raises(UserError, match="JSON cannot: write to a .parquet file .*prepare pack"):
        sample(data, tmp_path / "out.json")
    with pytest.raises(UserError, match="split: --format parquet"):
        Split(data=str(data), out_dir=str(tmp_path / "parts"), by="row", workers=0).run()
    assert os.listdir(tmp_path / "parts") == []
    Split(data=str(data), out_dir=str(tmp_path / "parts"), parts="a=200,b=rest", by="row", format="parquet",
          workers=0).run()
    parts = [pyarrow.parquet.read_table(tmp_path / f"parts/{name}.parquet")["number"].to_pylist() for name in "ab"]
    assert list(map(len, parts)) == [200, 50] and sorted(sum(parts, [])) == list(range(250))


def test_json_to_parquet_finds_columns_that_come_late(tmp_path):
    plain = {"id": "1", "conversations": TURNS[:2]}
    rows = [plain] * 150 + [plain | {"image": "x/1.jpg", "score": 1.5}] + [plain | {"score": 2}] * 60
    sample(write(tmp_path / "data.json", rows), tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{key: value for key, value in row.items() if value is not None} for row in found] == rows
    mixed = write(tmp_path / "mixed.json", [plain, plain | {"id": 2}])
    with pytest.raises(UserError, match="do not fit the columns of a parquet file .*write .jsonl") as raised:
        sample(mixed, tmp_path / "mixed.parquet")
    assert "\n" not in str(raised.value) and not (tmp_path / "mixed.parquet").exists()


def test_tfds_rows(tmp_path):
    """A data set that holds its images: rows go to parquet, and name no image root."""
    from PIL import Image

    from llava_jax.prepare.pack import Pack

    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": TURNS} for i in range(6)]
    packed = tmp_path / "packed"
    data = write(tmp_path / "data.json", rows)
    Pack(data=data, out=str(packed), image_root=str(tmp_path / "images"), workers=0).run()
    with pytest.raises(UserError, match="JSON cannot"):
        Sample(data=str(packed), out=str(tmp_path / "out.json"), count=3, workers=0).run()
    Sample(data=str(packed), out=str(tmp_path / "out.parquet"), count=3, workers=0).run()
    whole = open_source(packed)
    out = open_source(tmp_path / "out.parquet")
    records = {whole[i].id: whole[i] for i in range(6)}
    assert len(out) == 3
    for i in range(3):
        assert out[i].images == records[out[i].id].images and out[i].turns == records[out[i].id].turns


def test_an_existing_file_and_an_input_are_safe(tmp_path):
    data = write(tmp_path / "data.json", LLAVA)
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match="out.json: exists already; add --overwrite"):
        sample(data, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "mine"
    sample(data, tmp_path / "out.json", overwrite=True)
    assert rows_of(tmp_path / "out.json") == LLAVA
    os.symlink(data, tmp_path / "link.json")
    for out in (data, tmp_path / "link.json", f"{tmp_path}/./data.json"):
        with pytest.raises(UserError, match="is read as part of"):
            sample(data, out, overwrite=True)
    with pytest.raises(UserError, match="out.txt: the name must end in .json, .jsonl, .parquet"):
        sample(data, tmp_path / "out.txt")
    folder = tmp_path / "shards"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(image_rows(3)), folder / "train-00000-of-00001.parquet")
    for given in (folder, f"{folder}:train"):
        with pytest.raises(UserError, match="is read as part of"):
            sample(given, folder / "sub/new.parquet")
    assert rows_of(data) == LLAVA


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    data = write(tmp_path / "data.json", LLAVA)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.json").write_text("old")
    real, written = writing._dump, []

    def fail(row):
        written.append(row)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return real(row)

    monkeypatch.setattr(writing, "_dump", fail)
    split = Split(data=data, out_dir=str(tmp_path / "parts"), parts="a=2,b=2", by="row", workers=0, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        split.run()
    assert os.listdir(tmp_path / "parts") == ["a.json"] and (tmp_path / "parts/a.json").read_text() == "old"
    monkeypatch.undo()
    assert split.run() == 0
    assert sorted(os.listdir(tmp_path / "parts")) == ["a.json", "b.json"]
    assert len(rows_of(tmp_path / "parts/a.json")) == 2
