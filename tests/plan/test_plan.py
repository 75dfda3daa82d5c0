"""The command: what it prints and writes, its exit codes, mistakes in one line."""

import json
import subprocess
import sys

import pytest

from llava_jax.plan import __main__ as plan
from llava_jax.plan import show
from llava_jax.plan.models import planned_config
from llava_jax.plan.predict import predict
from llava_jax.plan.replay import profile
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import GIB, parse


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plan_as_json_and_the_programs_behind_it(compiles, planned, tiny_file, tmp_path, capsys, monkeypatch):
    dump, options = tmp_path / "step.hlo", ["--price-per-chip-hour", "1.5", "--stages.align.epochs", "2"]
    if not compiles:
        monkeypatch.setattr("llava_jax.plan.commands.compile_step", lambda *_: planned[2])
    assert plan.main([str(tiny_file), "--topology", "v5e-4", "--json", "--dump-hlo", str(dump), "--rows-per-epoch",
                      "800", *options]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [stage["stage"] for stage in found["stages"]] == ["align", "instruct"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and found["chips"] == 4
    assert found["versions"]["jax"] and found["versions"]["libtpu"]
    for stage in found["stages"]:
        text = (tmp_path / f"step.{stage['stage']}.hlo").read_text()
        assert text.startswith("HloModule jit_train_step") and profile(text, [0] * 4).cycles == stage["cycles"]
        assert stage["steps"] == (200 if stage["stage"] == "align" else 100)
        assert stage["cost"] == pytest.approx(stage["hours"] * 4 * 1.5)
        assert stage["hours"] == pytest.approx(stage["steps"] * stage["step_seconds"] / 3600)
        assert stage["step_seconds_range"] == pytest.approx([0.9 * stage["step_seconds"], 1.23 * stage["step_seconds"]])
        low, high = stage["mfu_range"]
        assert low < stage["mfu"] < high and high / low == pytest.approx(1.23 / 0.9)
    assert not dump.exists() and printed.err.count("wrote ") == 2


def test_a_plan_that_does_not_fit_says_by_how_much(tiny):
    memory = Memory(8 * GIB, GIB, 16 * GIB, 0, 5 * GIB, 0, int(15.75 * GIB))
    model, where = planned_config(tiny.model)[0], parse("v5e-4")
    plan = predict(tiny, "instruct", where, model, Program("", memory, (0,) * 4, 3.0), None)
    text = show.text(plan | {"parameters": 8000, "trained_parameters": 2000}, where)
    assert "2,000  25.00% of them" in text
    assert "DOES NOT FIT" in text and "14.25 GiB more than the 15.75 GiB there are" in text and "MFU" not in text
    assert json.dumps(plan) and plan["fits"] is False and plan["memory"]["peak"] == 30 * GIB


@pytest.mark.parametrize("seconds,expected", [
    (0.66, "0.59 to 0.81 s"), (12.34, "11 to 15 s"), (0.0034, "3.1 to 4.2 ms"), (1.0, "0.90 to 1.23 s"),
])
def test_a_time_is_a_range_of_two_digits(seconds, expected):
    assert show._duration(seconds) == expected


@pytest.mark.parametrize("args,expected", [
    ([], "the following arguments are required: recipe, --topology"),
    (["mini"], "required: --topology"),
    (["mino", "--topology", "v5e-4"], "did you mean mini?"),
    (["mini", "--topology", "v5e-5"], "there are v5e-1, v5e-4"),
    (["mini", "--topology", "v5e-4", "--stage", "final"], "the recipe's stages are align, instruct"),
    (["mini", "--topology", "v5e-4", "--stages.align.stpes", "3"], "did you mean --stages.align.steps?"),
    (["mini", "--topology", "v5e-4", "--slots", "0"], "--slots 0: it must be at least 1"),
    (["mini", "--topology", "v5e-4", "--model.vision", "checkpoints/mine"], "checkpoints/mine: no such directory"),
])
def test_mistakes_are_one_line(args, expected):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        plan.main(args)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_code_2():
    done = subprocess.run([sys.executable, "-m", "llava_jax.plan", "mini", "--topology", "v9"], capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
