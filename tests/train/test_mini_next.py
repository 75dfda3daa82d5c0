"""The miniature on larger pictures: its recipe, its variants and, slowly, a short run from drawing to report."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from llava_jax.config import load_recipe
from llava_jax.train.loop import train
from llava_jax.train.optimizer import trainable_paths
from llava_jax.train.setup import setup

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate_next.py"


@pytest.fixture
def ablate(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablate_next", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def recipe(name):
        monkeypatch.setenv(module.VARIABLE, name)
        return module.recipe()

    module.variant = recipe
    return module


def test_tiles_and_newlines_of_every_picture(tmp_path):
    recipe = dataclasses.replace(load_recipe("mini_next"), output=str(tmp_path))
    context = setup(recipe)
    # The first tile has 6 x 6 tokens. Each row of the canvas has a newline, and nothing is padding.
    expected = {(120, 120): (5, 36 + 12 * 13), (180, 60): (4, 36 + 6 * 19), (60, 180): (4, 36 + 18 * 7)}
    layouts = {size: context.model.processor.layout(*size) for size in expected}
    assert {size: (layout.tiles, len(layout.index)) for size, layout in layouts.items()} == expected
    instruct = recipe.stages["instruct"]
    assert "image_newline" in trainable_paths(instruct, list(context.shardings))
    assert "image_newline" not in trainable_paths(recipe.stages["align"], list(context.shardings))
    assert max(tiles for tiles, _ in expected.values()) == instruct.data.tiles_per_sequence


def test_variants_differ_in_what_they_compare_alone(ablate):
    tiles, mini = ablate.variant("tiles"), ablate.variant("full tuning")
    for name in ablate.TILES[1:]:
        one = ablate.variant(name)
        assert one.stages["align"] == tiles.stages["align"]
        data = dataclasses.replace(tiles.stages["instruct"].data, sequence_length=192, tiles_per_sequence=1)
        assert one.stages["instruct"] == dataclasses.replace(tiles.stages["instruct"], data=data)
    counts = {name: ablate.trainable_count(name) for name in ablate.LORA}
    # Four layers of 128: q, k, v, o 128 x 128, and three of 128 x 384. The projector has two of 128 x 128, with biases.
    projector = 2 * (128 * 128 + 128)
    for rank in (8, 32):
        assert counts[f"LoRA, rank {rank}"] == projector + 4 * rank * (4 * (128 + 128) + 3 * (128 + 384))
    assert counts["projector alone"] == projector < counts["full tuning"] < 1.1e6
    for name in ablate.LORA:
        other = ablate.variant(name)
        assert other.stages["align"] == mini.stages["align"]
        assert other.stages["instruct"].steps == mini.stages["instruct"].steps


@pytest.mark.slow
def test_a_short_run_draws_trains_and_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mini_next")
    module = sys.modules[type(recipe).__module__]
    for owner in (module, sys.modules[type(module.MINI).__module__]):
        for name, value in {"TRAIN": 80, "TEST": 12, "VALIDATION": 8}.items():
            monkeypatch.setattr(owner, name, value)
    stages = {name: dataclasses.replace(stage, steps=2) for name, stage in recipe.stages.items()}
    recipe = dataclasses.replace(recipe, stages=stages)
    recipe.prepare()
    recipe.finish(train(recipe))
    report = json.loads(Path("runs/mini_next/report.json").read_text())
    assert set(report["accuracy"]) == {"trained", "blind"} and 150 <= report["visual_tokens"] <= 192
