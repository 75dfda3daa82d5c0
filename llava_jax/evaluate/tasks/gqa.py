"""GQA: compositional questions about pictures, made from scene graphs (Hudson and Manning 2019)."""

import json
import os
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
    is_short_phrase,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find, fits, read_json
from llava_jax.files import replacing

TRUTH = "testdev_balanced_questions.json"
CHOICES = "testdev_balanced_choices.json"
NO_STEPS = ("exist", "query: name", "choose name")  # operations that the official tool does not count as reasoning
COMMON = ("color", "material", "shape")
QUESTION = {"question": str, "answer": str, "isBalanced": bool, "groups": {"global": str | None},
            "types": {"structural": str, "semantic": str, "detailed": str},
            "semantic": [{"operation": str, "argument": str | None}]}
"""What is read of a row of GQA's own file."""


@dataclass(frozen=True)
class Gqa(QuestionFileTask):
    """GQA, balanced test-dev: exact match, by kinds of questions too."""

    title = "GQA test-dev balanced"
    required_files = f"llava_gqa_testdev_balanced.jsonl, {TRUTH} (in the folder or its data/), data/images/"
    question_file = "llava_gqa_testdev_balanced.jsonl"
    image_folder = "data/images"
    num_published = 12_578

    def load(self, data: str) -> list[Question]:
        """UserError as well for a question that GQA's own file, where there is one, does not have."""
        questions, truth = super().load(data), self._truth(data)
        for question in questions if truth else ():
            if question.id not in truth:
                raise UserError(f"{TRUTH} has no question {question.id!r}; the files are of different versions")
        return questions

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        self._choices(data)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """What the official tool prints, in percent; `distribution` is its chi-square statistic, lower is better.

        Over the balanced questions of GQA's own file. Validity and plausibility need its choices; consistency and
        grounding, for which more than answers to these questions is needed, are left out.
        """
        truth, notes = self._truth(data), self.size_notes(questions)
        said = {answer.id: prediction(answer.text) for answer in answers}  # of doubled ones the last
        unread = [answer for answer in answers if not is_short_phrase(answer.text, prediction(answer.text))]
        notes += unparsed_notes(unread, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        if truth is None:
            notes.append(f"no score without {TRUTH}")
            return Scores({}, "", [ScoredAnswer(answer.id, None, parsed=said[answer.id]) for answer in answers], notes)
        balanced = {id: row for id, row in truth.items() if row["isBalanced"]}
        missing = sum(id not in said for id in balanced)
        if missing:
            notes.append(f"{missing:,} of GQA's questions have no answer and are wrong; the official tool ends with an "
                         "error")
        choices = self._choices(data)
        groups: dict[str, dict[Any, list[bool]]] = {kind: defaultdict(list) for kind in ("", *_DETAILS)}
        for id, row in balanced.items():
            right = said.get(id) == row["answer"]
            groups[""]["binary" if row["types"]["structural"] != "query" else "open"].append(right)
            groups[""]["accuracy"].append(right)
            for kind, detail in _DETAILS.items():
                groups[kind][detail(row)].append(right)
            if choices:
                if id not in choices:
                    raise UserError(f"{CHOICES} has no question {id!r}; the files are of different versions")
                allowed = {name: choices[id][name] for name in ("valid", "plausible")}
                if "Common" in row["types"]["detailed"]:
                    allowed = dict.fromkeys(allowed, COMMON)
                groups[""]["validity"].append(said.get(id) in allowed["valid"])
                groups[""]["plausibility"].append(said.get(id) in allowed["plausible"])
        names = ("accuracy", "binary", "open", "validity", "plausibility")
        figures = {name: _percent(groups[""][name]) for name in names if name in groups[""]}
        distance = chi_square(balanced, said)
        if distance is not None:
            figures["distribution"] = distance / 100
        for kind in _DETAILS:
            figures |= {f"{kind}: {name}": _percent(groups[kind][name]) for name in sorted(groups[kind])}
        items = [ScoredAnswer(answer.id, float(said[answer.id] == row["answer"]), row["answer"], said[answer.id],
                      row["types"]["structural"]) for answer in answers if (row := balanced.get(answer.id))]
        return Scores(figures, "accuracy", items, notes)

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """[{questionId, prediction}], which the official tool and the server take."""
        path = os.path.join(folder, "testdev_balanced_predictions.json")
        rows = [{"questionId": answer.id, "prediction": prediction(answer.text)} for answer in answers]
        with replacing(path) as file:
            file.write(json.dumps(rows).encode())
        return [path]

    def _truth(self, data: str) -> Mapping[str, Any] | None:
        path = find(data, TRUTH, f"data/{TRUTH}", f"data/questions/{TRUTH}", f"questions/{TRUTH}")
        if path is None:
            return None
        rows = read_json(path)
        if not rows or not fits(rows, dict) or not all(fits(row, QUESTION) for row in rows.values()):
            raise UserError(f"{path}: not GQA's questions: {{id: {{question, answer, isBalanced, types, groups, "
                             "semantic}}")
        return rows

    def _choices(self, data: str) -> Mapping[str, Any] | None:
        path = find(data, CHOICES, f"data/{CHOICES}")
        rows = read_json(path) if path else None
        if path and not (fits(rows, dict) and all(fits(row, {"valid": [str], "plausible": [str]})
                                                  for row in rows.values())):
            raise UserError(f"{path}: not GQA's choices: {{id: {{valid: [...], plausible: [...]}}}}")
        return rows


def prediction(text: str) -> str:
    """Without final periods, in lower case."""
    return text.rstrip(".").lower()


def steps(row: Mapping[str, Any]) -> int:
    """Steps of reasoning."""
    named = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
    return sum(not any(part in name for part in NO_STEPS) for name in named)


def chi_square(truth: Mapping[str, Mapping[str, Any]], said: Mapping[str, str]) -> float | None:
    """How far the distribution of what was said is from that of the answers: the chi-square statistic over the
    answers of each group of questions, its mean by the groups' sizes. None if no question has a group."""
    gold: dict[str, Counter] = defaultdict(Counter)
    predicted: dict[str, Counter] = defaultdict(Counter)
    for id, row in truth.items():
        group = row["groups"]["global"]
        if group is not None:
            gold[group][row["answer"]] += 1
            predicted[group][said.get(id)] += 1
    total = sum(counts.total() for counts in gold.values())
    weighted = (counts.total() * sum((predicted[group][answer] - n) ** 2 / n for answer, n in counts.items())
                for group, counts in gold.items())
    return sum(weighted) / total if total else None


_DETAILS = {
    "structural type": lambda row: row["types"]["structural"],
    "semantic type": lambda row: row["types"]["semantic"],
    "steps": steps,
    "words": lambda row: len(row["question"].split()),
}


def _percent(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights) * 100
