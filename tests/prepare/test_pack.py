"""Packed sets are read back with TFDS and compared with what went in."""

import dataclasses
import io
import json
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from pack_data import contents, encoded, expected, read_all, run, stop, with_tfds, write_data
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from llava_jax import cli, image_files
from llava_jax.data.sources import open_source
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.prepare import pack, progress
from llava_jax.prepare.pack import Pack
from llava_jax.prepare.shards import Encoding, check_image


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def test_tfds_reads_back_every_row_and_every_byte(data, tmp_path, capsys):
    out = run(data, tmp_path / "set")
    assert with_tfds(out) == expected(data)
    assert re.search(r"set: 24 rows with \d+ images in 4 shards, [\d.]+ [KM]B\n$", capsys.readouterr().out)
    assert set(contents(out)) == {
        "dataset_info.json",
        "features.json",
        *(f"set-train.array_record-0000{k}-of-00004" for k in range(4)),
    }
    builder = tfds.builder_from_directory(out)
    assert builder.info.splits["train"].num_examples == 24
    assert builder.info.splits["train"].shard_lengths == [6, 6, 6, 6]
    decoded = builder.as_data_source("train")[3]  # TFDS decodes the images too
    assert [image.shape[:2] for image in decoded["images"]] == [
        Image.open(io.BytesIO(content)).size[::-1] for content in expected(data)[3]["images"]
    ]


def test_what_tfds_itself_would_have_written(data, tmp_path):
    # TFDS serialises the same rows: its bytes, in some order of the columns, and types are those of the pack.
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "image_widths": tfds.features.Sequence(tfds.features.Scalar(np.int32)),
            "image_heights": tfds.features.Sequence(tfds.features.Scalar(np.int32)),
            "conversations": tfds.features.Sequence(
                {"from": tfds.features.Text(), "value": tfds.features.Text(), "loss": tfds.features.Scalar(np.bool_)}
            ),
        }
    )
    out = run(data, tmp_path / "set")
    builder = tfds.builder_from_directory(out)
    assert features.to_json() == builder.info.features.to_json()
    total, stored, example_of = 0, read_all(out), tf_example_pb2.Example.FromString
    for row in expected(data):
        files = [io.BytesIO(image) for image in row["images"]]
        turns = [turn | {"loss": turn["from"] == "gpt"} for turn in row["turns"]]
        widths, heights = zip(*[Image.open(file).size for file in files], strict=True) if files else ((), ())
        for file in files:
            file.seek(0)
        example = {"id": row["id"], "images": files, "image_widths": list(widths), "image_heights": list(heights),
                   "conversations": turns}
        serialised = features.serialize_example(features.encode_example(example))
        total += len(serialised)
        assert example_of(serialised) == example_of(next(stored))
    assert builder.info.splits["train"].num_bytes == total


def test_sizes_of_images_are_stored_and_known(data, tmp_path):
    source = open_source(run(data, tmp_path / "set"))
    for i in range(len(source)):
        sizes = [Image.open(io.BytesIO(image)).size for image in source[i].images]
        assert list(zip(source.row(i)["image_widths"], source.row(i)["image_heights"], strict=True)) == sizes
        assert not source[i].unknown


def test_open_source_reads_back_the_same_records(data, tmp_path):
    before, after = open_source(data), open_source(run(data, tmp_path / "set"))
    assert len(after) == len(before)
    for i in range(len(before)):
        old = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in before[i].images]
        assert (after[i].id, after[i].turns, list(after[i].images)) == (before[i].id, before[i].turns, old)


def test_answers_that_are_not_learned_stay_so(tmp_path):
    turns = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "purple", "weight": 0},
             {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "green", "weight": 1}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": turns}, {"messages": turns[2:]}]))
    packed = open_source(run(path, tmp_path / "set", shards=1))
    assert [turn.get("loss", True) for turn in packed[0].turns] == [True, False, True, True]
    assert [packed[i].turns for i in range(2)] == [open_source(path)[i].turns for i in range(2)]


def test_any_rows_of_any_mixture_come_back(tmp_path):
    for seed in range(1, 9):
        parts = [write_data(tmp_path / f"{seed} {k}", count=3 * k + seed, seed=seed + 10 * k) for k in range(2)]
        mixture = tmp_path / f"mixture {seed}.json"
        mixture.write_text(json.dumps({"mixture": [{"path": os.path.relpath(part, tmp_path)} for part in parts]}))
        out = run(mixture, tmp_path / f"out {seed}", shards=seed)
        assert with_tfds(out) == expected(parts[0]) + expected(parts[1])


def test_embedded_images_of_parquet(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What? {i}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
            ],
            "images": [{"bytes": encoded(i, 40, 30, "PNG"), "path": None}],
        }
        for i in range(7)
    ]
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    found = with_tfds(run(path, tmp_path / "set"))
    assert [row["images"] for row in found] == [[row["images"][0]["bytes"]] for row in rows]
    assert found == expected(path)


def test_a_packed_set_can_be_packed_again(data, tmp_path):
    first = run(data, tmp_path / "first", split="val", name="Mine")
    second = run(f"{first}:val", tmp_path / "second", shards=3)
    assert with_tfds(second) == expected(data)


def test_tfds_finds_the_set_by_name(data, tmp_path):
    run(data, tmp_path / "my mix-665k" / "2.1.0")
    run(data, tmp_path / "other" / "1.0.0", name="other")
    assert len(tfds.data_source("other", split="train", data_dir=tmp_path)) == 24
    info = tfds.builder_from_directory(tmp_path / "my mix-665k" / "2.1.0").info
    assert (info.name, str(info.version)) == ("my_mix_665k", "2.1.0")


def test_the_files_do_not_depend_on_the_workers(data, tmp_path):
    found = [contents(run(data, tmp_path / str(workers) / "set", workers=workers)) for workers in (0, 1, 3)]
    assert found[0] == found[1] == found[2]


def test_progress_without_a_terminal(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run(data, tmp_path / "set")
    lines = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(r"(\d+) of 24 rows, +[\d.]+ rows/s, [\d:]+ to go", line) for line in lines]
    assert [match and match[1] for match in found] == ["6", "12", "18", "24"]


def test_shards_have_about_the_size_asked_for(tmp_path):
    texts = [random.Random(i).randbytes(5000).hex() for i in range(100)]
    rows = [{"id": i, "conversations": [{"from": "human", "value": text}]} for i, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(path, tmp_path / "set", shards=None, shard_size="0.2MB")
    info = tfds.builder_from_directory(out).info.splits["train"]
    assert info.num_shards == 6 and set(info.shard_lengths) == {16, 17}  # 100 rows of 10.1 kB
    out = run(path, tmp_path / "many", shards=5000)
    assert tfds.builder_from_directory(out).info.splits["train"].shard_lengths == [1] * 100


class TestImages:
    def test_without_a_size_no_pixel_changes(self, data, tmp_path):
        for old, new in zip(expected(data), with_tfds(run(data, tmp_path / "set")), strict=True):
            for before, after in zip(old["images"], new["images"], strict=True):
                tiles = [ImageProcessor(56, "pad")(image_files.open_image(content)) for content in (before, after)]
                assert np.array_equal(*tiles)

    @pytest.mark.parametrize("mode", ["pad", "crop"])
    def test_png_of_what_the_model_sees_is_exact(self, mode):
        small = 0
        for seed in range(40):
            draw = random.Random(seed)
            form, kind = draw.choice([("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "L")])
            before = encoded(seed, draw.randrange(1, 300), draw.randrange(1, 300), form, kind)
            after = Encoding(56, mode, "png")(before)
            small += len(after) < len(before)
            assert len(after) <= len(before)
            tiles = [ImageProcessor(56, mode)(image_files.open_image(content)) for content in (before, after)]
            assert np.array_equal(*tiles)
        assert small > 10

    def test_jpeg_is_close_and_small_images_stay(self):
        encoding = Encoding(56, "pad", "jpeg", 95)
        for seed in range(10):
            before = encoded(seed, 200, 100 + 10 * seed)
            after = encoding(before)
            assert Image.open(io.BytesIO(after)).size == (56, 56) and len(after) < len(before)
            worse = Encoding(56, "pad", "jpeg", 60)(before)
            tiles = [ImageProcessor(56, "pad")(image_files.open_image(content)) for content in (before, after, worse)]
            close, far = (np.abs(np.subtract(tiles[0], tile, dtype=int)).mean() for tile in tiles[1:])
            assert 0 < close < 4 and far > 2 * close
        small = encoded(0, 56, 40)
        assert encoding(small) == small
        wide = encoded(0, 300, 56)
        assert Encoding(56, "crop")(wide) == wide and encoding(wide) != wide

    def test_the_summary_says_how_much_smaller(self, tmp_path, capsys):
        path = write_data(tmp_path / "data")
        out = run(path, tmp_path / "set", image_size=56)
        line = capsys.readouterr().out.splitlines()[1]
        before, after = (sum(len(image) for row in rows for image in row["images"])
                         for rows in (expected(path), with_tfds(out)))  # fmt: skip
        assert f"{before / after:.2f} times smaller (pad 56, jpeg 95)" in line and after < before

    def test_the_quick_look_finds_what_decoding_finds(self):
        good = [encoded(1, 120, 90), encoded(2, 120, 90, "PNG"), encoded(3, 61, 33, "JPEG", "L")]
        file = io.BytesIO()
        Image.open(io.BytesIO(good[0])).save(file, "JPEG", progressive=True)
        draw, bad = random.Random(0), 0
        for content in [*good, file.getvalue()]:
            check_image(content)
            for _ in range(60):
                at = draw.randrange(len(content))
                broken = content[:at] if draw.random() < 0.7 else content[:at] + draw.randbytes(20) + content[at + 20 :]
                try:
                    image_files.open_image(broken)
                except ValueError:
                    bad += 1
                    with pytest.raises(ValueError):
                        check_image(broken)
                else:
                    check_image(broken)
        assert bad > 100


BAD = {
    "missing_image": {"image": "gone.jpg", "text": "<image>"},
    "broken_image": {"image": "broken.jpg", "text": "<image>"},
    "outside_root": {"image": "../x.jpg", "text": "<image>"},
    "image_count": {"image": "", "text": "<image>"},
    "role": {"image": "", "text": "Hi", "from": "robot"},
}


@pytest.fixture
def flawed(tmp_path) -> str:
    """20 rows, of which those in `BAD` are bad, and one of every kind."""
    (tmp_path / "broken.jpg").write_bytes(encoded(0, 50, 50)[:-300])
    rows = [{"image": "", "text": f"row {i}"} for i in range(20)]
    for place, bad in enumerate(BAD.values()):
        rows[3 * place] = bad
    rows = [
        {"id": i, "image": row["image"], "conversations": [{"from": row.get("from", "human"), "value": row["text"]}]}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data.jsonl")


class TestBadRows:
    def test_all_are_counted_and_the_first_named(self, flawed, tmp_path):
        with pytest.raises(UserError, match="5 of 20 rows cannot be used") as error:
            run(flawed, tmp_path / "set")
        message = str(error.value)
        assert all(f"{reason} 1" in message for reason in BAD) and "--bad-rows skip" in message
        assert "row 1 (line 1), id 0: " in message and "gone.jpg" in message and "row 4 (line 4)" in message
        assert "dataset_info.json" not in os.listdir(tmp_path / "set") and "\n" not in message

    @pytest.mark.parametrize("shards", [4, 20])
    def test_they_are_left_out_and_counted(self, flawed, tmp_path, capsys, shards):
        out = run(flawed, tmp_path / "set", bad_rows="skip", shards=shards)  # of 20, some hold no row
        assert "left out: 5 rows (" in capsys.readouterr().out
        numbers = [i for i in range(20) if i % 3 or i > 12]
        assert [row["id"] for row in with_tfds(out)] == [str(i) for i in numbers]
        source = open_source(out)
        assert [source[i].id for i in range(len(source))] == [str(i) for i in numbers]

    def test_after_an_error_nothing_is_written_twice_to_skip_them(self, flawed, tmp_path, monkeypatch):
        with pytest.raises(ValueError):
            run(flawed, tmp_path / "set")
        whole = contents(run(flawed, tmp_path / "whole" / "set", bad_rows="skip"))
        monkeypatch.setattr(pack.ShardWriter, "__call__", stop)
        assert contents(run(flawed, tmp_path / "set", bad_rows="skip")) == whole

    def test_after_an_error_they_can_be_mended(self, tmp_path):
        path = write_data(tmp_path / "data")
        whole = contents(run(path, tmp_path / "whole" / "set"))
        images = [name for name in os.listdir(tmp_path / "data") if name.startswith("1")]
        for name in images:
            os.rename(tmp_path / "data" / name, tmp_path / name)
        with pytest.raises(UserError, match="rows cannot be used .missing_image"):
            run(path, tmp_path / "set")
        for name in images:
            os.rename(tmp_path / name, tmp_path / "data" / name)
        assert contents(run(path, tmp_path / "set")) == whole

    def test_nothing_but_bad_rows(self, tmp_path):
        row = {"image": "gone.jpg", "conversations": [{"from": "human", "value": "<image>"}]}
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match="none of its rows can be used; the first: .*gone.jpg"):
            run(tmp_path / "data.jsonl", tmp_path / "set", bad_rows="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "gs://bucket/set"}, "copy that then: gcloud storage cp -r FOLDER URL"),
        ({"quality": 0}, "--quality is 0: it must be from 1 to 100"),
        ({"image_size": 0}, "--image-size is 0: it must be at least 1"),
        ({"shards": 0}, "--shards is 0: it must be at least 1"),
        ({"workers": -1}, "--workers is -1: it must be at least 0"),
        ({"shard_size": "256"}, "--shard-size must be a size such as 256MB, not '256'"),
        ({"shard_size": "0MB"}, "--shard-size must be a size such as 256MB, not '0MB'"),
        ({"split": "train/1"}, "--split must be a word of letters, digits and _, not 'train/1'"),
        ({"name": "1a"}, "--name must be a word of letters, digits and _, not '1a'"),
    ],
)
def test_options_that_cannot_be(data, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(Pack(data=data, out=str(tmp_path / "set")), **options).run()
    assert not (tmp_path / "set").exists()


def test_a_mixture_with_counts_is_refused(data, tmp_path):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"mixture": [{"path": data, "epochs": 2}]}))
    with pytest.raises(UserError, match="takes some more or less often; write it out first"):
        run(mixture, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "set"
    options = [data, str(out), "--image-size", "56", "--image-mode", "crop", "--shard-size", "1MB", "--workers", "0"]
    assert cli.parse(Pack, options, prog="pack").run() == 0
    assert "(crop 56, jpeg 95)" in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(open_source(str(out))))[5].turns == open_source(data)[5].turns
