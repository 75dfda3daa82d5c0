"""Damaged checkpoints are noticed: whatever happens to a file, a restart gives the saved bits or refuses by name.

One device here; test_processes.py restores on one device what eight have saved, and the other way round.
"""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.errors import UserError
from llava_jax.train import checkpoint
from llava_jax.train.checkpoint import Checkpoints, DamagedCheckpoint, StageRecord
from llava_jax.train.digests import digests
from llava_jax.train.step import TrainState, init_state


def make_state(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P())
    # The first is too large for TensorStore to keep it in its index, which has checksums of its own.
    shapes = {"decoder/kernel": (32, 48), "projector/bias": (16,)}
    trainable = {path: jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)
                 for path, shape in shapes.items()}
    return init_state(optax.adamw(1e-3), trainable)


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.trainable, state.optimizer))]


RECORD = StageRecord(total_steps=9, frozen="none", skipped={"malformed": 2}, data={"epoch": 0, "window": 1, "row": 2},
                     lengths_hash=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The directory of a stage with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "align"
    checkpoints = Checkpoints(folder, every=1, keep=2)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), RECORD)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "align"))


def restored(folder: Path, step: int = 2) -> tuple[StageRecord, list[bytes]] | None:
    """The record and the bits of a checkpoint; None if it is reported as damaged."""
    checkpoints = Checkpoints(folder, every=1, keep=2)
    try:
        return checkpoints.record(step), bits(checkpoints.restore(step, make_state(0)))
    except DamagedCheckpoint as error:
        assert str(error).startswith(f"{folder / str(step)}: this checkpoint is damaged (")
        assert "remove it to go on from the one before" in str(error) and "\n" not in str(error)
        return None
    finally:
        checkpoints.close()


def test_a_checkpoint_gives_back_what_was_saved(saved):
    assert restored(saved) == (RECORD, bits(make_state(2)))


def test_a_record_of_an_earlier_version_has_no_hash_of_lengths(tmp_path, monkeypatch):
    content = {name: value for name, value in dataclasses.asdict(RECORD).items() if name != "lengths_hash"}
    checkpoints = Checkpoints(tmp_path / "align", every=1, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "dataclasses", types.SimpleNamespace(asdict=lambda _: content))
        checkpoints.save(2, make_state(2), RECORD)
    checkpoints.close()
    assert restored(tmp_path / "align") == (dataclasses.replace(RECORD, lengths_hash=0), bits(make_state(2)))


@pytest.mark.parametrize("places", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(copy, places):
    right, noticed, rng = (RECORD, bits(make_state(2))), {}, np.random.default_rng(0)
    files = [path for path in sorted((copy / "2").rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        content = path.read_bytes()
        for place in rng.integers(0, len(content) * 8, places):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            found = restored(copy)
            assert found in (None, right), f"{path}, bit {place}"
            noticed.setdefault(path.name if path.name == "metadata" else path.parent.name, []).append(found is None)
        path.write_bytes(content)
    assert sum(map(len, noticed.values())) > 15 * places
    assert all(noticed["metadata"]) and any(noticed["d"])  # of meta; the arrays are in d


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "longer"])
def test_a_file_that_is_not_whole_is_noticed_or_changes_nothing(copy, damage):
    right, noticed = (RECORD, bits(make_state(2))), 0
    for path in [path for path in sorted((copy / "2").rglob("*")) if path.is_file()]:
        content = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "longer": content + b"\0"}[damage])
        found = restored(copy)
        assert found in (None, right), path
        noticed += found is None
        path.write_bytes(content)
    assert noticed >= (1 if damage == "longer" else 4)


@pytest.mark.parametrize("item", ["trainable", "optimizer", "meta", ""])
def test_what_is_of_another_checkpoint_is_noticed(copy, item):
    shutil.rmtree(copy / "2" / item)
    shutil.copytree(copy / "1" / item, copy / "2" / item)
    # The optimizer states of both are the same, as no step was done.
    assert restored(copy) == ((RECORD, bits(make_state(2))) if item == "optimizer" else None)


def test_a_checkpoint_of_another_stage_is_noticed(copy):
    other = copy.with_name("instruct")
    copy.rename(other)
    assert restored(other) is None


def test_a_checkpoint_without_checksums_is_refused(copy):
    path = copy / "2" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text())["content"]))
    with pytest.raises(DamagedCheckpoint, match="without a checksum: damaged, or saved by an earlier version"):
        Checkpoints(copy, every=1, keep=2).record(2)


def test_a_disk_that_does_not_answer_is_no_damage(copy, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    checkpoints = Checkpoints(copy, every=1, keep=2)
    monkeypatch.setattr("llava_jax.train.checkpoint.ocp.PyTreeCheckpointHandler.restore", fail)
    monkeypatch.setattr("llava_jax.train.checkpoint._read_through", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        checkpoints.restore(2, make_state(0))
    assert not isinstance(error.value, UserError)
    monkeypatch.setattr("llava_jax.train.checkpoint._read_through", lambda folder: None)
    monkeypatch.setattr("llava_jax.train.checkpoint.ocp.PyTreeCheckpointHandler.restore",
                        lambda *_, **__: (_ for _ in ()).throw(RuntimeError("RESOURCE_EXHAUSTED: out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        checkpoints.restore(2, make_state(0))


def test_a_damaged_checkpoint_is_set_aside_only_if_there_is_one_before(copy, capsys):
    checkpoints = Checkpoints(copy, every=1, keep=2)
    checkpoints.set_aside(2, "its bits")
    assert (copy.with_name("align.damaged") / "2" / "meta").is_dir()
    assert "is damaged (its bits) and is now" in capsys.readouterr().out
    assert checkpoints.latest() == 1
    with pytest.raises(DamagedCheckpoint, match="/1: this checkpoint is damaged"):
        checkpoints.set_aside(1, "its bits")
    assert checkpoints.latest() == 1
    checkpoints.save(2, make_state(2), RECORD)
    checkpoints.close()
    assert restored(copy) == (RECORD, bits(make_state(2)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["trainable", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value, where):
    state = make_state(1)
    tree = {"trainable": state.trainable, "optimizer": state.optimizer}
    leaves, structure = jax.tree.flatten(tree[where])
    leaves[-1] = leaves[-1].at[3].set(value)
    checkpoints = Checkpoints(tmp_path / "align", every=1, keep=2)
    bad = TrainState(state.step, **(tree | {where: jax.tree.unflatten(structure, leaves)}))
    with pytest.raises(UserError, match=rf"stages.align, after step 5: {where} \S*projector/bias is not finite"):
        checkpoints.save(5, bad, RECORD)
    assert checkpoints.latest() is None
    checkpoints.close()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8])
def test_digests_depend_on_every_bit_and_position(dtype):
    rng = np.random.default_rng(0)
    x = (10 * rng.normal(size=(8, 6))).astype(dtype)
    right = digests({"x": jnp.asarray(x)})["x"]
    assert right == digests({"x": jnp.asarray(x.copy())})["x"] and right[1]
    others = [x.T.copy().reshape(x.shape), x[::-1].copy(), np.roll(x, 1), x.reshape(6, 8)]
    for place in range(x.size):
        flipped = x.copy().reshape(-1)
        flipped.view(np.uint8)[place * x.itemsize + x.itemsize // 2] ^= 1
        others.append(flipped.reshape(x.shape))
    assert right[0] not in [digests({"x": jnp.asarray(other)})["x"][0] for other in others]
