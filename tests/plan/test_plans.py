"""The committed plans: made from the recipes of today, consistent, and the smallest of them compiled again."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from llava_jax import cli, config
from llava_jax.parallel.sharding import make_mesh
from llava_jax.plan.models import planned_config
from llava_jax.plan.step import abstract_step, device_bytes, with_slices
from llava_jax.plan.topologies import parse

ROOT = Path(__file__).parent.parent.parent
RECORDED = json.loads((ROOT / "configs" / "plans.json").read_text())
FAST = ("mini v5e-4", "llava_1_5_7b v5e-256x2")


def load_script():
    spec = importlib.util.spec_from_file_location("make_plans", ROOT / "scripts" / "make_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_has_plans_of_the_script():
    wanted = {f"{recipe} {topology}": flags for recipe, topology, _, flags in load_script().PLANS}
    assert {name: plan["flags"] for name, plan in RECORDED.items()}.items() <= wanted.items()


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
                                  for name in RECORDED])
def test_recorded_memory_is_that_of_the_recipe_of_today(needs_libtpu, name):
    plan = RECORDED[name]
    recipe = cli.parse(config.Recipe, plan["flags"].split(),
                       default=config.load_recipe(plan["recipe"]))
    where = parse(plan["topology"])
    recipe, _ = with_slices(recipe, where)
    model, _ = planned_config(recipe.model)
    mesh = make_mesh(recipe.mesh, where.jax_devices())
    assert (dict(mesh.shape), where.chips) == (plan["mesh"], plan["chips"])
    first = -1 if plan["recipe"].startswith(load_script().LAST_STAGE) else 0
    assert [stage["stage"] for stage in plan["stages"]] == list(recipe.stages)[first:]
    for recorded in plan["stages"]:
        memory, stage = recorded["memory"], recipe.stages[recorded["stage"]]
        _, (state, frozen, batch) = abstract_step(recipe, recorded["stage"], mesh, model)
        assert memory["trained"] == device_bytes(state.trainable) and memory["frozen"] == device_bytes(frozen)
        assert memory["optimizer"] == device_bytes((state.step, state.optimizer))
        assert memory["batch"] == device_bytes(batch)
        parts = ("trained", "frozen", "optimizer", "batch", "temporaries")
        assert memory["peak"] == sum(memory[part] for part in parts) and memory["limit"] == where.chip.memory
        assert recorded["fits"] == (memory["peak"] <= memory["limit"])
        assert recorded["rows"] == stage.batch_size
        seconds, chips = recorded["seconds"], plan["chips"]
        assert seconds["cycles"] == pytest.approx(recorded["cycles"] / where.chip.clock)
        assert recorded["step_seconds"] == pytest.approx(seconds["cycles"] + seconds["kernels"] + seconds["waits"])
        assert recorded["mfu"] == pytest.approx(
            recorded["model_flops"] / recorded["step_seconds"] / chips / where.chip.flops)


def test_the_page_has_the_table_of_the_file():
    page = (ROOT / "llava_jax" / "plan" / "README.md").read_text()
    rows = load_script().table(RECORDED).splitlines()
    assert [row for row in rows if row not in page] == []


def test_a_changed_recipe_is_noticed(needs_libtpu, tiny):
    """The comparison above depends on the recipe: a stage that trains less has less optimizer state."""
    where, (model, _) = parse("v5e-4"), planned_config(tiny.model)
    mesh = make_mesh(tiny.mesh, where.jax_devices())
    align = dataclasses.replace(tiny, stages={"instruct": tiny.stages["align"]})
    sizes = [device_bytes(abstract_step(recipe, "instruct", mesh, model)[1][0].trainable) for recipe in (tiny, align)]
    assert sizes[1] < sizes[0] / 5


@pytest.mark.slow
def test_a_small_plan_still_fits_its_recorded_budget(needs_libtpu):
    recorded = RECORDED["mini v5e-4"]
    here = {name: version(name) for name in ("jax", "libtpu")}
    if here != recorded["versions"]:
        pytest.skip(f"configs/plans.json was made with {recorded['versions']}, and here is {here}; to compare, make it "
                    "again: python scripts/make_plans.py --fresh")
    command = [sys.executable, "-m", "llava_jax.plan", "mini", "--topology", "v5e-4", "--json", "--stage", "instruct",
               *recorded["flags"].split()]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["stages"][0]
    budget = next(stage for stage in recorded["stages"] if stage["stage"] == "instruct")
    hint = "a slower or larger step; if it is meant, python scripts/make_plans.py --fresh"
    assert found["memory"]["peak"] <= 1.05 * budget["memory"]["peak"], hint
    assert found["cycles"] <= 1.05 * budget["cycles"], hint
    assert found["ici_bytes"] <= 1.05 * budget["ici_bytes"] + 1e5, hint
