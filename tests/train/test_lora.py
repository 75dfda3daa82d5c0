"""Runs that train adapters: resumed with the same bits, only adapters and projector saved, a merged model."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models import lora
from llava_jax.train import batches, loop, setup
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.weights import load_checkpoint

LORA = config.Lora(rank=4, alpha=8.0, dropout=0.25)
FROZEN = ("(vision|decoder)/(?!.*/lora_).*", None)


@pytest.fixture
def make_recipe(parts, data, tmp_path):
    def make(name: str, quantize: str = "nf4", adapters: config.Lora | None = LORA, **changes) -> config.Recipe:
        rows = config.Data(path=str(data), sequence_length=128, tiles_per_sequence=4)
        align = config.Stage(learning_rates=(("projector/.*", 1e-2), ("(vision|decoder)/.*", None)), data=rows,
                             batch_size=4, steps=2)
        instruct = dataclasses.replace(align, learning_rates=(("projector/.*", 1e-3), (".*/lora_.*", 1e-2), FROZEN),
                                       gradient_accumulation=2, steps=3)
        model = config.Model(vision=str(parts[0]), language=str(parts[1]), lora=adapters, quantize=quantize)
        return config.Recipe(model=model, stages={"align": align, "instruct": instruct}, output=str(tmp_path / name),
                             mesh=config.Mesh(fsdp=1), log_every=1, checkpoint_every=1, **changes)

    return make


def parameters(recipe: config.Recipe) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in load_checkpoint(recipe.output + "/model")[1].items()}


def kill(monkeypatch, recipe: config.Recipe, step: int) -> None:
    original, count = batches.shard_batch, [0]

    def shard_batch(*arguments):
        count[0] += 1
        if count[0] == step:
            raise RuntimeError("the machine is gone")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "shard_batch", shard_batch)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            loop.train(recipe)


def check_saved(directory: Path) -> None:
    """A checkpoint has adapters and projector, and two moments of each, alone."""
    checkpoints = Checkpoints(directory, 1, 2)
    saved = checkpoints._read_meta(3)["digests"]
    checkpoints.close()
    trained = saved["trainable"].keys()
    assert len(trained) == 14 + 4
    assert all(path.startswith("projector/") or lora.is_adapter(path) for path in trained)
    moments = [path for path in saved["optimizer"] if not path.endswith("count")]
    assert sorted(next(name for name in trained if path.endswith(name)) for path in moments) == sorted([*trained] * 2)


@pytest.mark.bits
def test_a_killed_run_with_dropout_ends_with_the_same_bits(make_recipe, monkeypatch, parts, capsys):
    whole, cut = make_recipe("whole"), make_recipe("cut")
    loop.train(whole)
    printed = capsys.readouterr().out
    assert "LoRA of rank 4, scale 2, dropout 0.25: 14 matrices, 4,096 parameters, in dec" in printed
    assert "frozen kernels of the decoder's layers are stored in nf4" in printed
    check_saved(Path(whole.output, "checkpoints", "instruct"))
    kill(monkeypatch, cut, step=5)
    shutil.copytree(whole.output + "/adapter", cut.output + "/adapter")  # that of a run killed as it wrote the model
    loop.train(cut)
    expected, base = parameters(whole), {}
    for path, x in parameters(cut).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)
    for folder in parts:
        base |= {path: np.asarray(x) for path, x in load_checkpoint(folder)[1].items()}

    # The merged model is the base, not its 4 bits, with the product of the factors in the folder.
    factors = load_file(whole.output + "/adapter/adapter_model.safetensors")
    names = {"attention": "self_attn", "mlp": "mlp"}
    for path, x in base.items():
        _, _, *block, kind = path.split("/") if path.startswith("decoder/layers/") else ("", "", "")
        if kind != "kernel":
            unpadded = expected[path][tuple(map(slice, x.shape))]  # without new tokens
            np.testing.assert_array_equal(unpadded, x, err_msg=path)
            continue
        for layer in range(2):
            name = f"base_model.model.model.language_model.layers.{layer}.{names[block[0]]}.{block[1]}"
            a, b = (factors[f"{name}.lora_{half}.weight"].astype(np.float64) for half in "AB")
            merged = x[layer] + (2 * b @ a).T.reshape(x[layer].shape)
            np.testing.assert_allclose(expected[path][layer], merged, atol=1e-6, err_msg=name)
            assert np.abs(expected[path][layer] - x[layer]).max() > 1e-4


@pytest.mark.slow
def test_adapters_change_nothing_before_they_are_trained(make_recipe):
    """The projector of a first stage is the same with adapters and without."""
    models = []
    for name, adapters in (("with", LORA), ("without", None)):
        recipe = make_recipe(name, "none", adapters)
        recipe = dataclasses.replace(recipe, stages={"align": recipe.stages["align"]})
        loop.train(recipe)
        models.append(parameters(recipe))
    for path, x in models[0].items():
        np.testing.assert_array_equal(x, models[1][path], err_msg=path)


def test_recipes_that_cannot_train_adapters_are_refused(make_recipe):
    recipe = make_recipe("run", "int8", None)
    full = dataclasses.replace(recipe.stages["align"], learning_rates=(("(projector|decoder)/.*", 1e-3), ("v.*", None)))
    with pytest.raises(UserError, match="model.quantize int8: every stage trains all kernels"):
        setup.setup(dataclasses.replace(recipe, stages={"full": full}))
    with pytest.raises(UserError, match=r"stages.instruct.learning_rates: \.\*/lora_\.\* matches no parameter"):
        setup.setup(recipe)
    with pytest.raises(UserError, match="model.lora.targets: 'decoder/lm_head' matches decoder/lm_head, which takes"):
        setup.setup(make_recipe("run", adapters=config.Lora(targets=("decoder/lm_head",))))
