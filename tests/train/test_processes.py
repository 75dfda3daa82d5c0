"""Whole runs of several processes: the losses of one, a stop in time, and one that dies."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax import config
from llava_jax.train import loop
from llava_jax.weights import load_checkpoint

SCRIPT = Path(__file__).with_name("train_process.py")


def recipe_of(parts, data, output: Path, mesh: config.Mesh) -> config.Recipe:
    """One stage of eight steps, whose rows go through the 24 records about twice."""
    stage = config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)), batch_size=8, steps=8,
                         data=config.Data(path=str(data), sequence_length=128, tiles_per_sequence=4))
    return config.Recipe(model=config.Model(vision=str(parts[0]), language=str(parts[1]), template="vicuna_v1"),
                         stages={"align": stage}, output=str(output), mesh=mesh, log_every=1, checkpoint_every=2)


@pytest.fixture
def make_recipe(parts, data, tmp_path) -> Callable[[str, config.Mesh], config.Recipe]:
    return lambda name, mesh: recipe_of(parts, data, tmp_path / name, mesh)


@pytest.fixture
def train_alone(monkeypatch) -> Callable[[config.Recipe], None]:
    """One process, this one, with one device."""
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    return lambda recipe: loop.train(dataclasses.replace(recipe, mesh=config.Mesh()))


@pytest.fixture(scope="module")
def whole(parts, data, tmp_path_factory) -> config.Recipe:
    """A finished run of one process."""
    recipe = recipe_of(parts, data, tmp_path_factory.mktemp("whole") / "run", config.Mesh())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        loop.train(recipe)
    return recipe


def train(recipe: config.Recipe, count: int, event: str = "none", process: int | str = 0, step: int = 9
          ) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, and what each process wrote on stdout and stderr; `count` of them have eight devices in all."""
    file = Path(recipe.output + ".py")
    file.write_text(f"from llava_jax.config import *\ndef recipe():\n    return {recipe!r}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // count}"}
    command = [sys.executable, str(SCRIPT), event, str(process), str(step), str(file)]
    processes = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(count)]
    try:
        both = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # All print the template that was chosen, and process 0 its progress.
    errors = [re.sub(r"^(template|align \d).*\n", "", err, flags=re.MULTILINE) for _, err in both]
    return [process.returncode for process in processes], [out for out, _ in both], errors


def lines(recipe: config.Recipe) -> list[dict]:
    return [json.loads(line) for line in open(recipe.output + "/metrics.jsonl")]


def assert_same_run(ours: config.Recipe, theirs: config.Recipe) -> None:
    assert [line["step"] for line in lines(ours)] == [line["step"] for line in lines(theirs)]
    steps = [[line for line in lines(recipe) if "loss" in line] for recipe in (ours, theirs)]
    for line, expected in zip(*steps, strict=True):
        for name in ("tokens", "supervised_tokens", "images", "row_fill", "slot_fill", "skipped"):
            assert line[name] == expected[name]
        np.testing.assert_allclose(line["loss"], expected["loss"], rtol=2e-5)
        np.testing.assert_allclose(line["grad_norm"], expected["grad_norm"], rtol=2e-4)
    parameters = load_checkpoint(theirs.output + "/model")[1]
    for path, x in load_checkpoint(ours.output + "/model")[1].items():
        np.testing.assert_allclose(x, parameters[path], rtol=2e-5, atol=3e-5, err_msg=path)


def test_a_signal_to_one_process_stops_all_at_one_step(make_recipe, whole, train_alone):
    recipe = make_recipe("two", config.Mesh(data=2, fsdp=4))
    codes, outputs, errors = train(recipe, 2, "SIGTERM", process=1, step=4)
    assert codes == [75, 75], errors
    stopped = re.fullmatch(r"stopped at step (\d) of stage align; the same command goes on from there\n", errors[0])
    assert errors[1] == "" and "training on 8" in outputs[0] and "training on" not in outputs[1]
    assert [line["step"] for line in lines(recipe)] == list(range(1, int(stopped[1]) + 1))
    assert max(map(int, os.listdir(recipe.output + "/checkpoints/align"))) == int(stopped[1]) in (4, 5, 6, 7)
    train_alone(recipe)
    assert_same_run(recipe, whole)


@pytest.mark.slow
def test_four_processes_stop_and_two_go_on(make_recipe, whole):
    recipe = make_recipe("four", config.Mesh(data=2, fsdp=2, tensor=2))
    codes, _, errors = train(recipe, 4, "SIGINT", process=3, step=3)
    assert codes == [130] * 4, errors
    codes, _, errors = train(dataclasses.replace(recipe, mesh=config.Mesh()), 2)
    assert codes == [0, 0], errors
    assert_same_run(recipe, whole)


@pytest.mark.slow
def test_two_processes_count_the_steps_of_their_epochs(make_recipe, train_alone):
    """Each measures a half of the records, and process 0 stores the lengths beside the data."""
    def make(name: str, mesh: config.Mesh) -> config.Recipe:
        recipe = make_recipe(name, mesh)
        return dataclasses.replace(recipe, stages={
            "align": dataclasses.replace(recipe.stages["align"], steps=None, epochs=2)})

    alone, two = make("alone", config.Mesh()), make("two", config.Mesh(data=2, fsdp=4))
    folder = Path(two.stages["align"].data.path).parent
    for path in folder.glob(".*lengths*"):
        path.unlink()
    codes, outputs, errors = train(two, 2)
    assert codes == [0, 0], errors
    assert "counting the packed rows" in outputs[0] and len(list(folder.glob(".*lengths*"))) == 1
    train_alone(alone)
    assert_same_run(two, alone)


def test_a_killed_process_ends_the_run_and_one_goes_on_from_its_checkpoint(make_recipe, whole, train_alone):
    recipe = make_recipe("killed", config.Mesh())
    codes, _, errors = train(recipe, 2, "SIGKILL", process=0, step=6)
    assert codes == [-signal.SIGKILL, 75]
    assert re.match(r"error: process 0 \(\S+\): has ended without a word", errors[1])
    assert len(errors[1].splitlines()) == 1
    assert "2" in os.listdir(recipe.output + "/checkpoints/align")
    train_alone(recipe)
    assert_same_run(recipe, whole)


@pytest.mark.slow
def test_two_processes_validate_and_answer_samples(make_recipe, train_alone, data):
    def make(name: str, mesh: config.Mesh) -> config.Recipe:
        recipe = dataclasses.replace(make_recipe(name, mesh), sample_every=8)
        stage = recipe.stages["align"]
        return dataclasses.replace(recipe, stages={"align": dataclasses.replace(
            stage, data=dataclasses.replace(stage.data, validation=str(data)))})

    def logged(recipe: config.Recipe, name: str):
        return next(line[name] for line in lines(recipe) if name in line)

    alone, two = make("alone", config.Mesh()), make("two", config.Mesh(data=2, fsdp=4))
    train_alone(alone)
    codes, _, errors = train(two, 2)
    assert codes == [0, 0], errors
    assert len(logged(two, "samples")) == 4 and logged(two, "samples") == logged(alone, "samples")
    np.testing.assert_allclose(logged(two, "validation_loss"), logged(alone, "validation_loss"), rtol=2e-5)


def test_two_processes_set_a_damaged_checkpoint_aside(make_recipe, whole):
    two = dataclasses.replace(whole, output=f"{whole.output}-two", mesh=config.Mesh(data=2, fsdp=4))
    shutil.copytree(whole.output, two.output)
    shutil.rmtree(two.output + "/model")
    newest = Path(two.output, "checkpoints", "align", "8", "trainable")
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    codes, outputs, errors = train(two, 2)
    assert codes == [0, 0], errors
    assert "align/8: this checkpoint is damaged" in outputs[0] and "the one before, of step 6" in outputs[0]
    assert f"the model is {two.output}/model\n" in outputs[0] and "the model is" not in outputs[1]
    assert_same_run(two, whole)


@pytest.mark.parametrize("signals, code", [
    ("SIGTERM+SIGTERM", 75), *(pytest.param(signals, code, marks=pytest.mark.slow) for signals, code in (
        ("SIGINT", 130), ("SIGTERM+SIGTERM+SIGTERM", 75), ("SIGINT+SIGTERM", 130)))])
def test_a_signal_to_a_process_and_its_workers_saves_everything(make_recipe, signals, code):
    """As `timeout` and schedulers send SIGTERM, twice and to all, and a terminal Ctrl-C."""
    recipe = make_recipe("stopped", config.Mesh())
    stage = recipe.stages["align"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, workers=2))
    recipe = dataclasses.replace(recipe, stages={"align": stage}, checkpoint_every=100)
    codes, _, errors = train(recipe, 1, signals, step=4)
    assert codes == [code], errors
    assert errors == ["stopped at step 4 of stage align; the same command goes on from there\n"]
    assert [line["step"] for line in lines(recipe)] == [1, 2, 3, 4]
    assert [path.name for path in Path(recipe.output, "checkpoints", "align").iterdir()] == ["4"]


def test_a_signal_before_the_first_step_ends_all(make_recipe):
    codes, _, errors = train(make_recipe("early", config.Mesh()), 2, "early", process=1)
    assert codes == [75, 75], errors
    assert re.fullmatch(r"error: process 1 \(\S+\): was stopped\n", errors[0])
    assert "stopped by SIGTERM" in errors[1] and "Traceback" not in errors[1]


@pytest.mark.parametrize("error, count, processes", [
    ("JaxRuntimeError", 2, "1"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("JaxRuntimeError", 1, "0"), ("OSError", 1, "0"), ("MemoryError", 2, "01")))])
def test_an_error_that_no_user_can_mend_ends_with_1(make_recipe, error, count, processes):
    codes, _, errors = train(make_recipe("failed", config.Mesh()), count, error, processes, step=3)
    assert codes == [1] * count, errors
    for process, told in enumerate(errors):
        assert ("Traceback" in told) == (str(process) in processes)
        assert str(process) in processes or re.match(rf"error: process 1 \(\S+\): {error}: RESOURCE_EXHAUSTED", told)


@pytest.mark.parametrize("event, count", [
    ("folder", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("folder", 1), ("rename", 1), ("rename", 2)))])
def test_an_output_that_breaks_in_mid_run_ends_it(make_recipe, event, count):
    """And soon: Orbax's threads would wait for each other, 5 to 20 minutes, while `train` gives up after 5."""
    recipe = dataclasses.replace(make_recipe("broken", config.Mesh()), log_every=100)
    codes, _, errors = train(recipe, count, event, process=0, step=3)
    assert codes == [1] * count, errors
    assert re.search(r"^OSError: \[Errno 5\] Input/output error", errors[0], re.MULTILINE)
    assert "Traceback" in errors[0] and len(errors) == 1 or errors[1].startswith("error: process 0 (")


def test_a_process_that_does_not_load_its_parameters_is_named(make_recipe):
    codes, _, errors = train(make_recipe("loading", config.Mesh()), 2, "loading", process=1, step=0)
    assert codes == [75, 75]
    for told in errors:
        assert re.fullmatch(r"error: \S+vision: vision/\S+ is read: waited 1 s for process 1 \(\S+\)\n", told)


def test_a_bad_image_on_one_host_is_told_by_all(make_recipe, data, tmp_path):
    rows = [row for row in json.loads(data.read_text()) if "image" in row][:8]
    rows[0]["image"] = "gone.png"
    broken = data.parent / "one_gone.json"
    broken.write_text(json.dumps(rows))
    recipe = make_recipe("bad", config.Mesh())
    stage = recipe.stages["align"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=str(broken)))
    codes, _, errors = train(dataclasses.replace(recipe, stages={"align": stage}), 2)
    assert codes == [2, 2]
    # The rows are tried on every process before the first step, so that one of them or all may be first to say it.
    line = r"^error: (process \d \(\S+\): )?\S+one_gone.json, row 1 .*gone.png: no such image file$"
    assert all(re.search(line, text, re.MULTILINE) and "Traceback" not in text for text in errors), errors
