"""The run's log: what is damaged in it is named by file and line, and W&B goes on in one run."""

import json
import sys
import types

import pytest

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.train import report
from llava_jax.train.metrics import Log, read_lines


@pytest.fixture
def recipe(tmp_path) -> config.Recipe:
    stage = config.Stage(learning_rates=((".*", 1.0),), data=config.Data(path="unused"))
    return config.Recipe(model=config.Model(llava="unused"), stages={"a": stage}, output=str(tmp_path))


@pytest.mark.parametrize("line, problem", [
    ("{}", "stage is null"),
    ('{"stage": "a"}', "step is null"),
    ('{"stage": 3, "step": 1}', "stage is a number"),
    ('{"stage": "a", "step": true}', "step is true"),
    ('{"stage": "a", "step": 1.5}', "step is a number"),
    ('{"stage": "a", "step": 1, "loss": NaN}', "loss is a number"),
    ('{"stage": "a", "step": 0}', "step is a number"),
    ('{"stage": "a", "step": 1, "loss": 1' + 400 * "0" + "}", "loss is a number"),
    ('{"stage": "a", "step": 1, "seconds": "1"}', "seconds is a text"),
    ('["stage"]', "must be an object, and is a list"),
    ('{"stage": "a", "st', "not JSON"),
    ("\0\0\0", "not JSON"),
    ("", "not JSON"),
])
def test_a_damaged_line_is_named(recipe, tmp_path, line, problem):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1, "loss": 1.5}\n' + line + "\n")
    for read in (lambda: Log(tmp_path, recipe).rewind("a", 2), lambda: report.read_metrics(path)):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{path}, line 2: {problem}")


def test_a_field_of_another_version_is_kept_as_it_was(recipe, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1, "other": NaN}\n')
    Log(tmp_path, recipe).rewind("a", 2)
    assert path.read_text() == '{"stage": "a", "step": 1, "other": NaN}\n'


def test_a_page_of_odd_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "\\ud800", "step": 1, "loss": 0}\n{"stage": "b", "step": 1, "samples": []}\n')
    report.write_page(tmp_path / "page.html", "title", "about", report.read_metrics(path), {}, [])
    assert "<h3>\\ud800</h3>" in (tmp_path / "page.html").read_text()


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    assert read_lines(path) == [{"stage": "a", "step": 1}]
    path.write_bytes(b'{"stage": "a", "step": 1}\n\xff\n')
    with pytest.raises(UserError, match="metrics.jsonl: byte 27 is not UTF-8"):
        read_lines(path)


def test_what_is_not_finite_is_not_written(recipe, tmp_path):
    log = Log(tmp_path, recipe)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"stage": "a", "step": 1, "loss": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_continuation_reports_to_the_same_wandb_run(recipe, tmp_path, monkeypatch):
    calls = []

    def init(id=None, **options):
        calls.append({"id": id, **options})
        return types.SimpleNamespace(id=id or f"new{len(calls)}", finish=lambda: None, log=lambda line: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for project in ("llava", "llava", "other", "other"):
        log = Log(tmp_path, config.Recipe(recipe.model, recipe.stages, recipe.output, wandb=project))
        log.close()
    assert [call["id"] for call in calls] == [None, "new1", None, "new3"]
    assert all(call["resume"] == "allow" and call["dir"] == str(tmp_path) for call in calls)
    (tmp_path / "wandb.json").write_text(json.dumps({"project": "llava", "id": 3}))
    with pytest.raises(UserError, match="wandb.json: id must be a text"):
        Log(tmp_path, config.Recipe(recipe.model, recipe.stages, recipe.output, wandb="llava"))
