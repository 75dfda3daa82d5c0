"""Checkpoints in a bucket, for which a file system in memory stands in that records every request."""

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

import llava_jax
from llava_jax import convert
from llava_jax.errors import UserError
from llava_jax.weights import files, load_checkpoint, ranges


class Bucket(MemoryFileSystem):
    protocol = "gs"
    store: dict = {}
    pseudo_dirs = [""]
    requests: list[tuple[str, int, int]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def cat_file(self, path, start=None, end=None, **options):
        self.requests.append((path, start, end))
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("gs", Bucket, clobber=True)
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.requests.clear()
    yield Bucket()


@pytest.mark.parametrize("layout", ["hf", "native", "original"])
def test_a_model_in_a_bucket_is_the_local_one(hf_dir, tmp_path, bucket, monkeypatch, layout):
    convert.main([str(hf_dir), str(tmp_path / "model"), "--to", layout, "--shard-size", "100KB", "--dtype", "keep"])
    bucket.put(str(tmp_path / "model"), "gs://bucket/models/model", recursive=True)
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 5_000)
    ours, expected = llava_jax.load("gs://bucket/models/model"), llava_jax.load(tmp_path / "model")
    assert ours.config == expected.config and ours.tokenizer.encode("Hello") == expected.tokenizer.encode("Hello")
    assert ours.parameters.keys() == expected.parameters.keys()
    for path, x in expected.parameters.items():
        np.testing.assert_array_equal(ours.parameters[path], x, err_msg=path)
    assert all(stop - start <= max(5_000, files.HEADER_BYTES * (start == 0)) for _, start, stop in bucket.requests)
    convert.main(["gs://bucket/models/model", str(tmp_path / "again"), "--to", "native", "--dtype", "keep"])
    assert jax.tree.all(jax.tree.map(np.array_equal, load_checkpoint(tmp_path / "again")[1], expected.parameters))


def test_what_is_missing_in_a_bucket_is_told(hf_dir, bucket):
    with pytest.raises(UserError, match="^gs://bucket/model: no such directory"):
        llava_jax.load("gs://bucket/model")
    bucket.put(str(hf_dir), "gs://bucket/model", recursive=True)
    content = bucket.cat("gs://bucket/model/model.safetensors")
    bucket.pipe("gs://bucket/model/model.safetensors", content[:-4])
    with pytest.raises(UserError, match="^gs://bucket/model/model.safetensors: truncated, damaged or not"):
        llava_jax.load("gs://bucket/model")
    bucket.rm("gs://bucket/model/model.safetensors")
    with pytest.raises(UserError, match="^gs://bucket/model/model.safetensors: no such file"):
        llava_jax.load("gs://bucket/model")
