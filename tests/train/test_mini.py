"""The miniature's recipes in two languages, the variants of its ablations and, slowly, a short run with its report."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_report import Page

from llava_jax import cli
from llava_jax.config import load_recipe
from llava_jax.errors import UserError
from llava_jax.train.loop import train
from llava_jax.train.optimizer import trainable_paths
from llava_jax.train.setup import setup

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate_mini.py"


@pytest.fixture
def ablate(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("ablate_mini", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv(module.RANDOM_TOWER, str(tmp_path / "tower"))
    module.write_random_tower(tmp_path / "tower")

    def recipe(name):
        monkeypatch.setenv(module.VARIABLE, name)
        return module.recipe()

    module.variant = recipe
    return module


def test_each_choice_of_instructions_is_a_file_of_its_own():
    mini, korean = load_recipe("mini"), load_recipe("mini_korean")
    path = lambda recipe: recipe.stages["instruct"].data.path  # noqa: E731
    assert path(mini) == "runs/mini/data/instructions.json" and mini.korean == 0 and korean.korean == 0.25
    assert path(korean) == "runs/mini/data/instructions_25_korean.json"
    half = cli.parse(type(korean), ["--korean", "0.5", "--no-places"], default=korean)
    assert path(half) == "runs/mini/data/instructions_50_korean_pairs.json"
    for mine in ("mine.json", "mine/instructions.json", "runs/mini/data/instructions_mine.json"):
        own = cli.parse(type(mini), ["--stages.instruct.data.path", mine, "--korean", "0.1"], default=mini)
        assert path(own) == mine
    eighth = dataclasses.replace(mini, korean=0.125)
    assert path(dataclasses.replace(eighth, korean=0.25)) == path(korean) != path(eighth)
    with pytest.raises(UserError, match="korean is 25"):
        dataclasses.replace(mini, korean=25)
    data = dataclasses.replace(korean.stages["instruct"].data, path=path(mini))
    assert dataclasses.replace(korean.stages["instruct"], data=data) == mini.stages["instruct"]
    assert korean.stages["align"] == mini.stages["align"]


def test_variants_train_as_many_steps_and_their_tables_match_their_parameters(ablate, tmp_path):
    mini = ablate.variant("as it is")
    for name in {variant for variants, _ in ablate.TABLES.values() for variant in variants}:
        recipe = dataclasses.replace(ablate.variant(name), output=str(tmp_path / "run"))
        context = setup(recipe)
        trained = trainable_paths(recipe.stages["instruct"], list(context.shardings))
        assert ("image_newline" in trained) == (name in ("tiles", "all three"))
        if name != "without stage 1":
            assert [stage.steps for stage in recipe.stages.values()] == [stage.steps for stage in mini.stages.values()]
        layout, data = context.model.processor.layout(60, 60), recipe.stages["instruct"].data
        assert (layout.tiles, len(layout.index)) == {
            "2 x 2": (1, 9), "tiles": (5, 36 + 12 * 13), "all three": (5, 9 + 6 * 7)}.get(name, (1, 36))
        assert data.tiles_per_sequence == 2 * layout.tiles
        assert data.sequence_length >= 336 + 2 * (len(layout.index) - 36)  # room for as much text
        assert recipe.places == (name not in ("no mend", "2 x 2", "tiles"))
    with pytest.raises(ValueError, match="unheard of"):
        ablate.variant("unheard of")


@pytest.mark.slow
def test_a_short_run_draws_trains_and_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mini_korean")
    module = sys.modules[type(recipe).__module__]
    for name, value in {"TRAIN": 80, "TEST": 24, "VALIDATION": 8, "UNSEEN": 8, "PROBE": 200}.items():
        monkeypatch.setattr(module, name, value)
    recipe = dataclasses.replace(recipe, stages={
        name: dataclasses.replace(stage, steps=2) for name, stage in recipe.stages.items()})
    recipe.prepare()
    rows = json.loads(Path("runs/mini/data/instructions_25_korean.json").read_text())
    korean = [any("가" <= character <= "힣" for character in row["conversations"][0]["value"]) for row in rows]
    assert 10 <= sum(korean) <= 30 and len(rows) == 80
    recipe.finish(train(recipe))
    report = json.loads(Path("runs/mini_korean/report.json").read_text())
    assert set(report["probes"]) == {"English", "another picture", "shuffled patches", "Korean", "guessing"}
    page = Page(Path("runs/mini_korean/report.html").read_text())
    assert {"Probes in two languages", "Probes of places"} <= set(page.tables)
    assert [language for language, kind, _ in page.chats if kind == "question"] == 2 * (4 * ["en"] + 4 * ["ko"])
