"""A run that goes on: from a damaged checkpoint, with changed data, with a corrected recipe, beside another run."""

import dataclasses
import fnmatch
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_jax import config
from llava_jax.data import pipeline
from llava_jax.data.pipeline import Batches
from llava_jax.errors import UserError
from llava_jax.train import __main__ as command
from llava_jax.train import batches, lock, loop, setup
from llava_jax.weights import load_checkpoint

STEPS = 4


def copy_data(data: Path, folder: Path) -> Path:
    """A folder with the data of both stages."""
    copy = Path(shutil.copytree(data.parent, folder / "data"))
    shutil.copy(copy / "data.json", copy / "second.json")
    return copy


def recipe_of(parts, data: Path, output: Path, **changes) -> config.Recipe:
    """Two stages of the projector alone, with the data of `copy_data`."""
    rows = config.Data(path=str(data / "data.json"), sequence_length=128, tiles_per_sequence=4)
    stage = config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)), data=rows,
                         batch_size=4, steps=STEPS)
    second = dataclasses.replace(stage, data=dataclasses.replace(rows, path=str(data / "second.json")))
    return config.Recipe(model=config.Model(vision=str(parts[0]), language=str(parts[1])),
                         stages={"align": stage, "instruct": second}, output=str(output), mesh=config.Mesh(fsdp=1),
                         log_every=1, checkpoint_every=2, **changes)


@pytest.fixture
def make_recipe(parts, data, tmp_path) -> Callable[..., config.Recipe]:
    copy = copy_data(data, tmp_path)
    return lambda name="run", **changes: recipe_of(parts, copy, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def whole(parts, data, tmp_path_factory) -> config.Recipe:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = recipe_of(parts, copy_data(data, folder), folder / "run")
    loop.train(recipe)
    return recipe


@pytest.fixture(scope="module")
def whole_first(parts, data, tmp_path_factory) -> config.Recipe:
    """The same of the first stage alone."""
    folder = tmp_path_factory.mktemp("whole_first")
    recipe = first_stage(recipe_of(parts, copy_data(data, folder), folder / "run"))
    loop.train(recipe)
    return recipe


def with_data(recipe: config.Recipe, stage: str, **changes) -> config.Recipe:
    one = recipe.stages[stage]
    one = dataclasses.replace(one, data=dataclasses.replace(one.data, **changes))
    return dataclasses.replace(recipe, stages=recipe.stages | {stage: one})


def first_stage(recipe: config.Recipe) -> config.Recipe:
    return dataclasses.replace(recipe, stages={"align": recipe.stages["align"]})


def parameters(recipe: config.Recipe) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in load_checkpoint(recipe.output + "/model")[1].items()}


def assert_same(ours: config.Recipe, theirs: config.Recipe) -> None:
    expected = parameters(theirs)
    for path, x in parameters(ours).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


def die(monkeypatch, recipe: config.Recipe, step: int) -> None:
    """Runs the recipe until its `step`-th batch goes to the devices, where it dies."""
    original, count = batches.shard_batch, [0]

    def shard_batch(*args, **kwargs):
        count[0] += 1
        if count[0] == step:
            raise RuntimeError("the machine is gone")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "shard_batch", shard_batch)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            loop.train(recipe)


def flip_a_bit(checkpoint: str, item: str) -> None:
    """In the largest file of an item: that of the arrays."""
    path = max((path for path in Path(checkpoint, item).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("item", ["trainable", "meta"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole_first, tmp_path, capsys, item):
    cut = dataclasses.replace(whole_first, output=str(tmp_path / "cut"))
    shutil.copytree(whole_first.output, cut.output)
    shutil.rmtree(cut.output + "/model")
    flip_a_bit(f"{cut.output}/checkpoints/align/{STEPS}", item)
    loop.train(cut)
    told = capsys.readouterr().out
    assert f"checkpoints/align/{STEPS}: this checkpoint is damaged" in told
    assert "going on from the one before, of step 2" in told
    assert_same(cut, whole_first)


def test_the_optimizer_of_a_stage_that_goes_on_is_compared(make_recipe, whole_first, monkeypatch, capsys):
    cut = dataclasses.replace(first_stage(make_recipe("cut")), checkpoint_every=1)
    die(monkeypatch, cut, step=4)
    flip_a_bit(cut.output + "/checkpoints/align/3", "optimizer")
    loop.train(cut)
    assert "checkpoints/align/3: this checkpoint is damaged" in capsys.readouterr().out
    assert_same(cut, whole_first)


def test_a_finished_stage_that_is_done_again_keeps_the_lines_of_the_later_ones(make_recipe, whole, monkeypatch):
    cut = make_recipe("cut")
    die(monkeypatch, cut, step=STEPS + 4)
    flip_a_bit(f"{cut.output}/checkpoints/align/{STEPS}", "trainable")
    loop.train(cut)
    assert_same(cut, whole)
    ours, theirs = ([(line["stage"], line["step"]) for line in
                     map(json.loads, Path(recipe.output, "metrics.jsonl").read_text().splitlines())]
                    for recipe in (cut, whole))
    assert ours == theirs


def test_without_a_checkpoint_before_it_a_damaged_one_ends_the_run(make_recipe, monkeypatch):
    recipe = first_stage(make_recipe())
    die(monkeypatch, recipe, step=4)
    flip_a_bit(recipe.output + "/checkpoints/align/2", "trainable")
    with pytest.raises(UserError, match=r"align/2: this checkpoint is damaged \(.*\); remove it to go on"):
        loop.train(recipe)
    assert os.path.isdir(recipe.output + "/checkpoints/align/2")


def test_a_mistake_in_a_later_stage_is_told_before_the_first_step(make_recipe, tmp_path):
    recipe = make_recipe()
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    broken = tmp_path / "data" / "broken.json"
    rows = json.loads((tmp_path / "data" / "data.json").read_text())
    rows[1]["image"] = "gone.png"
    broken.write_text(json.dumps(rows))
    all_bad = tmp_path / "data" / "all_bad.json"
    all_bad.write_text(json.dumps([row | {"image": "gone.png"} for row in rows if isinstance(row.get("image"), list)]))
    wrong = {
        "no such data file": {"path": str(tmp_path / "dta.json")},
        "validatoin.json: no such data file": {"validation": str(tmp_path / "validatoin.json")},
        "empty.json: the file has no rows": {"validation": str(empty)},
        "data.image_root: .*: no such folder": {"image_root": str(tmp_path / "imgs")},
        "unknown template 'vicuna_v7'": {"template": "vicuna_v7"},
        r"broken.json, row 2 .*gone.png: no such image": {"path": str(broken)},
        r"broken.json, row 2 .*gone.png: no such image file": {"validation": str(broken)},
        "all_bad.json: none of the rows that were tried can be used": {"path": str(all_bad), "bad_rows": "skip"},
        "none of the first .* rows can be used": {"validation": str(all_bad), "bad_rows": "skip"},
    }
    for message, changes in wrong.items():
        with pytest.raises(UserError, match=message):
            loop.train(with_data(recipe, "instruct", **changes))
    decays = dataclasses.replace(recipe.stages["instruct"], optimizer=config.Optimizer(weight_decay=(("vision", 0.1),)))
    with pytest.raises(UserError, match="stages.instruct.optimizer.weight_decay: .* matches no row"):
        loop.train(dataclasses.replace(recipe, stages=recipe.stages | {"instruct": decays}))
    assert not os.path.exists(recipe.output)


def test_a_bad_validation_row_is_skipped_and_counted_where_bad_rows_are(make_recipe, tmp_path):
    rows = json.loads((tmp_path / "data" / "data.json").read_text())
    rows[1]["conversations"] = []
    broken = tmp_path / "data" / "broken.json"
    broken.write_text(json.dumps(rows))
    recipe = with_data(first_stage(make_recipe()), "align", validation=str(broken), bad_rows="skip")
    loop.train(recipe)
    line = json.loads(Path(recipe.output, "metrics.jsonl").read_text().splitlines()[-1])
    assert line["validation_skipped"] == {"malformed": 1} and line["validation_loss"] > 0


def test_the_corrected_recipe_of_a_later_stage_goes_on(make_recipe, whole, monkeypatch, tmp_path):
    recipe = make_recipe()
    die(monkeypatch, recipe, step=3)  # a checkpoint of the first stage is there
    other = dataclasses.replace(recipe.stages["align"], learning_rates=(("projector/.*", 3e-3), ("[vd].*", None)))
    with pytest.raises(UserError, match="different: stages.align.learning_rates"):
        loop.train(dataclasses.replace(recipe, stages=recipe.stages | {"align": other}))
    # The mistake is in the second stage: it may be changed, left out, renamed, and more may come.
    die(monkeypatch, with_data(recipe, "instruct", sequence_length=256), step=1)
    renamed = {"align": recipe.stages["align"], "tune": recipe.stages["instruct"], "more": recipe.stages["instruct"]}
    die(monkeypatch, dataclasses.replace(recipe, stages=renamed), step=1)
    with pytest.raises(UserError, match="different: the order of the stages"):
        loop.train(dataclasses.replace(recipe, stages=dict(reversed(recipe.stages.items()))))
    # The first stage is done: its data are needed no more, once the second has a checkpoint.
    die(monkeypatch, recipe, step=2 + 3)
    os.unlink(tmp_path / "data" / "data.json")
    loop.train(with_data(recipe, "align", path="gone.json", validation="gone.json"))
    assert_same(recipe, whole)
    # The model is there: nothing may change any more.
    with pytest.raises(UserError, match="different: stages.more"):
        loop.train(dataclasses.replace(recipe, stages=recipe.stages | {"more": recipe.stages["instruct"]}))


def test_a_validation_that_a_kill_has_cut_off_is_made_up_for(make_recipe, monkeypatch, tmp_path):
    recipe = with_data(first_stage(make_recipe()), "align", validation=str(tmp_path / "data" / "second.json"))
    die(monkeypatch, recipe, step=STEPS + 1)  # its first batch
    assert not os.path.exists(recipe.output + "/model")
    loop.train(recipe)
    loop.train(recipe)
    lines = [json.loads(line) for line in Path(recipe.output, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4]


def test_validation_data_are_opened_once(make_recipe, monkeypatch, tmp_path):
    recipe = with_data(first_stage(make_recipe(validate_every=1)), "align", workers=1,
                       validation=str(tmp_path / "data" / "second.json"))
    opened, kept, original = [], [], Batches.open_rows
    monkeypatch.setattr(batches, "open_mixture", lambda path, root, open=batches.open_mixture:
                        opened.append(os.path.basename(path)) or open(path, root))

    def open_rows(self, state):
        pool, rows = original(self, state)
        kept.append(pool) if self.keep else None
        return pool, rows

    monkeypatch.setattr(Batches, "open_rows", open_rows)
    loop.train(recipe)
    assert opened.count("second.json") == 2  # before the first step, and for all validations
    assert len(kept) == STEPS and len(set(map(id, kept))) == 1
    lines = [json.loads(line) for line in Path(recipe.output, "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "validation_loss" in line]) == STEPS


def change_a_word(folder: Path, parts: Path) -> None:
    path = folder / "data.json"
    path.write_text(path.read_text().replace("What is", "Who is ", 1))


def append_a_row(folder: Path, parts: Path) -> None:
    path = folder / "data.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))


def reorder(folder: Path, parts: Path) -> None:
    path = folder / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


def change_the_tokenizer(folder: Path, parts: Path) -> None:
    (parts / "added_tokens.json").write_text(json.dumps({"<new>": 1999}))


def change_the_model(folder: Path, parts: Path) -> None:
    path = parts / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def test_inputs_that_have_changed_are_refused_by_name(make_recipe, monkeypatch, tmp_path, parts):
    language = Path(shutil.copytree(parts[1], tmp_path / "language"))
    recipe = first_stage(make_recipe())
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, language=str(language)))
    die(monkeypatch, recipe, step=4)
    os.utime(tmp_path / "data" / "data.json")  # a copy of the same content is no change
    die(monkeypatch, recipe, step=1)
    for change, name in ((change_a_word, "data 1: .*data.json"), (append_a_row, "data 1: .*data.json"),
                         (reorder, "data 1: .*data.json"), (change_the_tokenizer, "tokenizer: "),
                         (change_the_model, "model: the settings in its config.json")):
        for folder in ("data", "language"):
            shutil.copytree(tmp_path / folder, tmp_path / "before" / folder)
        change(tmp_path / "data", language)
        with pytest.raises(UserError, match=f"stages.align was trained so far with other inputs .*: {name}"):
            loop.train(recipe)
        if change is not change_the_model:
            for folder in ("data", "language"):
                shutil.rmtree(tmp_path / folder)
                shutil.move(tmp_path / "before" / folder, tmp_path / folder)
    os.unlink(recipe.output + "/inputs.json")  # as the line says
    loop.train(recipe)


def test_a_mixture_and_a_packed_set_are_compared_part_by_part(make_recipe, monkeypatch, tmp_path):
    mixture = tmp_path / "data" / "mixture.json"
    mixture.write_text(json.dumps({"mixture": [{"path": "data.json"}, {"path": "second.json", "count": 10}]}))
    recipe = with_data(first_stage(make_recipe()), "align", path=str(mixture))
    die(monkeypatch, recipe, step=4)
    mixture.write_text(mixture.read_text().replace("10", "11"))
    with pytest.raises(UserError, match="other inputs than there are now: data 2: .*second.json[^;]*$"):
        loop.train(recipe)


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of the test's output directory until its input ends."""
    code = ("import sys; from pathlib import Path; from llava_jax.train.lock import lock_directory\n"
            "with lock_directory(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_in_one_output_directory_are_refused(make_recipe, monkeypatch, other_process):
    monkeypatch.setattr(lock, "KILL_SECONDS", 0.0)
    recipe = first_stage(make_recipe())
    who = rf"/run: a run on \S+ \(process {other_process.pid}, since 2\S+ \S+ UTC\) is using"
    with pytest.raises(UserError, match=who):
        loop.train(recipe)
    other_process.kill()  # leaves the file, but not the lock
    other_process.wait()
    assert os.path.exists(recipe.output + "/.lock")
    loop.train(recipe)
    assert not os.path.exists(recipe.output + "/.lock")


def test_a_run_that_ends_leaves_no_lock_and_no_empty_directory(tmp_path, other_process):
    other_process.communicate()
    assert not (tmp_path / "run").exists() and other_process.returncode == 0


@pytest.mark.parametrize("alive", [True, False])
def test_a_note_of_another_host_is_watched(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "LOST_SECONDS", 0.2)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00 UTC", "beat": 1}))
    if alive:
        note, beats = json.loads(path.read_text()), itertools.count()
        monkeypatch.setattr(lock._FileLock, "read", lambda self: note | {"beat": next(beats)})
        with pytest.raises(UserError, match=r"a run on elsewhere \(process 7, since 2026-01-01 \S+ UTC\) is using"), \
                lock.lock_directory(tmp_path):
            pass
    else:
        with lock.lock_directory(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()


def test_a_directory_that_cannot_be_written_is_told_at_the_start(make_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    recipe = first_stage(make_recipe("file/run"))
    with pytest.raises(UserError, match="file/run: Not a directory"):
        loop.train(recipe)


@pytest.mark.parametrize("changed", [False, True])
def test_lengths_that_changed_since_the_stop_get_a_line(make_recipe, monkeypatch, capsys, changed):
    recipe = first_stage(make_recipe())
    die(monkeypatch, recipe, step=4)
    if changed:  # as if images had another layout
        monkeypatch.setattr(pipeline, "zlib", types.SimpleNamespace(crc32=lambda _: 1))
    loop.train(recipe)
    assert ("since the stop, records near this position got other numbers" in capsys.readouterr().err) == changed


@pytest.mark.parametrize(("platforms", "files", "kept"), [
    ("", [], 1), ("cpu", ["/dev/accel0"], 1), ("", ["/dev/accel0"], 0), ("", ["/dev/nvidia0"], 0),
    ("", ["/dev/vfio/0"], 0), ("cuda,cpu", [], 0), ("", ["/dev/nvidiactl", "/dev/vfio/vfio"], 1)])
def test_freed_memory_is_kept_on_a_cpu_alone(monkeypatch, tmp_path, platforms, files, kept):
    calls = []

    def stop(_):
        raise UserError("far enough")

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(command.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    monkeypatch.setattr(command, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(setup, "setup", stop)
    with pytest.raises(UserError, match="far enough"):
        command.main(["mini", "--output", str(tmp_path / "run")])
    assert len(calls) == kept
