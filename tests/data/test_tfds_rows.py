"""Data sets that TFDS itself wrote, read without it; and damaged ones, every one of which gives one clear line."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from llava_jax import files
from llava_jax.data.records import BadRow
from llava_jax.data.sources import open_source
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError


def picture(number: int, form: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def row(number: int) -> dict:
    """A row as `TfdsRows` should give it."""
    marks = "<image>" * (number % 3)
    turns = [("human", f"{marks} 😀"), ("gpt", "ä")] * number if number % 3 == 0 else [("human", marks), ("gpt", "ä")]
    return {
        "id": f"näme {number} 日本",
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "images": [picture(10 * number + i, ("JPEG", "PNG")[i % 2]) for i in range(number % 3)],
        "nested": {"good": number % 2 == 0, "score": number / 4, "tags": ["a\nb"] * number},
        "label": ("cat", "dog")[number % 2],
        "image": picture(number, "PNG") if number % 4 else None,
        "raw": picture(number, "PNG"),
        "plain": "text",
        "count": -number,
        "box": (0.25, 0.0, 0.5, 1.0),
        "boxes": [(0.0, 0.125 * i, 0.5, 1.0) for i in range(number % 3)],
    }


class Chat(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    code_path = None  # looking for it needs a package that TFDS does not ask for

    def _info(self):
        of = tfds.features
        features = {
            "id": of.Text(),
            "conversations": of.Sequence({"from": of.ClassLabel(names=["human", "gpt"]), "value": of.Text()}),
            "images": of.Sequence(of.Image()),
            "nested": {"good": np.bool_, "score": np.float32, "tags": of.Sequence(of.Text())},
            "label": of.ClassLabel(names=["cat", "dog"]),
            "image": of.Image(),
            "raw": of.Tensor(shape=(), dtype=np.object_),
            "plain": of.Tensor(shape=(), dtype=np.str_),
            "count": np.int64,
            "box": of.BBoxFeature(),
            "boxes": of.Sequence(of.BBoxFeature()),
            "pixels": of.BBoxFeature(bbox_format="XYWH"),
            "array": of.Tensor(shape=(2, 2), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=of.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(range(7)), "test": self._generate_examples(range(7, 9))}

    def _generate_examples(self, numbers):
        for number in numbers:
            files = {"images": [io.BytesIO(image) for image in row(number)["images"]]}
            files["image"] = io.BytesIO(row(number)["image"] or b"")
            others = {name: tfds.features.BBox(*row(number)["box"]) for name in ("box", "pixels")}
            others["boxes"] = [tfds.features.BBox(*box) for box in row(number)["boxes"]]
            yield number, row(number) | files | others | {"array": np.zeros((2, 2), np.float32)}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    Chat(data_dir=folder, file_format="array_record").download_and_prepare()
    return os.path.join(folder, "chat", "1.2.0")


@pytest.fixture
def copied(written, tmp_path) -> str:
    return shutil.copytree(written, f"{tmp_path}/copy")


def edit(folder, name, change):
    path = os.path.join(folder, name)
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


def write_shard(folder, records):
    """Puts other records in the place of the split train."""
    writer = array_record_module.ArrayRecordWriter(TfdsRows(folder).files[0], "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    edit(folder, "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=[str(len(records))]))


def test_rows_are_what_tfds_was_given(written):
    rows = TfdsRows(written)
    assert len(rows) == 7 and rows.split == "train"
    assert [rows[i] for i in range(7)] == [row(i) for i in range(7)]
    assert all(type(image) is bytes for image in rows[2]["images"])
    assert rows.where(6) == f"{written}, split train, row 7"
    for index in (7, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_open_source_reads_them_as_records(copied):
    edit(copied, "features.json", lambda features: features["featuresDict"]["features"].pop("image"))
    record = open_source(copied)[2]
    assert record.images == tuple(row(2)["images"])
    assert record.turns == tuple(row(2)["conversations"])


@pytest.mark.parametrize("up", ["", "/.."])
def test_splits_and_folders(written, up):
    assert [TfdsRows(f"{written}{up}:test")[i] for i in range(2)] == [row(7), row(8)]
    with pytest.raises(UserError, match=r"no split val; there are: train, test"):
        TfdsRows(f"{written}{up}:val")


def test_the_default_split(copied):
    def rename(info):
        info["splits"][0]["name"] = "other"

    edit(copied, "dataset_info.json", rename)
    with pytest.raises(UserError, match="choose a split as FOLDER:SPLIT; there are: other, test"):
        TfdsRows(copied)
    edit(copied, "dataset_info.json", lambda info: info["splits"].pop(0))
    assert len(TfdsRows(copied)) == 2


def test_a_folder_of_several_versions_or_of_none(copied, tmp_path):
    shutil.copytree(copied, tmp_path / "again")
    with pytest.raises(UserError, match="several data sets or versions, choose one: again, copy"):
        TfdsRows(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no TFDS data set, there is no dataset_info.json"):
        TfdsRows(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        TfdsRows(str(tmp_path / "nowhere"))


def test_pickled_it_is_small_and_reads_in_a_process_without_heavy_imports(written):
    rows = TfdsRows(written)
    rows[0]
    sent = pickle.dumps(rows)
    assert len(sent) < 2000
    code = (
        "import pickle, sys; rows = pickle.loads(sys.stdin.buffer.read()); value = rows[3]; "
        "assert not {'tensorflow', 'jax', 'grain'} & set(sys.modules); "
        "sys.stdout.buffer.write(pickle.dumps(value))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert pickle.loads(done.stdout) == row(3)


def test_sequences_of_sequences_as_tfds_reads_them(copied):
    # TFDS needs TensorFlow to write these, so the record is put together here; TFDS reads it without.
    features = tfds.features.FeaturesDict(
        {
            "messages": tfds.features.Sequence(
                {
                    "role": tfds.features.Text(),
                    "content": tfds.features.Sequence({"type": tfds.features.Text(), "text": tfds.features.Text()}),
                }
            ),
            "deep": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Sequence(np.int64))),
        }
    )
    example = tf_example_pb2.Example()
    for name, values in {
        "messages/role": [b"user", b"assistant", b"user"],
        "messages/content/type/ragged_flat_values": [b"image", b"text", b"text"],
        "messages/content/text/ragged_flat_values": [b"", b"What?", b"That."],
        "deep/ragged_flat_values": [1, 2, 3],
        "messages/content/type/ragged_row_lengths_0": [2, 1, 0],
        "messages/content/text/ragged_row_lengths_0": [2, 1, 0],
        "deep/ragged_row_lengths_0": [2, 0, 1],
        "deep/ragged_row_lengths_1": [1, 2, 0],
    }.items():
        kind = "int64_list" if isinstance(values[0], int) else "bytes_list"
        getattr(example.features.feature[name], kind).value.extend(values)
    content = example.SerializeToString()
    features.save_config(copied)
    write_shard(copied, [content])

    read = TfdsRows(copied)[0]
    assert read["messages"] == [
        {"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        {"role": "user", "content": []},
    ]
    assert read["deep"] == [[[1], [2, 3]], [], [[]]]
    by_tfds = features.deserialize_example_np(content)
    assert [[list(inner) for inner in outer] for outer in by_tfds["deep"]] == read["deep"]
    texts = [[text.decode() for text in inner] for inner in by_tfds["messages"]["content"]["text"]]
    assert texts == [[part["text"] for part in message["content"]] for message in read["messages"]]


@pytest.mark.parametrize("template", ["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "{SPLIT}-{SHARD_INDEX}",
                                      "shards/{DATASET}-{NUM_SHARDS}.{SHARD_INDEX}"])
def test_names_of_shards_follow_the_template(copied, template):
    edit(copied, "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    before, fields = f"{copied}/chat-train.array_record-00000-of-00001", {"DATASET": "chat", "SPLIT": "train"}
    fields |= {"FILEFORMAT": "array_record", "NUM_SHARDS": "00001", "SHARD_INDEX": "00000"}
    after = f"{copied}/{template.format(**fields, SHARD_X_OF_Y='00000-of-00001')}"
    os.makedirs(os.path.dirname(after), exist_ok=True)
    os.rename(before, after)
    assert TfdsRows(copied)[3] == row(3)


@pytest.mark.parametrize("template", ["../copy/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "/etc/{SPLIT}",
                                      "a/../../{SPLIT}", "gs://bucket/{SPLIT}", "..", "a//{SPLIT}", "..\\\\{SPLIT}"])
def test_no_file_outside_the_folder_is_read(copied, template):
    edit(copied, "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(UserError, match="its metadata name a file outside of the folder"):
        TfdsRows(copied)


@pytest.mark.parametrize("key", ["name", "split", "feature"])
def test_no_name_leads_outside(copied, key):
    def rename(content):
        if key == "feature":
            features = content["featuresDict"]["features"]
            features["/../../label"] = features.pop("label")
        elif key == "name":
            content["name"] = "../chat"
        else:
            content["splits"][0]["name"] = "/tmp/x"

    edit(copied, "features.json" if key == "feature" else "dataset_info.json", rename)
    if key != "feature":
        edit(copied, "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate="{DATASET}/{SPLIT}"))
    with pytest.raises(UserError, match="its metadata name a file outside of the folder"):
        TfdsRows(copied)


@pytest.mark.parametrize("length", [float("inf"), float("-inf"), float("nan"), -1, 2**60, "x", None, [1]])
def test_a_length_that_is_none_is_told(copied, length):
    edit(copied, "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=[length]))
    with pytest.raises(UserError, match="not what TFDS writes"):
        TfdsRows(copied)


@pytest.mark.parametrize("template", ["{DATASET:>9999999999}", "{DATASET.__class__}", "{0}", "{", 7, ["x"]])
def test_a_template_is_no_program(copied, template):
    edit(copied, "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(UserError, match="shard of split train is missing|not what TFDS writes"):
        TfdsRows(copied)


@pytest.mark.parametrize("kind, spec", [("video", {"video": {"shape": {}}}), ("audio", {"audio": {"dtype": "int64"}}),
                                        ("video", {"pythonClassName": "tfds.features.video_feature.Video"})])
def test_videos_and_audio_are_refused_by_name(copied, kind, spec):
    def add(content):
        content["featuresDict"]["features"]["clip"] = {"sequence": {"feature": spec}, "pythonClassName": "x"}

    edit(copied, "features.json", add)
    with pytest.raises(UserError, match=f"feature clip is {kind}; only texts and images can be trained on"):
        TfdsRows(copied)


def test_features_that_are_skipped_are_named(copied):
    assert TfdsRows(copied).skipped == ["array", "pixels"]
    edit(copied, "features.json", lambda features: features["featuresDict"]["features"].pop("image"))
    assert {"array", "pixels", "nested"} <= {*open_source(copied)[1].unknown}


def test_other_file_formats_say_how_to_write_them_anew(copied):
    edit(copied, "dataset_info.json", lambda info: info.update(fileFormat="riegeli"))
    with pytest.raises(UserError, match="is stored as riegeli; write it anew as ArrayRecord, with tfds.builder"):
        TfdsRows(copied)
    edit(copied, "dataset_info.json", lambda info: info.pop("fileFormat"))  # as TFDS wrote tfrecord for long
    with pytest.raises(UserError, match="is stored as tfrecord"):
        TfdsRows(copied)
    edit(copied, "dataset_info.json", lambda info: info.update(alternativeFileFormats=["array_record"]))
    assert TfdsRows(copied)[1] == row(1)


def test_damaged_shards(copied):
    (shard,) = TfdsRows(copied).files
    with open(shard, "rb") as file:
        good = file.read()
    middle = good.index(row(3)["id"].encode()) + 2
    with open(shard, "wb") as file:
        file.write(good[:middle] + bytes(8) + good[middle + 8 :])
    rows = TfdsRows(copied)
    with pytest.raises(BadRow, match=r"split train, row 4: cannot be read \(Corrupted") as error:
        rows[3]
    assert error.value.reason == "malformed"
    assert rows[2] == row(2) and rows[4] == row(4)
    with open(shard, "wb") as file:
        file.write(good[: len(good) // 2])
    with pytest.raises(UserError, match="has 0 rows, but dataset_info.json says 7; it is truncated") as error:
        TfdsRows(copied)[0]
    assert not isinstance(error.value, BadRow)  # such a shard is no row to skip
    os.unlink(shard)
    with pytest.raises(UserError, match="this shard of split train is missing"):
        TfdsRows(copied)


def test_rows_of_other_types_than_features_json_says(copied):
    def swap(features):
        inner = features["featuresDict"]["features"]
        inner["id"], inner["count"] = inner["count"], inner["id"]

    edit(copied, "features.json", swap)
    with pytest.raises(BadRow, match="row 1: not what features.json says"):
        TfdsRows(copied)[0]


def test_reading_that_fails_is_no_bad_row(written, monkeypatch):
    rows = TfdsRows(written)

    class Unreachable:
        def read(self, _):
            raise RuntimeError("UNAVAILABLE: connection reset")

    monkeypatch.setattr(rows, "_readers", {0: Unreachable()})
    with pytest.raises(OSError, match="row 1: cannot be read .UNAVAILABLE") as error:
        rows[0]
    assert not isinstance(error.value, ValueError)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_mutated_metadata_give_rows_or_one_line(copied, name):
    path, draw = os.path.join(copied, name), random.Random(0)
    with open(path, "rb") as file:
        good = file.read()
    outcomes = set()
    for _ in range(200):
        broken = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            at, stop = sorted(draw.choices(range(len(broken)), k=2))
            stop = min(stop, at + 30)
            broken[at:stop] = draw.choice([b"", b"null", b"7", b"[]", b'"x"', b"-1", broken[at:stop] * 2, b"\xff"])
        with open(path, "wb") as file:
            file.write(broken)
        try:
            rows = TfdsRows(copied)
            rows[0]
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error) and copied in str(error), error
            outcomes.add(type(error).__name__)
    assert {"read", "UserError"} <= outcomes


def test_mutated_records_give_rows_or_bad_rows(copied):
    reader, draw, records = array_record_module.ArrayRecordReader(TfdsRows(copied).files[0]), random.Random(0), []
    for number in range(2000):
        (record,) = reader.read([number % 7])
        broken = bytearray(record)
        # Not within the pictures, where nothing is looked at.
        places = [at for at in range(len(broken)) if broken[at : at + 1].isalpha() or at < 40] + [len(broken) - 1]
        for _ in range(draw.randrange(1, 4)):
            at = draw.choice(places)
            broken[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        records.append(bytes(broken))
    write_shard(copied, records)
    rows, read = TfdsRows(copied), 0
    for i in range(len(rows)):
        try:
            assert set(rows[i]) == set(row(0))
            read += 1
        except BadRow as bad:
            assert f"row {i + 1}: not what features.json says" in str(bad) and "\n" not in str(bad)
    assert 200 < read < 1800


def test_a_bucket_is_read_through_the_same_code(written, monkeypatch):
    # No bucket can be reached from a test: local files stand in for it, behind the two calls that know of gs://.
    def local(path):
        return str(path).replace("gs://bucket", os.path.dirname(written))

    reader, open_path = array_record_module.ArrayRecordReader, files.to_path
    opened = []

    def read(path, *options, **more):
        opened.append(path)
        return reader(local(path), *options, **more)

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", read)
    monkeypatch.setattr(files, "to_path", lambda path: open_path(local(path)))
    assert open_source("gs://bucket:test").row(1) == row(8)
    assert opened == ["gs://bucket/1.2.0/chat-test.array_record-00000-of-00001"]


def test_a_bucket_needs_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="gs://bucket/set: reading .* needs one more package: pip install gcsfs"):
        TfdsRows("gs://bucket/set")
