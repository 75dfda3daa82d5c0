"""Compares two runs of a benchmark: their figures, and the questions whose answers differ."""

import dataclasses
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from llava_jax.cli import Flag, printable
from llava_jax.errors import UserError
from llava_jax.evaluate.runner import results_page
from llava_jax.evaluate.runner.answer_file import match
from llava_jax.evaluate.runner.results_page import QuestionCard, ShownAnswer
from llava_jax.evaluate.runner.tables import markdown, number
from llava_jax.evaluate.tasks.base import TASKS, get_task
from llava_jax.files import json_type, matches_schema, read_json, read_json_lines
from llava_jax.pages import page

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CompareRuns:
    """Compares two runs of a benchmark: a table, and a page of the questions whose answers differ.

    A run is a folder that evaluate has written, such as OUT/pope."""

    first: tyro.conf.Positional[str]
    """Folder of a run."""
    second: tyro.conf.Positional[str]
    """Folder of another run of the same benchmark."""
    out: str = ""
    """Path of the page; default: compare.html in the second folder."""
    all: Flag = False
    """Whether to show questions with equal answers as well."""

    def run(self) -> int:
        out = self.out or os.path.join(self.second, "compare.html")
        page.check_page(out, "--out")
        one, other = read_run(self.first), read_run(self.second)
        if one["benchmark"] != other["benchmark"]:
            raise UserError(f"{self.first} is a run of {one['benchmark']}, and {self.second} of {other['benchmark']}")
        pairs = pair(read_items(self.first), read_items(self.second))
        if not pairs:
            raise UserError(f"{self.first} and {self.second} have no question in common")
        names = one["name"], other["name"]
        if names[0] == names[1]:
            names = f"{names[0]} (1)", f"{names[1]} (2)"
        table, notes = figures(one, other, names), changes(pairs, names)
        if one["questions_hash"] != other["questions_hash"]:
            notes.append("the runs were asked different questions; those that both have are compared")
        elif one["answers"] != other["answers"]:
            notes.append("one run has more answers than the other: the figures are not of the same questions")
        shown = [(a, b) for a, b in pairs if self.all or a["text"] != b["text"]]
        root, pictures = images(other, shown)
        cards = [card(a, b, names, image) for (a, b), image in zip(shown, pictures, strict=True)]
        facts = {name: f"{run['date'][:16].replace('T', ' ')}, {run['answers']:,} answers"
                 for name, run in zip(names, (one, other), strict=True)}
        title = f"{get_task(one['benchmark']).title}: {names[0]} and {names[1]}"
        page.write(out, results_page.render_page(title, facts, table, [], notes, cards, root, good=(BOTH,)))
        print(markdown(table))
        print(printable("".join(f"- {note}\n" for note in notes) + f"\n{out}"))
        return 0


BOTH = "both right"
RUN = {"name": str, "benchmark": str, "figures": dict, "questions_hash": str, "data": str, "options": dict,
       "answers": int, "date": str}
ITEM = {"id": int | str, "prompt": str, "text": str, "score": int | float | None, "reference": str, "read": str,
        "category": str}
"""Schemas of results.json and of a line of items.jsonl."""


def read_run(folder: str) -> Row:
    """Returns results.json of a run. Raises UserError for another folder."""
    path = os.path.join(folder, "results.json")
    missing = "no such file; a run is a folder that evaluate has written, such as OUT/pope"
    run = read_json(path, (dict, list), missing=missing)
    if isinstance(run, list):
        raise UserError(f"{path}: not results of evaluate, but a list")
    if wrong := [key for key, form in RUN.items() if key not in run or not matches_schema(run[key], form)]:
        raise UserError(f"{path}: not results of evaluate, or of another version: {wrong[0]!r} is "
                        f"{json_type(run[wrong[0]]) if wrong[0] in run else 'missing'}")
    if not matches_schema([*run["figures"].values()], [int | float]) or not matches_schema(run.get("main", ""), str):
        raise UserError(f"{path}: the figures must be numbers, and their main one a name")
    if run["benchmark"] not in TASKS:
        raise UserError(f"{path}: there is no benchmark {run['benchmark']!r}")
    return run


def read_items(folder: str) -> list[Row]:
    path, rows = os.path.join(folder, "items.jsonl"), []
    for line, row in read_json_lines(path):
        if not matches_schema(row, ITEM):
            raise UserError(f"{path}, line {line}: not a scored answer with {', '.join(ITEM)}")
        rows.append(row)
    return rows


def pair(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Returns pairs of rows of equal questions, in the order of the first run."""
    waiting: dict[str, deque[Row]] = defaultdict(deque)
    for row in second:
        waiting[_key(row)].append(row)
    return [(row, waiting[_key(row)].popleft()) for row in first if waiting[_key(row)]]


def figures(one: Row, other: Row, names: Sequence[str]) -> list[list[str]]:
    """Returns a table of the runs' figures and their differences, the main figure first."""
    figure_names = dict.fromkeys([*filter(None, [one.get("main")]), *one["figures"], *other["figures"]])
    rows = []
    for name in figure_names:
        a, b = one["figures"].get(name), other["figures"].get(name)
        rows.append([name, number(a), number(b), "" if a is None or b is None else f"{b - a:+.2f}"])
    return [["figure", *names, "difference"], *rows]


def changes(pairs: Sequence[tuple[Row, Row]], names: Sequence[str]) -> list[str]:
    """Returns notes on the number of differing answers, and of better ones in either run."""
    counts = Counter(_state(a, b, names) for a, b in pairs)
    words = sum(a["text"] != b["text"] for a, b in pairs)
    return [f"{len(pairs):,} questions; {words:,} are answered in other words", *(
        f"{state}: {count:,}" for state, count in sorted(counts.items()))]


def images(run: Row, pairs: Sequence[tuple[Row, Row]]) -> tuple[str, list[Sequence[str | bytes]]]:
    """Returns the image folder and the images of each pair's question, if the run's data still exist."""
    kind = get_task(run["benchmark"])
    options = {field.name: run["options"][field.name] for field in dataclasses.fields(kind)
               if type(run["options"].get(field.name)) is type(getattr(kind, field.name))}
    try:
        task = kind(**options)
        questions, root = task.load(run["data"]), task.resolve_image_root(run["data"])
    except (OSError, ValueError):
        return "", [()] * len(pairs)
    lines = [{"question_id": b["id"], "prompt": b["prompt"]} for _, b in pairs]
    return root, [() if index is None else questions[index].images for index in match(questions, lines)]


def card(a: Row, b: Row, names: Sequence[str], images: Sequence[str | bytes]) -> QuestionCard:
    answers = [ShownAnswer(name, row["text"], row["read"], row["score"])
               for name, row in zip(names, (a, b), strict=True)]
    return QuestionCard(b["id"], b["prompt"], b["category"], b["reference"], _state(a, b, names), answers, images)


def _state(a: Row, b: Row, names: Sequence[str]) -> str:
    """Returns which of the two answers is better."""
    if a["score"] is None or b["score"] is None:
        return "not scored"
    if a["score"] == b["score"]:
        return BOTH if a["score"] == 1 else "both wrong" if a["score"] == 0 else "both partly right"
    return f"{names[a['score'] < b['score']]} is better"


def _key(row: Row) -> str:
    return json.dumps([row["id"], row["prompt"]])
