"""Packed sets are read back with TFDS and compared with what went in; packs are killed, starved and raced."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.example_parser import ExampleParserNp

from llava_jax import cli, images
from llava_jax.data.parallel import Pool
from llava_jax.data.sources import open_source
from llava_jax.preparation import pack
from llava_jax.preparation.pack import Pack
from llava_jax.preparation.shards import Encoding, _check_image

TEXTS = ["plain", "naïve café", "日本語 😀", "a\nb\t", "", "x" * 5000]


def encoded(seed: int, width: int, height: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 4), np.uint8)
    file, image = io.BytesIO(), Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(file, form)
    return file.getvalue()


def write_data(folder, count: int = 24, seed: int = 0) -> str:
    """A JSON file of rows with none to three images of several formats, sizes and modes."""
    draw, rows = random.Random(seed), []
    os.makedirs(folder, exist_ok=True)
    for number in range(count):
        names = []
        for k in range(draw.choice([0, 1, 1, 1, 2, 3])):
            form, mode = draw.choice([("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "P")])
            names.append(f"{number}_{k}.{form.lower()}")
            content = encoded(number, draw.randrange(1, 200), draw.randrange(1, 200), form, mode)
            Path(folder, names[-1]).write_bytes(content)
        roles = ("human", "gpt") * draw.randrange(1, 4)
        turns = [{"from": role, "value": draw.choice(TEXTS)} for role in roles]
        for _ in names:
            turns[draw.randrange(len(turns))]["value"] += "\n<image>"
        if draw.random() < 0.2:
            turns.insert(0, {"from": "system", "value": draw.choice(TEXTS)})
        row = {"id": draw.choice([number, f"näme {number}"]), "conversations": turns}
        rows.append(row | ({"image": names[0] if len(names) == 1 else names} if names else {}))
    path = os.path.join(folder, "data.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def run(data, out, **options) -> str:
    assert Pack(data=str(data), out=str(out), **{"workers": 0, "shards": 4} | options).run() == 0
    return str(out)


def contents(folder) -> dict[str, str]:
    files = [os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(file, folder): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def with_tfds(out, split="train") -> list[dict]:
    """The rows as TFDS reads them, images not decoded."""
    builder, rows = tfds.builder_from_directory(out), []
    parser = ExampleParserNp(builder.info.features.get_serialized_info())
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for row in map(parser.parse_example, builder.as_data_source(split, deserialize_method=raw)):
        turns = zip(row["conversations"]["from"], row["conversations"]["value"], strict=True)
        turns = [{"from": role.decode(), "value": text.decode()} for role, text in turns]
        rows.append({"id": row["id"].decode(), "images": list(row["images"]), "turns": turns})
    return rows


def expected(data) -> list[dict]:
    source = open_source(data)
    records = [source[i] for i in range(len(source))]
    return [
        {
            "id": record.id,
            "images": [image if isinstance(image, bytes) else Path(image).read_bytes() for image in record.images],
            "turns": list(record.turns),
        }
        for record in records
    ]


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
    # TFDS serialises the same rows: their lengths and the types in features.json are those of the pack.
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
        }
    )
    out = run(data, tmp_path / "set")
    builder = tfds.builder_from_directory(out)
    assert features.to_json() == builder.info.features.to_json()
    total = 0
    for row in expected(data):
        files = [io.BytesIO(image) for image in row["images"]]
        example = {"id": row["id"], "images": files, "conversations": row["turns"]}
        total += len(features.serialize_example(features.encode_example(example)))
    assert builder.info.splits["train"].num_bytes == total


def test_open_source_reads_back_the_same_records(data, tmp_path):
    before, after = open_source(data), open_source(run(data, tmp_path / "set"))
    assert len(after) == len(before)
    for i in range(len(before)):
        old = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in before[i].images]
        assert (after[i].id, after[i].turns, list(after[i].images)) == (before[i].id, before[i].turns, old)


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
                tiles = [images.prepare(images.open_image(content), 56, "pad") for content in (before, after)]
                assert np.array_equal(*tiles)

    @pytest.mark.parametrize("mode", ["pad", "square"])
    def test_png_of_what_the_model_sees_is_exact(self, mode):
        small = 0
        for seed in range(40):
            draw = random.Random(seed)
            form, kind = draw.choice([("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "L")])
            before = encoded(seed, draw.randrange(1, 300), draw.randrange(1, 300), form, kind)
            after = Encoding(56, mode, "png")(before)
            small += len(after) < len(before)
            assert len(after) <= len(before)
            tiles = [images.prepare(images.open_image(content), 56, mode) for content in (before, after)]
            assert np.array_equal(*tiles)
        assert small > 10

    def test_jpeg_is_close_and_small_images_stay(self):
        encoding = Encoding(56, "pad", "jpeg", 95)
        for seed in range(10):
            before = encoded(seed, 200, 100 + 10 * seed)
            after = encoding(before)
            assert Image.open(io.BytesIO(after)).size == (56, 56) and len(after) < len(before)
            worse = Encoding(56, "pad", "jpeg", 60)(before)
            tiles = [images.prepare(images.open_image(content), 56, "pad") for content in (before, after, worse)]
            close, far = (np.abs(np.subtract(tiles[0], tile, dtype=int)).mean() for tile in tiles[1:])
            assert 0 < close < 4 and far > 2 * close
        small = encoded(0, 56, 40)
        assert encoding(small) == small
        wide = encoded(0, 300, 56)
        assert Encoding(56, "square")(wide) == wide and encoding(wide) != wide

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
            _check_image(content)
            for _ in range(60):
                at = draw.randrange(len(content))
                broken = content[:at] if draw.random() < 0.7 else content[:at] + draw.randbytes(20) + content[at + 20 :]
                try:
                    images.open_image(broken)
                except ValueError:
                    bad += 1
                    with pytest.raises(ValueError):
                        _check_image(broken)
                else:
                    _check_image(broken)
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
        with pytest.raises(ValueError, match="5 of 20 rows cannot be used") as error:
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

    def test_after_an_error_they_can_be_mended(self, data, tmp_path):
        path, whole = write_data(tmp_path / "data"), contents(run(data, tmp_path / "whole" / "set"))
        images = [name for name in os.listdir(tmp_path / "data") if name.startswith("1")]
        for name in images:
            os.rename(tmp_path / "data" / name, tmp_path / name)
        with pytest.raises(ValueError, match="rows cannot be used .missing_image"):
            run(path, tmp_path / "set")
        for name in images:
            os.rename(tmp_path / name, tmp_path / "data" / name)
        assert contents(run(path, tmp_path / "set")) == whole

    def test_nothing_but_bad_rows(self, tmp_path):
        row = {"image": "gone.jpg", "conversations": [{"from": "human", "value": "<image>"}]}
        (tmp_path / "data.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match="none of its rows can be used; the first: .*gone.jpg"):
            run(tmp_path / "data.jsonl", tmp_path / "set", bad_rows="skip")


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


# Kills itself at the N-th event: a row read, or a file given its name (before and after that).
KILLED = """
import os, signal, sys
from llava_jax.preparation import shards
from llava_jax.preparation.pack import Pack
left = int(sys.argv[3])
def event():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
load, replace = shards.Examples.load, os.replace
def loads(*args):
    event()
    return load(*args)
def replaces(*args):
    event()
    replace(*args)
    event()
shards.Examples.load, os.replace = loads, replaces
Pack(data=sys.argv[1], out=sys.argv[2], shards=4, workers=0).run()
"""


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(data, tmp_path):
    whole, out = contents(run(data, tmp_path / "whole" / "set")), tmp_path / "killed" / "set"
    # Each goes on from where the one before was killed: before and after the plan got its name; in the first shard;
    # before and after that and its note got theirs; in the third shard; before features.json got its name, and after;
    # before dataset_info.json got its.
    for left in (0, 1, 4, 6, 7, 8, 9, 15, 20, 1, 2):
        killed = subprocess.run([sys.executable, "-c", KILLED, data, out, str(left)], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.raises(ValueError, match="a pack into it has begun but not ended"):
            open_source(str(out))
        with pytest.raises(Exception, match="Could not read dataset info"):
            tfds.builder_from_directory(out)
    assert {"features.json", ".pack/00003.json", "dataset_info.json.part"} < set(contents(out))
    run(data, out)
    assert contents(out) == whole


def test_finished_shards_are_kept(data, tmp_path, monkeypatch):
    out, write, called = tmp_path / "set", pack.ShardWriter.__call__, []

    def write_two(self, shard):
        return write(self, shard) if shard < 2 else stop()

    def write_and_say(self, shard):
        called.append(shard)
        assert not os.path.exists(out / ".pack" / "00002.json-1")
        return write(self, shard)

    monkeypatch.setattr(pack.ShardWriter, "__call__", write_two)
    with pytest.raises(Stopped):
        run(data, out)
    shards = [f"set-train.array_record-0000{k}-of-00004" for k in range(4)]
    assert sorted(os.listdir(out)) == [".pack", *shards[:2]]
    os.truncate(out / shards[1], 100)  # is not what its note says
    (out / ".pack" / "00002.json-1").write_bytes(b"part of a shard")
    monkeypatch.setattr(pack.ShardWriter, "__call__", write_and_say)
    run(data, out)
    assert called == [1, 2, 3]
    assert contents(out) == contents(run(data, tmp_path / "whole" / "set"))


@pytest.fixture
def begun(data, tmp_path, monkeypatch) -> Path:
    """A folder with part of a pack."""
    with monkeypatch.context() as patch:
        patch.setattr(Pack, "_finish", stop)
        with pytest.raises(Stopped):
            run(data, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 5}, "other shards: 4 before, 5 now"),
        ({"image_size": 56}, "other images: as in the files before, size 56 mode pad format jpeg quality 95 now"),
        ({"split": "val"}, "other name: set 1.0.0 train before, set 1.0.0 val now"),
        ({"image_root": "/"}, "other data or image root; give the same to go on, another folder, or --overwrite"),
    ],
)
def test_another_pack_is_not_mixed_with_the_one_that_was_begun(data, begun, options, message):
    with pytest.raises(ValueError, match=message):
        run(data, begun, **options)
    changed = options if "image_root" not in options else {"bad_rows": "skip"}
    run(data, begun, overwrite=True, **changed)
    assert len(with_tfds(begun, options.get("split", "train"))) == 24
    assert not any(name.endswith("-of-00004") for name in os.listdir(begun)) or "shards" not in options


def test_data_that_has_changed_since_is_not_mixed_in(begun, tmp_path):
    path = write_data(tmp_path / "data")
    run(path, tmp_path / "other")
    with pytest.raises(ValueError, match="other data"):
        run(path, begun)


def test_a_finished_set_is_not_overwritten_unasked(data, tmp_path):
    out = run(data, tmp_path / "set")
    before = contents(out)
    with pytest.raises(ValueError, match="holds a data set already; give another folder, or --overwrite"):
        run(data, out)
    assert contents(out) == before
    run(data, out, overwrite=True, shards=2)
    assert len(with_tfds(out)) == 24 and len(contents(out)) == 4


def test_a_folder_of_other_things_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things .thesis.tex.; give an empty folder or a new one"):
        run(data, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="thesis.tex: is a file; give a folder"):
        run(data, tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


# Says that it has begun, and goes on when it is told to.
HELD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have a test in the background ignore it
from llava_jax.preparation import shards
from llava_jax.preparation.pack import Pack
load = shards.Examples.load
def loads(*args):
    shards.Examples.load = load
    print("begun", flush=True)
    sys.stdin.readline()
    return load(*args)
shards.Examples.load = loads
Pack(data=sys.argv[1], out=sys.argv[2], shards=4, workers=0).run()
"""


def test_two_packs_into_one_folder(data, tmp_path):
    out = tmp_path / "one" / "set"
    command = [sys.executable, "-c", HELD, data, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "begun\n"
        for options in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another pack is writing to this folder; wait for it"):
                run(data, out, **options)
        first.communicate("go on\n")
    assert first.returncode == 0
    assert contents(out) == contents(run(data, tmp_path / "two" / "set"))


def test_ctrl_c_stops_at_once(data, tmp_path):
    command = [sys.executable, "-c", HELD, data, str(tmp_path / "set")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as held:
        assert held.stdout.readline() == b"begun\n"
        held.send_signal(signal.SIGINT)
        assert held.wait(20) == 130  # though its row is still held
        assert held.stderr.read().strip() == b"stopped; the same command goes on from here"
    assert len(with_tfds(run(data, tmp_path / "set"))) == 24


def test_a_set_is_not_packed_onto_itself(data, tmp_path):
    out = run(data, tmp_path / "set")
    before = contents(out)
    with pytest.raises(ValueError, match="lies in this folder; give another one"):
        run(out, out, overwrite=True)
    assert contents(out) == before


class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path):
        """A file system of its own, of 1 MB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    @pytest.fixture
    def large(self, tmp_path) -> str:
        (tmp_path / "large").mkdir()
        for i in range(16):
            (tmp_path / "large" / f"{i}.png").write_bytes(encoded(i, 300, 250, "PNG"))
        rows = [{"image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>"}]} for i in range(16)]
        (tmp_path / "large" / "data.json").write_text(json.dumps(rows))
        return str(tmp_path / "large" / "data.json")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_full_disk(self, disk, large, tmp_path, workers):
        out = disk / "set"
        with pytest.raises(OSError, match="set: the disk is full; make room; . shards are finished, and the") as error:
            run(large, out, workers=workers)
        done = int(re.search(r"(\d+) shards", str(error.value))[1])
        assert 0 < done < 4 and "\n" not in str(error.value)
        assert sum(name.startswith("set-train") for name in os.listdir(out)) == done
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        run(large, out, workers=workers)
        assert contents(out) == contents(run(large, tmp_path / "whole" / "set"))

    def test_a_disk_that_is_full_from_the_start(self, disk, large):
        (disk / "other").write_bytes(bytes(1 << 20)[: 252 * 4096])
        with pytest.raises(OSError, match="the disk is full; make room; 0 shards are finished"):
            run(large, disk / "set")
        os.unlink(disk / "other")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert len(with_tfds(run(large, disk / "set"))) == 16

    def test_files_that_may_not_grow(self, large, tmp_path):
        code = (
            "import resource, sys; from llava_jax import cli; from llava_jax.preparation.pack import Pack; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "cli.run(lambda args: Pack(data=args[0], out=args[1], workers=0).run())"
        )
        command = [sys.executable, "-c", code, large, str(tmp_path / "set")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
        assert "0 shards are finished, and the same command goes on from there" in done.stderr

    def test_a_worker_that_dies(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(pack, "Pool", lambda write, workers: Pool(Dies(), 1))
        with pytest.raises(OSError, match="a worker process died .*; 0 shards are finished, and the same command"):
            run(data, tmp_path / "set")


class Dies:
    """What a worker does that the system kills. (Found by the worker under the name of this file.)"""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "gs://bucket/set"}, "copy that then: gcloud storage cp -r FOLDER URL"),
        ({"quality": 0}, "--quality must be from 1 to 100, not 0"),
        ({"image_size": 0}, "--image-size must be at least 1, not 0"),
        ({"shards": 0}, "--shards must be at least 1, not 0"),
        ({"workers": -1}, "--workers must be at least 0, not -1"),
        ({"shard_size": "256"}, "--shard-size must be a size such as 256MB, not '256'"),
        ({"shard_size": "0MB"}, "--shard-size must be a size such as 256MB, not '0MB'"),
        ({"split": "train/1"}, "--split must be a word of letters, digits and _, not 'train/1'"),
        ({"name": "1a"}, "--name must be a word of letters, digits and _, not '1a'"),
    ],
)
def test_options_that_cannot_be(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(Pack(data=data, out=str(tmp_path / "set")), **options).run()
    assert not (tmp_path / "set").exists()


def test_a_mixture_with_counts_is_refused(data, tmp_path):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"mixture": [{"path": data, "epochs": 2}]}))
    with pytest.raises(ValueError, match="takes some more or less often; write it out first"):
        run(mixture, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "set"
    options = [data, str(out), "--image-size", "56", "--image_mode", "square", "--shard-size", "1MB", "--workers", "0"]
    assert cli.parse(Pack, options, prog="pack").run() == 0
    assert "(square 56, jpeg 95)" in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(open_source(str(out))))[5].turns == open_source(data)[5].turns
