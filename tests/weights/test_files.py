"""Safetensors files against the safetensors library; broken files; directories that appear whole."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from llava_jax.errors import UserError
from llava_jax.weights import files

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_writes(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 4, 5).to(dtype), "b.weight": torch.randn(7).to(dtype), "empty": torch.zeros(0, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    found = files.find(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].read().astype(np.float32), tensor.float().numpy())
    assert found["a"].read(layer=1).shape == (4, 5)
    np.testing.assert_array_equal(found["a"].read(layer=1).astype(np.float32), tensors["a"][1].float().numpy())


@pytest.mark.parametrize("shard_bytes, count", [(10**9, 1), (2000, 3), (1, 4)])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes, count):
    arrays = {
        "stacked": RNG.normal(size=(3, 5, 7)).astype(np.float32),
        "turned": RNG.normal(size=(40, 30)).astype(np.float32).T,
        "vector": RNG.normal(size=11).astype(np.float16),
        "bf16": RNG.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
    }
    entries = [
        files.Entry(name, x.dtype, x.shape, lambda name=name, x=x: x if name == "stacked" else [x[:1], x[1:]])
        for name, x in arrays.items()
    ]
    files.write(tmp_path, entries, shard_bytes)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == count
    found = {}
    for file in written:
        found |= safetensors.numpy.load_file(file)
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    assert files.find(tmp_path).keys() == arrays.keys()
    if count > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
        assert all(name in safetensors.numpy.load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_a_dtype_may_change_on_the_way(tmp_path):
    x = RNG.normal(size=(300, 70)).astype(np.float32)
    files.write(tmp_path, [files.Entry("x", np.dtype(ml_dtypes.bfloat16), x.shape, lambda: [x])], 10**9)
    np.testing.assert_array_equal(files.find(tmp_path)["x"].read(), x.astype(ml_dtypes.bfloat16))


def test_large_blocks_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 64)
    x = RNG.normal(size=(33, 9)).astype(np.float32)
    files.write(tmp_path, [files.Entry("x", x.dtype, (9, 33), lambda: [x.T])], 10**9)
    np.testing.assert_array_equal(files.find(tmp_path)["x"].read(), x.T)


@pytest.fixture
def sharded(tmp_path):
    entries = [files.Entry(name, np.dtype(np.float32), (4, 4), lambda: [np.ones((4, 4), np.float32)]) for name in "ab"]
    files.write(tmp_path, entries, 64)
    return tmp_path


def first(directory):
    return directory / "model-00001-of-00002.safetensors"


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("spoil, message", [
    (lambda d: first(d).unlink(), "00001-of-00002.safetensors is missing, which .*index.json names"),
    (lambda d: cut(first(d), -5), "00001-of-00002.safetensors: truncated: .* bytes; download it again"),
    (lambda d: cut(first(d), 40), "00001-of-00002.safetensors: truncated or not a safetensors file"),
    (lambda d: cut(first(d), 0), "00001-of-00002.safetensors: truncated or not a safetensors file"),
    (lambda d: first(d).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
     "truncated or not a safetensors file"),
    (lambda d: first(d).write_bytes((2).to_bytes(8, "little") + b"[]" + bytes(64)), "not a safetensors file"),
    (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map"'), "index.json: not JSON"),
    (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
    (lambda d: (d / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"c": "model-00001-of-00002.safetensors"}})),
     "00001-of-00002.safetensors lacks the tensor c"),
    (lambda d: (d / "model.safetensors.index.json").unlink(), "model.safetensors: no such file"),
])
def test_broken_files_are_one_clear_line(sharded, spoil, message):
    spoil(sharded)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        files.find(sharded)
    assert "\n" not in str(error.value)


def test_torch_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(UserError, match="torch pickle.*save_pretrained"):
        files.find(tmp_path)


def test_tensors_of_integers(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="type I64 cannot be read; F32, F16, BF16 can"):
        files.find(tmp_path)["a"].read()


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with files.new_directory(target) as directory:
        (directory / "a").touch()
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match="model exists already"), files.new_directory(target):
        pass


def test_a_directory_vanishes_when_its_making_fails(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty one is fine
    with pytest.raises(KeyboardInterrupt), files.new_directory(target) as directory:
        (directory / "a").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [target]
