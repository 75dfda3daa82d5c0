"""The committed plans: whole, consistent, and the smallest of them compiled again."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent.parent / "configs" / "plans.json"
PLANS = json.loads(FILE.read_text())


def test_every_plan_fits_its_slice():
    assert "mini v5e-4" in PLANS
    for name, plan in PLANS.items():
        for stage in plan["stages"]:
            memory = stage["memory"]
            assert stage["fits"] and memory["peak"] <= memory["limit"], name
            parts = ("trained", "frozen", "optimizer", "batch", "temporaries")
            assert memory["peak"] == sum(memory[part] for part in parts)
            assert 0 < stage["mfu"] < 1 and stage["seconds"]["mxu"] < stage["step_seconds"], name


def test_a_small_plan_still_fits_its_recorded_budget(needs_libtpu):
    recorded = PLANS["mini v5e-4"]
    here = {name: version(name) for name in ("jax", "libtpu")}
    if here != recorded["versions"]:
        pytest.skip(f"configs/plans.json was made with {recorded['versions']}, and here is {here}; to compare, make it "
                    "again: python scripts/make_plans.py --fresh")
    command = [sys.executable, "-m", "llava_jax.plan", "mini", "--topology", "v5e-4", "--json", "--stage", "instruct",
               *recorded["flags"].split()]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=FILE.parent.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["stages"][0]
    budget = next(stage for stage in recorded["stages"] if stage["stage"] == "instruct")
    hint = "a slower or larger step; if it is meant, python scripts/make_plans.py --fresh"
    assert found["memory"]["peak"] <= 1.05 * budget["memory"]["peak"], hint
    assert found["cycles"] <= 1.05 * budget["cycles"], hint
    assert found["ici_bytes"] <= 1.05 * budget["ici_bytes"] + 1e5, hint
