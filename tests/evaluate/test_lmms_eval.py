"""The plugin in lmms-eval itself: its own command, offline, on tasks of a few rows, against the same model asked here.

lmms-eval lives in an environment of its own. The slow test makes one (minutes, 2.5 GB), or takes that whose Python
LMMS_EVAL_PYTHON names, which has lmms-eval and this package.
"""

import configparser
import importlib
import json
import os
import subprocess
import sys
import types
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax import convert

ROOT = Path(__file__).parents[2]
BACKBONES = Path(llava_jax.__file__).parent / "data" / "mini"
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
doc_to_visual: !function pictures.of
doc_to_text: text
"""
WRITE = """output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: "{{choices.index(answer)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
PICTURES = """from PIL import Image


def of(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""


def test_the_entry_point_imports_neither_torch_nor_lmms_eval():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, _, target = settings["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, function = target.split(":")
    assert name == "llava_jax" and callable(getattr(importlib.import_module(module), function))
    code = f"import sys, {module}; assert not {{'torch', 'lmms_eval', 'jax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_request_beyond_the_context_costs_its_own_answer_alone(talker, monkeypatch, capsys):
    """With stand-ins for what the classes take from lmms-eval."""
    result = lambda value, counts=None: value  # noqa: E731
    base = type("lmms", (), {"rank": 0, "cache_hook": types.SimpleNamespace(add_partial=lambda *_: None)})
    for name, content in {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": base},
                          "lmms_eval.api.instance": {"GenerationResult": result, "Instance": None,
                                                     "TokenCounts": lambda *counts: None}}.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(content)
    monkeypatch.delitem(sys.modules, "llava_jax.evaluate.runner.lmms_eval_models", raising=False)
    models = importlib.import_module("llava_jax.evaluate.runner.lmms_eval_models")
    monkeypatch.delitem(sys.modules, "llava_jax.evaluate.runner.lmms_eval_models")
    model = models.LlavaJax(str(talker), batch_size=2)
    texts = ["What is it?", "Why not? " * 400, "Where is it?"]
    settings = {"max_new_tokens": 8}
    written = model.generate_until([types.SimpleNamespace(args=(text, settings, None, 0, "task", "test"))
                                    for text in texts])
    alone = [model.llava.generate(text, max_new_tokens=8).text for text in (texts[0], texts[2])]
    assert written == [alone[0], "", alone[1]]
    scored = model.loglikelihood([types.SimpleNamespace(args=(text, choice, None, n, "task", "test"))
                                  for n, text in enumerate(texts) for choice in ("yes", "no")])
    likely = [model.llava.log_likelihood({"messages": text}, ["yes", "no"]) for text in (texts[0], texts[2])]
    assert [-score for score, _ in scored] == pytest.approx([*likely[0], -np.inf, -np.inf, *likely[1]], abs=1e-3)
    told = capsys.readouterr().err
    assert "request 1 is not asked, its answer is empty: " in told and "request 2 is not asked, none of its" in told


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    if given := os.environ.get("LMMS_EVAL_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("lmms_eval")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for packages in (["torch==2.13.0"], ["lmms-eval==0.7.3"], [str(ROOT)]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    # lmms-eval runs without torchvision, but not with one that was built for another torch (CUDA's, beside the CPU's).
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The miniature's backbones with a projector as it is born: its answers depend on picture and question."""
    folder = str(tmp_path_factory.mktemp("model") / "joined")
    convert.main(["--vision", str(BACKBONES / "vision"), "--language", str(BACKBONES / "language"), folder,
                  "--to", "native", "--dtype", "keep"])
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    asked = ["What colour is the circle?", "How many objects are there?", "Is there a red square?"]
    rows = []
    for number in range(12):
        images = []
        for part in range(number % 3):  # none, one, two
            images.append(str(folder / f"{number}-{part}.png"))
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(images[-1])
        rows.append({"text": asked[number % 4 % 3], "images": images, "choices": ["red", "two", "yes", "no"]})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "simple"])
def test_lmms_eval_runs_its_tasks_with_the_model(kind, python, model, rows, tmp_path):
    llava = llava_jax.load(model)
    requests = [{"messages": row["text"], "images": row["images"], "max_new_tokens": 8} for row in rows]
    said = [completion.text for completion in llava.batch(requests)]
    likely = [llava.log_likelihood(request, row["choices"]) for request, row in zip(requests, rows, strict=True)]
    # Every other reference is what the model says, so that the share of right answers is one half where all goes well.
    answers = [text if number % 2 else "nothing" for number, text in enumerate(said)]
    choices = [row["choices"][np.argmax(scores) if number % 2 else np.argmin(scores)]
               for number, (row, scores) in enumerate(zip(rows, likely, strict=True))]
    tasks = {"shapes_write": (WRITE, answers)} | ({"shapes_choose": (CHOOSE, choices)} if kind == "simple" else {})
    (tmp_path / "pictures.py").write_text(PICTURES)
    for name, (task, wanted) in tasks.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row | {"answer": text}) + "\n"
                                for row, text in zip(rows, wanted, strict=True)))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, rows=file) + task)

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu",
                                "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    subprocess.run([python, "-m", "lmms_eval", "--model", "llava_jax", "--model_args", f"pretrained={model}",
                    "--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--batch_size", "4", "--log_samples",
                    "--output_path", str(tmp_path / "out"), *(["--force_simple"] if kind == "simple" else [])],
                   check=True, cwd=tmp_path, env=environment)

    [results] = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["shapes_write"]["exact_match,none"] == 0.5
    [samples] = (tmp_path / "out").rglob("*_samples_shapes_write.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == said
    assert len(set(said)) > 2
    if kind == "simple":
        assert scores["shapes_choose"]["acc,none"] == 0.5
        [samples] = (tmp_path / "out").rglob("*_samples_shapes_choose.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        losses = [[float(loss) for loss, _ in line["filtered_resps"]] for line in lines]
        np.testing.assert_allclose(losses, -np.array(likely), rtol=1e-4, atol=1e-4)
        greedy = [[flag == "True" for _, flag in line["filtered_resps"]] for line in lines]
        assert greedy == [[text.startswith(choice) for choice in row["choices"]]
                          for text, row in zip(said, rows, strict=True)]
