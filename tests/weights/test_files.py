"""Safetensors files against the safetensors library; broken files; directories that appear whole."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from llava_jax.errors import UserError
from llava_jax.weights import files, load_checkpoint, read_config

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_writes(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 4, 5).to(dtype), "b.weight": torch.randn(7).to(dtype), "empty": torch.zeros(0, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    found = files.list_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].read().astype(np.float32), tensor.float().numpy())
    for layer, rows in ((0, slice(1, 3)), (2, slice(3, 9)), (1, slice(2, 2))):
        np.testing.assert_array_equal(found["a"].layer(layer).read(rows).astype(np.float32),
                                      tensors["a"][layer, rows].float().numpy())


@pytest.mark.parametrize("shard_bytes, count", [(10**9, 1), (2000, 3), (1, 4)])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes, count):
    arrays = {
        "stacked": RNG.normal(size=(3, 5, 7)).astype(np.float32),
        "turned": RNG.normal(size=(40, 30)).astype(np.float32).T,
        "vector": RNG.normal(size=11).astype(np.float16),
        "bf16": RNG.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
    }
    entries = [
        files.TensorSpec(name, x.dtype, x.shape, lambda name=name, x=x: x if name == "stacked" else [x[:1], x[1:]])
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
    assert files.list_tensors(tmp_path).keys() == arrays.keys()
    if count > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
        assert all(name in safetensors.numpy.load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_a_dtype_may_change_on_the_way(tmp_path):
    x = RNG.normal(size=(300, 70)).astype(np.float32)
    files.write(tmp_path, [files.TensorSpec("x", np.dtype(ml_dtypes.bfloat16), x.shape, lambda: [x])], 10**9)
    np.testing.assert_array_equal(files.list_tensors(tmp_path)["x"].read(), x.astype(ml_dtypes.bfloat16))


def test_large_blocks_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WRITE_BYTES", 64)
    x = RNG.normal(size=(33, 9)).astype(np.float32)
    files.write(tmp_path, [files.TensorSpec("x", x.dtype, (9, 33), lambda: [x.T])], 10**9)
    np.testing.assert_array_equal(files.list_tensors(tmp_path)["x"].read(), x.T)


@pytest.fixture
def sharded(tmp_path):
    entries = [files.TensorSpec(name, np.dtype(np.float32), (4, 4), lambda: [np.ones((4, 4), np.float32)])
               for name in "ab"]
    files.write(tmp_path, entries, 64)
    return tmp_path


def first(directory):
    return directory / "model-00001-of-00002.safetensors"


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("spoil, message", [
    (lambda d: first(d).unlink(), "00001-of-00002.safetensors is missing, which .*index.json names"),
    (lambda d: cut(first(d), -5), "00001-of-00002.safetensors: truncated, damaged .* bytes: .*; download it again"),
    (lambda d: cut(first(d), 40), "00001-of-00002.safetensors: truncated, damaged or not a safetensors file"),
    (lambda d: cut(first(d), 0), "00001-of-00002.safetensors: truncated, damaged or not a safetensors file"),
    (lambda d: first(d).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
     "00001-of-00002.safetensors: a Git LFS pointer, not the file; fetch it with `git lfs pull`"),
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
        files.list_tensors(sharded)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, message", [
    ("pytorch_model-00001-of-00002.bin", "has torch files, but neither pytorch_model.bin nor"),
    ("mm_projector.bin", "a projector alone, trained in stage 1; name it as model.projector_weights"),
    ("model-Q4_K.gguf", "a GGUF model, llama.cpp's format, is not read; take the model's safetensors"),
    ("adapter_config.json", r"LoRA adapters \(PEFT\).*--adapter"),
    ("model/config.json", "no model, but one is in .*/model$"),
    ("snapshots/4d7a/config.json", "no model, but one is in .*/snapshots/4d7a$"),
    ("notes.txt", "config.json: no such file, so this is not the directory of a model"),
])
def test_what_a_directory_holds_instead_of_a_model(tmp_path, name, message):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        read_config(tmp_path)
    if "/" not in name:  # with a config.json beside it
        (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
        with pytest.raises(UserError, match=f"{tmp_path}.*({message}|nor an index)"):
            load_checkpoint(tmp_path)


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="model.gguf: a file; name its directory"):
        read_config(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0b", 7,
                                  None, ["model.safetensors"], "..\\other.safetensors"])
def test_an_index_names_files_of_its_directory_alone(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="index.json: weight_map names .* not the name of a file beside it"):
        files.list_tensors(directory)


def test_links_lead_into_the_hubs_cache_alone(tmp_path):
    cache = tmp_path / "models--a--b"
    for folder in ("snapshots/4d7a", "blobs"):
        (cache / folder).mkdir(parents=True)
    snapshot, index = cache / "snapshots/4d7a", cache / "snapshots/4d7a/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, cache / "blobs/8f3c")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/8f3c")
    assert files.list_tensors(snapshot).keys() == {"a"}
    (snapshot / "model-1.safetensors").unlink()
    (cache / "blobs/8f3c").rename(tmp_path / "elsewhere.safetensors")
    (snapshot / "model-1.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="model-1.safetensors: a link out of the directory"):
        files.list_tensors(snapshot)


def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def mutated(header, rng):
    """A header with one number, type or name changed, or two entries mixed up."""
    header = json.loads(json.dumps(header))
    one, other = rng.choice(sorted(header), 2, replace=False)
    number = int(rng.choice([-1, 0, 1, 3, 4, 8, 60, 2**31, 2**63, 2**64]))
    place = rng.integers(0, 2)
    match rng.integers(0, 9):
        case 0:
            header[one]["data_offsets"][place] = number
        case 1:
            header[one]["data_offsets"][place] += int(rng.choice([-8, -4, -1, 1, 4, 8]))
        case 2:
            header[one]["shape"] = [number, *header[one]["shape"][1:]]
        case 3:
            header[one]["dtype"] = str(rng.choice(["F64", "BF16", "F16", "I8", "BOOL", "F33", "U32", ""]))
        case 4:
            header[one]["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"], header[one]["data_offsets"])
        case 5:
            header[one]["data_offsets"] = header[other]["data_offsets"]
        case 6:
            del header[one]
        case 7:
            header[one][str(rng.choice(["dtype", "shape", "data_offsets"]))] = rng.choice(
                np.array([None, "x", 1.5, True, {}, [], [[1]], [0, 8, 16], [1.5, 2]], object))
        case 8:
            header["new"] = entry("F32", [1], 0, 4)
    return header


def test_damaged_headers_are_refused_in_one_line(tmp_path):
    """Headers and bytes are changed at random. Reading returns what the library loads, or raises UserError."""
    arrays = {"a": RNG.normal(size=(2, 3)).astype(np.float32), "b": RNG.normal(size=6).astype(np.float32),
              "c": RNG.normal(size=(3, 4)).astype(np.float16), "d": np.zeros((0, 2), np.float32)}
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, file)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    rng, refused = np.random.default_rng(1), 0
    for trial in range(150):
        if trial % 3:
            text = json.dumps(mutated(header, rng)).encode()
            content = len(text).to_bytes(8, "little") + text + data + bytes(4 * (trial % 11 == 0))
        else:
            content = bytearray(whole)
            content[rng.integers(0, 8 + length)] ^= 1 << rng.integers(0, 8)
            content = bytes(content[: rng.integers(8, len(content))] if trial % 9 == 0 else content)
        file.write_bytes(content)
        try:
            expected = safetensors.numpy.load_file(file)
        except Exception:
            expected = None
        try:
            found = {name: tensor.read() for name, tensor in files.list_tensors(tmp_path).items()}
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error), content[:300]
            continue
        assert expected is not None, content[:300]
        assert found.keys() == expected.keys(), content[:300]
        for name, x in found.items():
            np.testing.assert_array_equal(x, expected[name], err_msg=str(content[:300]))
    assert refused > 100


@pytest.mark.parametrize("dtype", files.DTYPES.values(), ids=files.DTYPES)
def test_values_that_are_not_finite_are_found(dtype):
    largest = ml_dtypes.finfo(dtype).max
    for shape in ((0,), (3,), (2, 3, 5)):
        x = np.zeros(shape, dtype)
        assert files.is_finite(x)
        for value in (np.nan, -np.nan, np.inf, -np.inf, largest, -largest, ml_dtypes.finfo(dtype).tiny):
            for i in range(x.size):
                x.flat[i] = value
                assert files.is_finite(x) == bool(np.isfinite(x.astype(np.float64)).all()), (value, i)
                x.flat[i] = 0


def test_what_is_not_finite_when_written_is_named(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 400)).astype(np.float32) for name in "abcd"}
    arrays["b"][1, 7] = 1e5
    arrays["c"][2, 399] = np.nan
    entries = [files.TensorSpec(name, np.dtype(np.float16), x.shape, lambda x=x: [x[:1], x[1:]])
               for name, x in arrays.items()]
    assert files.write(tmp_path, entries, 10**9) == (["c"], ["b"])
    wide = [files.TensorSpec(name, np.dtype(ml_dtypes.bfloat16), x.shape, lambda x=x: [x.T.T])
            for name, x in arrays.items()]
    assert files.write(tmp_path, wide, 10**9) == (["c"], [])


def test_tensors_of_integers(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="type I64 cannot be read; F32, F16, BF16 can"):
        files.list_tensors(tmp_path)["a"].read()


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
