"""GQA: compositional questions about images, made from scene graphs (Hudson and Manning 2019)."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import (
    NOT_A_PHRASE,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    group_scores,
    is_short_phrase,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find_file, read_json
from llava_jax.files import matches_schema

TRUTH = "testdev_balanced_questions.json"
CHOICES = "testdev_balanced_choices.json"
NOT_REASONING = ("exist", "query: name", "choose name")  # operations that the official tool does not count as steps
COMMON_ANSWERS = ("color", "material", "shape")
QUESTION = {"question": str, "answer": str, "isBalanced": bool, "groups": {"global": str | None},
            "types": {"structural": str, "semantic": str, "detailed": str},
            "semantic": [{"operation": str, "argument": str | None}]}
"""Schema of a row of GQA's own file."""


@dataclass(frozen=True)
class Gqa(QuestionFileTask):
    """GQA, balanced test-dev: exact match, by kinds of questions too."""

    title = "GQA test-dev balanced"
    required_files = f"llava_gqa_testdev_balanced.jsonl, {TRUTH} (in the folder or its data/), data/images/"
    question_file = "llava_gqa_testdev_balanced.jsonl"
    image_folder = "data/images"
    num_published = 12_578

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for a question that GQA's own file, if it is there, lacks."""
        questions, truth = super().load(data), self._truth(data)
        for question in questions if truth else ():
            if question.id not in truth:
                raise UserError(f"{TRUTH} has no question {question.id!r}; the files are of different versions")
        return questions

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        self._choices(data)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns what the official tool prints for the balanced questions of GQA's own file, in percent.

        `distribution` is its chi-square statistic, lower is better. Validity and plausibility need the file of
        choices. Consistency and grounding are left out, because they need more than answers to these questions.
        """
        truth, choices, notes = self._truth(data), self._choices(data), self.size_notes(questions)
        parsed = {answer.id: parse_answer(answer.text) for answer in answers}  # the last of several counts
        unparsed = [answer for answer in answers if not is_short_phrase(answer.text, parse_answer(answer.text))]
        notes += unparsed_notes(unparsed, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        if truth is None:
            notes.append(f"no score without {TRUTH}")
            items = [ScoredAnswer(answer.id, None, parsed=parsed[answer.id]) for answer in answers]
            return Scores({}, "", items, notes)
        rows = {id: row for id, row in truth.items() if row["isBalanced"]}
        if missing := sum(id not in parsed for id in rows):
            notes.append(f"{missing:,} of GQA's questions have no answer and are wrong; the official tool ends with an "
                         "error")
        if choices and (lost := [id for id in rows if id not in choices]):
            raise UserError(f"{CHOICES} has no question {lost[0]!r}; the files are of different versions")
        right = {id: parsed.get(id) == row["answer"] for id, row in rows.items()}
        structure = {id: row["types"]["structural"] for id, row in rows.items()}
        groups = group_scores((right[id], ["accuracy", "open" if structure[id] == "query" else "binary"])
                              for id in rows)
        groups = {name: groups[name] for name in ("accuracy", "binary", "open") if name in groups}
        for name, key in (("validity", "valid"), ("plausibility", "plausible")) if choices else ():
            groups[name] = [parsed.get(id) in (COMMON_ANSWERS if "Common" in row["types"]["detailed"]
                                               else choices[id][key]) for id, row in rows.items()]
        figures = {name: _percent(values) for name, values in groups.items()}
        distance = chi_square(rows, parsed)
        if distance is not None:
            figures["distribution"] = distance / 100
        for kind, detail in DETAILS.items():
            by_detail = group_scores((right[id], [detail(row)]) for id, row in rows.items())
            figures |= {f"{kind}: {name}": _percent(by_detail[name]) for name in sorted(by_detail)}
        items = [ScoredAnswer(answer.id, float(parsed[answer.id] == rows[answer.id]["answer"]),
                              rows[answer.id]["answer"], parsed[answer.id], structure[answer.id])
                 for answer in answers if answer.id in rows]
        return Scores(figures, "accuracy", items, notes)

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns [{questionId, prediction}], which the official tool and the server accept."""
        rows = [{"questionId": answer.id, "prediction": parse_answer(answer.text)} for answer in answers]
        return {"testdev_balanced_predictions.json": json.dumps(rows).encode()}

    def _truth(self, data: str) -> Mapping[str, Any] | None:
        path = find_file(data, TRUTH, f"data/{TRUTH}", f"data/questions/{TRUTH}", f"questions/{TRUTH}")
        return read_json(
            path, lambda x: x and isinstance(x, dict) and matches_schema([*x.values()], [QUESTION]),
            "not GQA's questions: {id: {question, answer, isBalanced, types, groups, semantic}}") if path else None

    def _choices(self, data: str) -> Mapping[str, Any] | None:
        path, schema = find_file(data, CHOICES, f"data/{CHOICES}"), {"valid": [str], "plausible": [str]}
        return read_json(path, lambda x: isinstance(x, dict) and matches_schema([*x.values()], [schema]),
                         "not GQA's choices: {id: {valid: [...], plausible: [...]}}") if path else None


def parse_answer(text: str) -> str:
    """Returns an answer in lower case, without final full stops."""
    return text.rstrip(".").lower()


def count_steps(row: Mapping[str, Any]) -> int:
    """Returns the number of reasoning steps of a question."""
    steps = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
    return sum(not any(part in step for part in NOT_REASONING) for step in steps)


def chi_square(truth: Mapping[str, Mapping[str, Any]], parsed: Mapping[str, str]) -> float | None:
    """Returns the chi-square statistic between the given and the right answers, or None without groups of questions.

    It is the mean over the groups, weighted by their sizes.
    """
    gold: dict[str, Counter] = defaultdict(Counter)
    predicted: dict[str, Counter] = defaultdict(Counter)
    for id, row in truth.items():
        group = row["groups"]["global"]
        if group is not None:
            gold[group][row["answer"]] += 1
            predicted[group][parsed.get(id)] += 1
    total = sum(counts.total() for counts in gold.values())
    weighted = (counts.total() * sum((predicted[group][answer] - n) ** 2 / n for answer, n in counts.items())
                for group, counts in gold.items())
    return sum(weighted) / total if total else None


DETAILS = {
    "structural type": lambda row: row["types"]["structural"],
    "semantic type": lambda row: row["types"]["semantic"],
    "steps": count_steps,
    "words": lambda row: len(row["question"].split()),
}


def _percent(values: Sequence[bool]) -> float:
    return sum(values) / len(values) * 100
