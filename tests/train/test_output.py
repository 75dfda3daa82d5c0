"""The output directory in a bucket, for which fsspec's file system in memory stands in."""

import dataclasses
import itertools
import json
import os

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig
from llava_jax.train import lock, loop, output
from llava_jax.train.metrics import Log


class Bucket(MemoryFileSystem):
    """gs:// in memory; nothing can be appended, as in a bucket."""

    protocol = ("gs",)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")

    def open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super().open(path, mode, **options)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    stage = config.Stage(learning_rates=((".*", 1.0),), data=config.Data(path="unused"))
    yield config.Recipe(model=config.Model(llava="unused"), stages={"a": stage, "b": stage}, output="gs://bucket/run")
    Bucket.store.clear()


def lines(recipe: config.Recipe) -> list[dict]:
    return [json.loads(line) for line in epath.Path(recipe.output + "/metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written_and_rewound(recipe):
    log = Log(output.directory(recipe), recipe)
    written = [{"stage": stage, "step": step, "loss": 1.5} for stage in "ab" for step in (1, 2, 3)]
    for line in written:
        log.write(line)
    assert lines(recipe) == written
    Log(output.directory(recipe), recipe).rewind("b", 1)
    assert lines(recipe) == written[:4]


def test_another_recipe_is_refused(recipe):
    output.check_recipe(recipe)
    output.write_recipe(recipe)
    output.check_recipe(dataclasses.replace(recipe, log_every=3))
    elsewhere = dataclasses.replace(recipe.stages["b"], remat="save_qkv", optimizer=config.Optimizer(offload=True))
    output.check_recipe(dataclasses.replace(recipe, mesh=config.Mesh(fsdp=2), stages=recipe.stages | {"b": elsewhere}))
    with pytest.raises(UserError, match=r"gs://bucket/run: holds a run of another recipe \(different: seed\)"):
        output.check_recipe(dataclasses.replace(recipe, seed=1))
    path = output.directory(recipe) / "recipe.json"
    stored = json.loads(path.read_text())
    stored["mesh"]["replica"] = stored["mesh"].pop("data")
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="run of another version of this project, whose recipe has mesh.replica; give"):
        output.check_recipe(recipe)


@pytest.mark.parametrize("content, problem", [
    (b"[]", "must be an object, and is a list"), (b"{", "not JSON"), (b"\xff", "byte 1 is not UTF-8"),
    (b"", "not JSON"),
    (b"{}", "stages is missing or no object"), (b'{"stages": []}', "stages is missing or no object"),
])
def test_a_damaged_recipe_is_named(recipe, tmp_path, content, problem):
    for folder in ("gs://bucket/run", str(tmp_path)):
        path = epath.Path(folder) / "recipe.json"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: {problem}"):
            output.check_recipe(dataclasses.replace(recipe, output=folder))


@pytest.mark.parametrize("state", ["free", "left behind", "alive", "at once"])
def test_the_lock_in_a_bucket(recipe, monkeypatch, state):
    monkeypatch.setattr(lock, "LOST_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    folder = output.directory(recipe)
    other = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00 UTC", "token": "x"}
    if state in ("left behind", "alive"):
        (folder / ".lock").write_text(json.dumps(other))
    if state == "alive":
        beats = itertools.count()
        monkeypatch.setattr(lock._BucketLock, "read", lambda self: other | {"beat": next(beats)})
    if state == "at once":  # the other's note comes after ours
        monkeypatch.setattr(lock._BucketLock, "put", lambda self, note: self.path.write_text(json.dumps(other)))
    if state in ("alive", "at once"):
        with pytest.raises(UserError, match=r"gs://bucket/run: a run on elsewhere \(process 7, since 2026"), \
                lock.lock_directory(folder):
            pass
    else:
        with lock.lock_directory(folder):
            assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
        assert not (folder / ".lock").exists()


def test_the_model_is_there_when_its_config_is(recipe, monkeypatch):
    class TrainContext:
        directory, model, tokenizer_directory = output.directory(recipe), LlavaConfig(), ""

    def save(folder, *_, **__):
        folder.mkdir()
        for name in ("a.json", "config.json", "model.safetensors"):
            (folder / name).write_text(name)

    monkeypatch.setattr(loop, "open_parameters", lambda _: ({}, set()))
    monkeypatch.setattr(loop.preflight, "hf_problem", lambda _: None)
    monkeypatch.setattr(loop, "save_hf", save)
    written, original = [], Bucket.open
    monkeypatch.setattr(Bucket, "open", lambda self, path, *mode, **options: written.append(path.rpartition("/")[2]) or
                        original(self, path, *mode, **options))
    target = loop.write_model(TrainContext)
    assert str(target) == "gs://bucket/run/model"
    assert written == ["a.json", "model.safetensors", "config.json"]
    assert output.has_model(recipe)
    assert (target / "model.safetensors").read_text() == "model.safetensors"
