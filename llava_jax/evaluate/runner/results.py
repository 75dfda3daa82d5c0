"""What comes of a run: figures, items and settings as JSON, a Markdown table, a page; beside the published figures."""

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
from llava_jax.files import atomic_write

SAMPLED = 4096  # bytes of each of SAMPLES places of a file of weights, from which its hash is made
SAMPLES = 256


def hash_questions(questions: Sequence[Question]) -> str:
    """Of what the model is shown: a run with other questions is another run."""
    digest = hashlib.sha256()
    for question in questions:
        images = [hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else os.path.basename(image)
                  for image in question.images]
        shown = [question.id, question.text, question.assistant_prefix, question.stop, images, dict(question.fields)]
        digest.update(json.dumps(shown).encode() + b"\n")
    return digest.hexdigest()[:16]


def hash_model(folder: str) -> str:
    """Of a model's files: names, sizes, and their bytes; of large ones some of each part."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or not name.endswith((".json", ".safetensors", ".model", ".jinja")):
            continue
        size = os.path.getsize(path)
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= SAMPLED * SAMPLES:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek((size - SAMPLED) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what may change an answer or a score."""
    names = ("llava_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "transformers", "tokenizers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def rows_of(scores: Scores, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row for each answer: what was asked, what was said, and how that was scored."""
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


def write(
    folder: str,
    task: Task,
    settings: Mapping[str, Any],
    questions: Sequence[Question],
    lines: Sequence[Line],
    scores: Scores,
    uploads: Sequence[str],
) -> list[str]:
    """Writes results.json, items.jsonl, results.md and results.html; returns their paths.

    Args:
      settings: name, benchmark, data, options, model ..., as they stand in results.json.
      lines: the answers as the file has them.
      uploads: the files that the benchmark's server takes.
    """
    others, rows = published_results().get(settings["benchmark"], ()), rows_of(scores, lines)
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
        "published": [dataclasses.asdict(other) for other in others],
    }
    table, places = beside(scores, result["name"], others), match(questions, lines)
    sources = ["Published: " + "; ".join(dict.fromkeys(other.source for other in others))] if others else []
    figures = [["figure", result["name"]], *([name, number(value)] for name, value in scores.figures.items())]
    images = [() if place is None else questions[place].images for place in places]
    contents = {
        "items.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "results.md": _markdown(task, result, table, figures, sources),
        "results.html": results_page.render_page(
            task.title, about(result), table, figures, [*sources, *scores.notes],
            list(map(results_page.make_card, rows, images)), task.resolve_image_root(settings["data"])),
        "results.json": json.dumps(result, indent=2, ensure_ascii=False) + "\n",
    }
    paths = [os.path.join(folder, name) for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        with atomic_write(path) as file:
            file.write(content.encode(errors="backslashreplace"))
    return paths


def about(result: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know of a run, by name."""
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


def beside(scores: Scores, name: str, others: Sequence[PublishedResult]) -> list[list[str]]:
    """A table: the run's figure by which it is known and those that were published, then others' figures."""
    columns = list(dict.fromkeys(figure for other in others for figure in other.figures))
    if scores.main and scores.main not in columns:
        columns.insert(0, scores.main)
    return [["", *columns], [name, *(number(scores.figures.get(figure)) for figure in columns)],
            *([other.model, *map(other.cell, columns)] for other in others)]


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
