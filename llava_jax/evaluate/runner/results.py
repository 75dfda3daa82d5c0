"""Writes the results of a run beside the published figures: JSON, JSON lines, a Markdown table and a page."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.evaluate.runner import results_page
from llava_jax.evaluate.runner.answer_file import Line, match
from llava_jax.evaluate.runner.published import PublishedResult, published_results
from llava_jax.evaluate.runner.tables import markdown, number
from llava_jax.evaluate.tasks.base import Question, ScoredAnswer, Scores, Task
from llava_jax.files import write_file

SAMPLE_BYTES, NUM_SAMPLES = 4096, 256
"""Size and number of the samples of a large weight file that are hashed."""


def hash_questions(questions: Sequence[Question]) -> str:
    """Returns a hash of everything that the model is shown."""
    digest = hashlib.sha256()
    for question in questions:
        images = [hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else os.path.basename(image)
                  for image in question.images]
        shown = [question.id, question.text, question.assistant_prefix, question.stop, images, dict(question.fields)]
        digest.update(json.dumps(shown).encode() + b"\n")
    return digest.hexdigest()[:16]


def hash_model(folder: str) -> str:
    """Returns a hash of a model's files: names, sizes and contents, of large files samples of the contents."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or not name.endswith((".json", ".safetensors", ".bin", ".model", ".jinja")):
            continue
        size = os.path.getsize(path)
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= SAMPLE_BYTES * NUM_SAMPLES:
                digest.update(file.read())
                continue
            for i in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Returns the versions of the packages that can change an answer or a score."""
    names = ("llava_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "transformers", "tokenizers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def item_rows(scores: Scores, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Returns one row per answer: prompt, text and score."""
    items: dict[Any, deque[ScoredAnswer]] = defaultdict(deque)
    for item in scores.items:
        items[item.id].append(item)
    rows = []
    for line in lines:
        id = line["question_id"]
        item = items[id].popleft() if items[id] else ScoredAnswer(id, None)
        rows.append({"id": id, "prompt": line.get("prompt", ""), "text": line["text"], "score": item.score,
                     "reference": item.reference, "read": item.parsed, "category": item.category})
    return rows


def write(folder: str, task: Task, settings: Mapping[str, Any], questions: Sequence[Question], lines: Sequence[Line],
          scores: Scores, uploads: Sequence[str]) -> list[str]:
    """Writes results.json, items.jsonl, results.md and results.html. Returns their paths.

    Args:
      settings: Name, benchmark, data, options, model ..., as in results.json.
      lines: Lines of the answer file.
      uploads: Files for the benchmark's server.
    """
    published, rows = published_results().get(settings["benchmark"], ()), item_rows(scores, lines)
    result = {
        **settings,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "questions": len(questions),
        "answers": len(lines),
        "main": scores.main,
        "figures": dict(scores.figures),
        "notes": list(scores.notes),
        "uploads": [os.path.relpath(path, folder) for path in uploads],
        "published": [dataclasses.asdict(row) for row in published],
    }
    table, figures = beside_published(scores, result["name"], published), figure_table(scores, result["name"])
    sources = ["Published: " + "; ".join(dict.fromkeys(row.source for row in published))] if published else []
    images = [() if index is None else questions[index].images for index in match(questions, lines)]
    page = results_page.render_page(task.title, about(result), table, figures, [*sources, *scores.notes],
                                    list(map(results_page.make_card, rows, images)),
                                    task.resolve_image_root(settings["data"]))
    contents = {
        "items.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "results.md": _markdown(task, result, table, figures, sources),
        "results.html": page,
        "results.json": json.dumps(result, indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():
        write_file(os.path.join(folder, name), content)
    return [os.path.join(folder, name) for name in contents]


def about(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings of a run for its report, by name."""
    model = result.get("model") or {}
    chosen = {name: value for name, value in result["options"].items() if value not in ("", False)}
    facts = {
        "model": model.get("path") or result["name"],
        "model's hash": model.get("hash"),
        "template": model.get("template"),
        "dtype": model.get("dtype"),
        "answers by": model.get("score_by"),
        "shown": {"blind": "other pictures", "shuffled": "shuffled patches"}.get(model.get("baseline")),
        "options": ", ".join(f"{name} {value}" for name, value in chosen.items()),
        "data": result["data"],
        "questions": f"{result['questions']:,} (hash {result['questions_hash']})",
        "answers": f"{result['answers']:,}",
        "date": result["date"][:16].replace("T", " ") + " UTC",
        "llava_jax": result["versions"].get("llava_jax"),
        "jax": result["versions"].get("jax"),
    }
    return {name: value for name, value in facts.items() if value}


def beside_published(scores: Scores, name: str, published: Sequence[PublishedResult]) -> list[list[str]]:
    """Returns a table of the run's main figure and those of published ones, then the published results."""
    columns = list(dict.fromkeys(figure for row in published for figure in row.figures))
    if scores.main and scores.main not in columns:
        columns.insert(0, scores.main)
    return [["", *columns], [name, *(number(scores.figures.get(figure)) for figure in columns)],
            *([row.model, *map(row.cell, columns)] for row in published)]


def figure_table(scores: Scores, name: str) -> list[list[str]]:
    """Returns a table of all figures."""
    return [["figure", name], *([figure, number(value)] for figure, value in scores.figures.items())]


def _markdown(task: Task, result: Mapping[str, Any], table: Sequence[Sequence[str]],
              figures: Sequence[Sequence[str]], sources: Sequence[str]) -> str:
    parts = [f"# {task.title}\n", "".join(f"- {name}: {value}\n" for name, value in about(result).items())]
    if len(table[0]) > 1:
        parts.append(markdown(table))
    parts += [f"{source}.\n" for source in sources]
    if len(figures) > 2:
        parts.append(markdown(figures))
    if result["notes"]:
        parts.append("".join(f"- {note}\n" for note in result["notes"]))
    return "\n".join(parts)
