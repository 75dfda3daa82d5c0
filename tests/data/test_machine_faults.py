"""A disk or a memory that fails ends the work: it never makes a bad row, which training might skip."""

import errno
import json
import os

import numpy as np
import pyarrow.parquet
import pytest
from conftest import GOLDEN
from PIL import Image

from llava_jax.data.examples import DataSpec
from llava_jax.data.json_rows import JsonRows
from llava_jax.data.sources import open_mixture, open_source
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.prepare.shards import Encoding, Examples
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

FAULTS = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale file handle"), MemoryError()]


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                               {"from": "gpt", "value": "Black."}]}
    (tmp_path / "data.json").write_text(json.dumps([row, row | {"image": "none.png"}]))
    return tmp_path / "data.json"


def make_spec(path) -> DataSpec:
    return DataSpec(mixture=open_mixture(path), tokenizer=Tokenizer.load(GOLDEN / "tokenizer.model"),
                  template=TEMPLATES["vicuna_v1"], processor=ImageProcessor(28, patches=2),
                    sequence_length=100, tiles_per_sequence=1, bad_rows="skip")


def failing(fault):
    def fail(*_, **__):
        raise fault

    return fail


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["llava_jax.image_files.open", "os.stat", "PIL.Image.open", "PIL.Image.Image.load"])
def test_training_does_not_skip_it(fault, where, data, monkeypatch):
    load = make_spec(data)
    assert [type(found) for found in load("tiles", [0, 1])] == [np.ndarray, str]  # a missing image is skipped
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(fault), raising=False)
        with pytest.raises(type(fault)) as raised:
            load("tiles", [0])
    assert raised.value is fault


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("size", [None, 8])
def test_pack_does_not_skip_it(fault, size, data, monkeypatch):
    examples = Examples(open_mixture(data), Encoding(size))
    examples.load(0)
    for where in ("llava_jax.image_files.open", "PIL.Image.open", "PIL.Image.Image.load"):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing(fault), raising=False)
            with pytest.raises(type(fault)) as raised:
                examples.load(0)
        assert raised.value is fault


def test_a_mistake_in_encoding_is_no_bad_row(data, monkeypatch):
    monkeypatch.setattr("llava_jax.data.examples.encode_conversation", failing(ValueError("a fault of this code")))
    with pytest.raises(ValueError, match="a fault of this code") as raised:
        make_spec(data)("texts", [0])
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_data_files(fault, data, monkeypatch):
    for where in ("builtins.open", "os.stat"):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing(fault))
            with pytest.raises(type(fault)) as raised:
                open_mixture(data)
        assert raised.value is fault


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_parquet(fault, tmp_path, monkeypatch):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Black."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": turns}] * 4), tmp_path / "a.parquet",
                                row_group_size=1)
    source = open_source(tmp_path / "a.parquet")
    for where, act in (("pyarrow.parquet.ParquetFile", lambda: source[0]),
                       ("pyarrow.parquet.read_metadata", lambda: open_source(tmp_path / "a.parquet"))):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing(fault))
            with pytest.raises(type(fault)) as raised:
                act()
        assert raised.value is fault
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetFile", failing(pyarrow.ArrowMemoryError("malloc failed")))
        with pytest.raises(MemoryError):
            source[1]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_shards_of_tfds(code, data, tmp_path, monkeypatch):
    module = pytest.importorskip("array_record.python.array_record_module")
    from llava_jax.prepare.pack import Pack

    assert Pack(data=str(data), out=str(tmp_path / "set"), workers=0, bad_rows="skip").run() == 0
    monkeypatch.setattr(module, "ArrayRecordReader", failing(RuntimeError(f"UNKNOWN: {os.strerror(code)}; reading x")))
    with pytest.raises(OSError) as raised:
        open_source(tmp_path / "set")[0]
    assert raised.value.errno == code and "array_record" in raised.value.filename


def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.json_rows.MIN_INDEXED_BYTES", 0)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"conversations": f"row {i}"}) + "\n" for i in range(50)))
    expected = [JsonRows(str(path))[i] for i in range(50)]
    cache = tmp_path / ".data.jsonl.index.npy"
    whole = cache.read_bytes()
    for place in range(0, len(whole), 13):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            cache.write_bytes(damaged)
            rows = JsonRows(str(path))
            assert len(rows) == 50 and [rows[i] for i in range(50)] == expected, place
    for stop in range(0, len(whole), 57):
        cache.write_bytes(whole[:stop])
        assert [JsonRows(str(path))[i] for i in (0, 49)] == [expected[0], expected[49]]
