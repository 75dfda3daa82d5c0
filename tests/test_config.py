"""Recipes: mistakes in one line, overrides by dotted name, no field that nothing reads."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_command

from llava_jax import cli, config

REPOSITORY = Path(__file__).parent.parent
KINDS = (config.Model, config.Mesh, config.Data, config.Optimizer, config.Stage, config.Recipe)


@pytest.mark.parametrize("args,expected", [
    (["mino"], "recipe 'mino': no such recipe; did you mean mini?"),
    (["mini", "--stages.align.stpes", "3"], "did you mean --stages.align.steps?"),
    (["mini", "--stages.align.steps", "many"], "--stages.align.steps"),
    (["mini", "--stages.align.gradient_accumulation", "3"], "batch_size 8 is not divisible by gradient_accumulation 3"),
    (["mini", "--mesh.fsdp", "0"], "mesh.fsdp is 0"),
    (["mini", "--stages.align.learning_rates", "(", "0.1"], "'(' is no regular expression"),
    (["mini", "--model.image-mode", "anyres_max"], "model.image_mode 'anyres_max' is unknown; choose one of: crop"),
    (["mini", "--stages.align.data.image-mode", "square"], "data.image_mode 'square' is unknown"),
    (["mini", "--model.image-mode", "anyres", "--model.pinpoints", "big"], "pinpoints 'big': give sizes in pixels"),
    (["mini", "--model.pinpoints", "(60x60)"], "model.pinpoints are read with model.image_mode anyres"),
])
def test_a_mistake_is_one_line_and_exit_code_2(args, expected):
    done = run_command("train", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1 and done.err.startswith("error: ")
    assert expected in done.err


def test_debug_shows_where_a_mistake_was_found():
    command = [sys.executable, "-m", "llava_jax.train", "mino", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_recipes_are_found_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load_recipe("llava_1_5_13b").model.language.endswith("13b-v1.5")
    mini = config.load_recipe("mini")
    changed = cli.parse(type(mini), ["--seed", "3"], default=mini)
    assert type(changed) is type(mini) is not config.Recipe and changed.seed == 3


def test_overrides_by_dotted_name():
    recipe = config.load_recipe("mini")
    args = ["--stages.align.steps", "7", "--stages.instruct.data.bad_rows", "skip", "--seed", "3",
            "--stages.align.learning_rates", "projector/.*", "0.5", "(vision|decoder)/.*", "None"]
    changed = cli.parse(config.Recipe, args, default=recipe, prog="train")
    assert changed.stages["align"].steps == 7
    assert changed.stages["align"].learning_rates == (("projector/.*", 0.5), ("(vision|decoder)/.*", None))
    assert changed.stages["instruct"].data.bad_rows == "skip"
    assert dataclasses.replace(changed.stages["instruct"].data, bad_rows="error") == recipe.stages["instruct"].data


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_can_be_made(path):
    assert isinstance(config.load_recipe(str(path)), config.Recipe)


def test_a_recipe_has_under_sixty_fields_and_every_one_is_read():
    fields = {field.name for kind in KINDS for field in dataclasses.fields(kind)}
    assert sum(len(dataclasses.fields(kind)) for kind in KINDS) < 60
    read = set()
    for path in (REPOSITORY / "llava_jax").rglob("*.py"):
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    assert fields <= read, f"read by nothing: {sorted(fields - read)}"
