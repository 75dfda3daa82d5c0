"""Checkpoints of a LoRA run leave as adapters, which open beside the base and continue in another run."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from safetensors.numpy import load_file, save_file

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.train import loop, restore
from llava_jax.train.setup import setup
from llava_jax.weights import checkpoint, load_checkpoint, peft

RATES = ((".*/lora_.", 1e-2), ("projector/.*", 1e-3), ("(vision|decoder)/(?!.*/lora_).*", None))
FROZEN = ((".*/lora_.", 1e-2), ("(?!.*/lora_).*", None))


@pytest.fixture(scope="module")
def recipe(parts, data, tmp_path_factory):
    """A finished run of two stages, which train adapters and the projector."""
    rows = config.Data(path=str(data), sequence_length=128, tiles_per_sequence=4)
    align = config.Stage(learning_rates=RATES, data=rows, batch_size=2, steps=2)
    recipe = config.Recipe(
        model=config.Model(vision=str(parts[0]), language=str(parts[1]), lora=config.Lora(rank=4, alpha=8.0)),
        stages={"align": align, "instruct": dataclasses.replace(align, steps=4)},
        output=str(tmp_path_factory.mktemp("runs") / "run"), mesh=config.Mesh(fsdp=1), checkpoint_every=2)
    loop.train_stages(setup(recipe))
    return recipe


def test_the_recipe_comes_back(recipe):
    assert restore.read_recipe(f"{recipe.output}/recipe.json") == recipe


@pytest.mark.parametrize("layout", ["peft", "original-lora"])
def test_a_run_leaves_as_an_adapter(recipe, parts, tmp_path, layout):
    result = run_command("convert", recipe.output, tmp_path / "adapter", "--to", layout, "--dtype", "keep")
    assert result.code == 0, result.err
    opened = checkpoint.open_checkpoint(parts[1], vision=parts[0], adapter=tmp_path / "adapter")
    merged, opened = peft.merge(*opened)
    parameters = checkpoint.load_source("adapter", opened)
    finished, expected = load_checkpoint(f"{recipe.output}/model")
    assert merged == dataclasses.replace(finished, text=merged.text)  # an export pads the vocabulary
    assert parameters.keys() == expected.keys()
    for path, x in expected.items():
        rows = len(parameters[path]) if path == "decoder/embedding" else None
        columns = parameters[path].shape[1] if path == "decoder/lm_head/kernel" else None
        np.testing.assert_array_equal(parameters[path], x[:rows, :columns] if columns else x[:rows], err_msg=path)


def test_checkpoints_within_a_stage(recipe, parts, tmp_path):
    folder = f"{recipe.output}/checkpoints"
    steps = {}
    for name in ("instruct/2", "instruct/4", "instruct", "align"):
        run = restore.open_run(Path(folder, name))
        steps[name] = {path: run.parameters.read(path, 0 if "/layers/" in path else None)
                       for path in run.parameters.shapes if path in run.trained}
    b = "decoder/layers/mlp/up_proj/adapter/lora_b"
    for earlier, later in (("align", "instruct/2"), ("instruct/2", "instruct")):
        assert steps[earlier][b].any() and not np.array_equal(steps[earlier][b], steps[later][b])
    np.testing.assert_array_equal(steps["instruct/4"][b], steps["instruct"][b])
    for step in ("3", "newest"):
        result = run_command("convert", f"{folder}/instruct/{step}", tmp_path / "adapter", "--to", "peft")
        assert result.code == 2 and not (tmp_path / "adapter").exists()
        assert f"instruct/{step}: no such checkpoint; this stage has those of step 2, 4" in result.err
    assert restore.open_run(Path("/model")) is None


def test_what_a_run_has_is_told_where_it_is_mistaken_for_a_model(recipe, parts):
    result = run_command("generate", "--model", f"{recipe.output}/checkpoints/instruct/4", "--prompt", "What?")
    assert result.code == 2 and "instruct/4: a checkpoint of a run" in result.err and "4 DST --to hf" in result.err
    for folder, hint in (("", "one is in .*run/adapter$"), ("/checkpoints/instruct/4", "convert .*/4 DST --to peft$")):
        with pytest.raises(UserError, match=f"not the folder of an adapter; .*{hint}"):
            checkpoint.open_checkpoint(parts[1], vision=parts[0], adapter=recipe.output + folder)


def test_another_base_than_the_run_started_from_is_refused(recipe, parts, tmp_path):
    run = shutil.copytree(recipe.output, tmp_path / "run")
    language = shutil.copytree(parts[1], tmp_path / "language")
    tensors = load_file(language / "model.safetensors")
    tensors = {name: -x if name.endswith("q_proj.weight") else x for name, x in tensors.items()}
    save_file(tensors, language / "model.safetensors", metadata={"format": "pt"})
    stored = (run / "recipe.json").read_text()
    (run / "recipe.json").write_text(stored.replace(str(parts[1]), str(language)))
    result = run_command("convert", run, tmp_path / "adapter", "--to", "peft")
    assert result.code == 2 and not (tmp_path / "adapter").exists()
    assert f"{language}: its kernels are not those that {run} was trained with" in result.err


def test_a_run_continues_from_an_adapter(recipe, parts, tmp_path):
    """Its projector stays frozen, and leaves with the adapters."""
    run_command("convert", recipe.output, tmp_path / "adapter", "--to", "peft", "--dtype", "keep")
    model = dataclasses.replace(recipe.model, lora=None, adapter=str(tmp_path / "adapter"))
    stage = dataclasses.replace(recipe.stages["align"], learning_rates=FROZEN)
    again = dataclasses.replace(recipe, model=model, stages={"align": stage}, output=str(tmp_path / "again"))
    loop.train_stages(setup(again))
    run = restore.open_run(tmp_path / "again")
    path = "decoder/layers/mlp/up_proj/adapter/lora_a"
    before = restore.open_run(Path(recipe.output)).parameters.read(path, 0)
    assert run.config.lora == recipe.model.lora
    assert 0 < np.abs(run.parameters.read(path, 0) - before).max() < 0.1
    result = run_command("convert", tmp_path / "again", tmp_path / "second", "--to", "peft", "--dtype", "keep")
    assert result.code == 0, result.err
    opened = checkpoint.open_checkpoint(parts[1], vision=parts[0], adapter=tmp_path / "second")[1]
    for name in ("projector/layers_0/kernel", "projector/layers_1/bias"):
        np.testing.assert_array_equal(opened.read(name, None), run.parameters.read(name, None))
    np.testing.assert_array_equal(opened.read(path, 0), run.parameters.read(path, 0))
