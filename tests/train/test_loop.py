"""A run of both stages: stopped and continued it gives the same bits; frozen parameters keep theirs."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.train import batches, loop, metrics, validation
from llava_jax.train import stage as trainer
from llava_jax.weights import load_checkpoint, read_config


def recipe_of(parts, data, output: Path, **changes) -> config.Recipe:
    """Two stages of two micro-batches; the second goes through its 24 records several times."""
    rows = config.Data(path=str(data), sequence_length=128, tiles_per_sequence=4)
    stages = {
        "align": config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)),
                              data=rows, batch_size=4, gradient_accumulation=2, steps=5),
        "instruct": config.Stage(learning_rates=(("(projector|decoder)/.*", 1e-3), ("vision/.*", None)),
                                 data=dataclasses.replace(rows, validation=str(data)),
                                 batch_size=4, gradient_accumulation=2, steps=7),
    }
    model = config.Model(vision=str(parts[0]), language=str(parts[1]))
    return config.Recipe(model=model, stages=stages, output=str(output), mesh=config.Mesh(fsdp=1),
                         log_every=2, checkpoint_every=100, **changes)


@pytest.fixture
def make_recipe(parts, data, tmp_path) -> Callable[..., config.Recipe]:
    return lambda name="run", **changes: recipe_of(parts, data, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def whole(parts, data, tmp_path_factory) -> tuple[config.Recipe, list]:
    """A run that nothing stopped, and its compiled steps."""
    steps, original = [], trainer.make_train_step
    recipe = recipe_of(parts, data, tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", lambda *args: steps.append(original(*args)) or steps[-1])
        loop.train(recipe)
    return recipe, steps


def parameters(recipe: config.Recipe) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in load_checkpoint(recipe.output + "/model")[1].items()}


def lines(recipe: config.Recipe) -> list[dict]:
    """The metrics without what depends on the clock, and without when a window was cut."""
    return [json.loads(line) for line in open(recipe.output + "/metrics.jsonl")]


def stop_at(monkeypatch, step: int) -> None:
    """Sends SIGTERM to this process when the micro-batches of the `step`-th step from now go to the devices."""
    original, count = batches.shard_batch, [0]

    def shard_batch(mesh, batch, micro_batches):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(mesh, batch, micro_batches)

    monkeypatch.setattr(batches, "shard_batch", shard_batch)


def break_down(monkeypatch, recipe: config.Recipe, step: int) -> None:
    """Runs the recipe up to its `step`-th step, where it dies without notice."""
    original, count = batches.shard_batch, [0]

    def shard_batch(mesh, batch, micro_batches):
        count[0] += 1
        if count[0] == step:
            raise RuntimeError("the machine is gone")
        return original(mesh, batch, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "shard_batch", shard_batch)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            loop.train(recipe)


@pytest.mark.bits
def test_a_run_that_was_stopped_in_both_stages_ends_with_the_same_bits(make_recipe, whole, monkeypatch):
    # The signal comes between the micro-batches' arrival and the step: steps 3 of 5, then 4 of 7, both within an epoch.
    cut = make_recipe("cut")
    for stage, step in (("align", 3), ("instruct", 2 + 4)):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(loop.Stopped, match=f"of stage {stage}") as stopped:
                loop.train(cut)
        assert stopped.value.signal == signal.SIGTERM
    loop.train(cut)
    ours, theirs = parameters(cut), parameters(whole[0])
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    seen = [(line["stage"], line["step"]) for line in lines(cut) if "loss" in line]
    assert seen == [("align", 2), ("align", 4), ("align", 5),
                    ("instruct", 2), ("instruct", 4), ("instruct", 6), ("instruct", 7)]
    last, expected = lines(cut)[-1], lines(whole[0])[-1]
    assert last["validation_loss"] == expected["validation_loss"]


def test_the_host_waits_only_for_steps_that_are_two_behind(make_recipe, monkeypatch):
    dispatched, waits, wait = [], [], jax.block_until_ready
    add = metrics.MetricsWindow.add

    def record(window, step, batch):
        dispatched.append(step)
        add(window, step, batch)

    def block_until_ready(steps):
        if isinstance(steps, list):
            waits.append((len(dispatched), [i for i, step in enumerate(dispatched, 1) if step in steps]))
        return wait(steps)

    monkeypatch.setattr(metrics.MetricsWindow, "add", record)
    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)
    recipe = make_recipe()
    loop.train(dataclasses.replace(recipe, stages={"align": recipe.stages["align"]}, log_every=4))
    # The metrics of step 4 are logged, so all steps before it are finished.
    assert trainer.MAX_STEPS_IN_FLIGHT == 2 and waits == [(1, []), (2, []), (3, [1]), (4, [2]), (5, [])]


def test_a_killed_run_goes_on_from_its_last_checkpoint(make_recipe, whole, monkeypatch):
    cut = dataclasses.replace(make_recipe("cut", keep_checkpoints=1), checkpoint_every=2)
    break_down(monkeypatch, cut, step=4)
    loop.train(cut)
    theirs = parameters(whole[0])
    for path, x in parameters(cut).items():
        np.testing.assert_array_equal(x, theirs[path], err_msg=path)


@pytest.mark.bits
def test_frozen_parameters_keep_their_bits_and_each_stage_compiles_once(whole, parts):
    recipe, steps = whole
    after = parameters(recipe)
    for path, x in load_checkpoint(parts[0])[1].items():
        np.testing.assert_array_equal(after[path], np.asarray(x), err_msg=path)
    changed = [path for path, x in load_checkpoint(parts[1])[1].items()
               if not np.array_equal(after[path][: x.shape[0]], x)]
    assert "decoder/layers/mlp/up_proj/kernel" in changed
    assert [step._cache_size() for step in steps] == [1, 1]


def test_skipped_rows_are_counted_by_reason(make_recipe, data, tmp_path):
    rows = json.loads(data.read_text())
    rows[0]["image"] = "gone.png"
    rows[1]["conversations"] = [{"from": "human", "value": "<image>\nAnd?"}]
    broken = data.parent / "broken.json"
    broken.write_text(json.dumps(rows))
    recipe = make_recipe()
    stage = recipe.stages["align"]
    stage = dataclasses.replace(stage, steps=None, epochs=2,
                                data=dataclasses.replace(stage.data, path=str(broken), bad_rows="skip"))
    recipe = dataclasses.replace(recipe, stages={"align": stage})
    loop.train(recipe)
    skipped = lines(recipe)[-1]["skipped"]
    assert set(skipped) == {"missing_image", "no_supervised_tokens"}
    assert all(1 <= count <= 3 for count in skipped.values())


def test_another_recipe_does_not_go_on_in_the_same_directory(make_recipe):
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, stages={"align": dataclasses.replace(recipe.stages["align"], steps=1)})
    loop.train(recipe)
    loop.train(dataclasses.replace(recipe, log_every=1))
    with pytest.raises(UserError, match=r"holds a run of another recipe \(different: seed\)"):
        loop.train(dataclasses.replace(recipe, seed=1))


def test_a_loss_that_is_not_finite_ends_the_run(make_recipe):
    recipe = make_recipe()
    wild = dataclasses.replace(recipe.stages["instruct"], steps=20, optimizer=config.Optimizer(warmup_ratio=0.0),
                               learning_rates=(("(projector|decoder)/.*", 1e30), ("vision/.*", None)))
    recipe = dataclasses.replace(recipe, stages={"instruct": wild})
    with pytest.raises(UserError, match="the loss is (nan|inf) at step"):
        loop.train(recipe)


def test_a_model_that_is_not_finite_after_the_last_step_is_not_exported(make_recipe, data):
    recipe = make_recipe()
    wild = dataclasses.replace(recipe.stages["instruct"], steps=1, optimizer=config.Optimizer(warmup_ratio=0.0),
                               learning_rates=(("(projector|decoder)/.*", 1e30), ("vision/.*", None)))
    for path in ("", str(data)):
        stage = dataclasses.replace(wild, data=dataclasses.replace(wild.data, validation=path))
        with pytest.raises(UserError, match="the loss is (nan|inf) after the last step, 1; set lower learning rates"):
            loop.train(dataclasses.replace(recipe, stages={"instruct": stage}))
    assert not os.path.exists(recipe.output + "/model")
    assert not os.path.exists(recipe.output + "/checkpoints")
    json.loads(open(recipe.output + "/metrics.jsonl").read(), parse_constant=pytest.fail)


def test_a_validation_loss_that_is_not_finite_ends_the_run_each_time(make_recipe, monkeypatch):
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, stages={"instruct": dataclasses.replace(recipe.stages["instruct"], steps=2)})
    monkeypatch.setattr(validation.Evaluations, "_validate", lambda *_: (float("nan"), {}))
    for _ in range(2):  # also when it goes on from the checkpoint before the validation
        with pytest.raises(UserError, match="stages.instruct: the validation loss is nan after step 2; set lower"):
            loop.train(recipe)
    assert not os.path.exists(recipe.output + "/model")


def test_a_source_that_is_not_finite_is_named_before_the_first_step(make_recipe, parts, tmp_path):
    from safetensors.numpy import load_file, save_file

    vision = shutil.copytree(parts[0], tmp_path / "vision")
    tensors = load_file(vision / "model.safetensors")
    next(x for name, x in tensors.items() if name.endswith("pre_layrnorm.bias"))[3] = np.nan
    save_file(tensors, vision / "model.safetensors", {"format": "pt"})
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision=str(vision)))
    with pytest.raises(UserError, match="not finite"):
        loop.train(recipe)
    assert not os.path.exists(recipe.output)


def test_text_alone_trains_and_samples_are_answered(make_recipe, data, tmp_path):
    rows = [row for row in json.loads(data.read_text()) if "image" not in row]
    rows.insert(0, {"id": "bad", "conversations": []})
    text = tmp_path / "text.json"
    text.write_text(json.dumps(rows))
    recipe = make_recipe(sample_every=2)
    stage = recipe.stages["instruct"]
    stage = dataclasses.replace(stage, steps=2, data=dataclasses.replace(
        stage.data, path=str(text), validation="", bad_rows="skip"))
    loop.train(dataclasses.replace(recipe, stages={"instruct": stage}))
    line, samples = lines(recipe)
    assert line["images"] == 0 and line["tokens"] > 0 and line["skipped"] == {"malformed": line["skipped"]["malformed"]}
    asked = [row["conversations"][0]["value"] for row in rows[1:5]]
    assert [sample["question"] for sample in samples["samples"]] == asked


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_clean_metrics(make_recipe, monkeypatch):
    recipe = make_recipe()
    recipe = dataclasses.replace(recipe, stages={"align": recipe.stages["align"]})
    break_down(monkeypatch, recipe, step=4)
    with open(recipe.output + "/metrics.jsonl", "a") as file:
        file.write('{"stage": "align", "st')
    loop.train(recipe)
    assert [line["step"] for line in lines(recipe)] == [2, 4, 5]


def test_a_model_that_hugging_face_cannot_express_is_written_in_the_native_layout(make_recipe, capsys):
    recipe = make_recipe()
    stages = {"align": dataclasses.replace(recipe.stages["align"], steps=1)}
    recipe = dataclasses.replace(recipe, stages=stages, model=dataclasses.replace(
        recipe.model, projector="merge2x2_mlp2x_gelu"))
    loop.train(recipe)
    line = " has no form in Hugging Face's layout; linear and mlp2x_gelu have. The finished model"
    assert f"projector 'merge2x2_mlp2x_gelu'{line}" in capsys.readouterr().err
    assert read_config(recipe.output + "/model").projector == "merge2x2_mlp2x_gelu"
    assert parameters(recipe)["projector/layers_0/kernel"].shape == (4 * 32, 32)
    # It is the source of another run, which keeps its layout.
    again = dataclasses.replace(recipe, output=recipe.output + "-2", model=config.Model(llava=recipe.output + "/model"))
    loop.train(again)
    assert read_config(again.output + "/model") == read_config(recipe.output + "/model")


def test_going_on_from_a_whole_llava_keeps_its_template(make_recipe):
    first = make_recipe("first")
    first = dataclasses.replace(first, stages={"align": dataclasses.replace(first.stages["align"], steps=1)},
                                model=dataclasses.replace(first.model, template="mistral_instruct"))
    model = loop.train(first)
    second = dataclasses.replace(make_recipe("second"), model=config.Model(llava=str(model)), stages=first.stages)
    assert load_checkpoint(loop.train(second))[0].template == "mistral_instruct"
    with pytest.raises(UserError, match="model.projector is fixed by the checkpoint"):
        config.Model(llava=str(model), projector="linear")
