"""Probes of positions, numbers and colours of objects, which a bag of patches cannot answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llava_jax.errors import UserError
from llava_jax.evaluate.probes.make_probes import FILE, KINDS
from llava_jax.evaluate.probes.wording import FORMS, instruction, parse_answer
from llava_jax.evaluate.tasks.base import (
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    group_scores,
    index_questions,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import QuestionFileTask
from llava_jax.files import matches_schema

ROW = {"category": str, "set": int | str}
WORDING = {"text": str, "answer": str, "choices": [str]}
"""Schemas of a probe: its fields, and the fields of its wording in each language."""


@dataclass(frozen=True)
class Probe(QuestionFileTask):
    """Base class of `Spatial` and `Multilingual`: the questions of probes.jsonl, in one language or several."""

    name_choices: bool = True
    """Whether each question ends with its possible answers."""

    required_files = "probes.jsonl (probes-data makes it from boxes) and its pictures"
    question_file = FILE
    max_new_tokens = 32
    languages: ClassVar[tuple[str, ...]]

    def load(self, data: str) -> list[Question]:
        """Returns each question in all languages, one after the other. A question without one of them is left out."""
        path, questions = self.question_path(data), []
        for question in super().load(data):
            wordings = {"en": question.row, **question.row}
            if not all(language in wordings for language in self.languages):
                continue
            if not (matches_schema(question.row, ROW)
                    and all(matches_schema(wordings[language], WORDING) for language in self.languages)):
                raise UserError(f"{path}: question {question.id!r} is no probe, which has "
                                f"{', '.join([*WORDING, *ROW])}")
            for language in self.languages:
                answer, choices = wordings[language]["answer"], wordings[language]["choices"]
                if answer not in choices:
                    raise UserError(f"{path}: question {question.id!r}: {answer!r} is none of its choices")
                if unknown := set(choices) - set(FORMS[language]):
                    raise UserError(f"{path}: question {question.id!r}: {unknown.pop()!r} is no answer to a probe")
                questions.append(self._question(question, language, wordings[language]))
        if not questions:
            raise UserError(f"{path}: no question is there in all of these languages: {', '.join(self.languages)}")
        return questions

    def _question(self, question: Question, language: str, wording: Mapping[str, Any]) -> Question:
        row = {key: wording[key] for key in ("answer", "choices")} | {
            "category": question.row["category"], "set": question.row["set"], "language": language}
        text = wording["text"] + (instruction(language, wording["choices"]) if self.name_choices else "")
        return replace(question, text=text, row=row, choices=tuple(wording["choices"]))


@dataclass(frozen=True)
class Spatial(Probe):
    """Probes of space: left, right, above, below, inside, between, counting, and attributes of objects."""

    title = "Spatial probes"
    languages = ("en",)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns percentages: the mean over all kinds, guessing, each kind, and its sets without a wrong answer.

        A missing answer is wrong, and the last of several counts.
        """
        items = score_answers(questions, answers)
        figures, chance = by_kind(questions, items), guessing(questions)
        summary = {"all": mean(figures[kind] for kind in chance), "guessing": mean(chance.values())}
        return Scores(summary | figures, "all", items, make_notes(questions, answers, items))


def score_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> list[ScoredAnswer]:
    """Scores each answer. Raises UserError for an answer to another question."""
    by_id, items = index_questions(questions, answers), []
    for answer in answers:
        row = by_id[answer.id].row
        parsed = parse_answer(row["language"], answer.text, row["choices"])
        items.append(ScoredAnswer(answer.id, float(parsed == row["answer"]), row["answer"], parsed, row["category"]))
    return items


def by_kind(questions: Sequence[Question], items: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Returns the percentage of right answers of each kind and, as "KIND, sets", of sets without a wrong answer."""
    scores = {item.id: item.score for item in items}
    scores = [(scores.get(question.id, 0.0), question.row["category"], question.row["set"]) for question in questions]
    kinds = group_scores((score, [kind]) for score, kind, _ in scores)
    sets = group_scores((score, [(kind, name)]) for score, kind, name in scores)
    figures = {}
    for kind in kinds:
        figures[kind] = 100 * mean(kinds[kind])
        figures[f"{kind}, sets"] = 100 * mean(min(values) for (other, _), values in sets.items() if other == kind)
    return figures


def guessing(questions: Sequence[Question]) -> dict[str, float]:
    """Returns the percentage of right answers of each kind if they are drawn from the choices.

    A constant answer gives no more.
    """
    chances = group_scores((100 / len(question.choices), [question.row["category"]]) for question in questions)
    return {kind: mean(values) for kind, values in chances.items()}


def make_notes(questions: Sequence[Question], answers: Sequence[Answer], items: Sequence[ScoredAnswer]) -> list[str]:
    """Returns notes on answers that could not be read and on missing kinds."""
    unparsed = [answer for answer, item in zip(answers, items, strict=True) if not item.parsed]
    asked = {question.row["category"] for question in questions}
    missing = ", ".join(kind for kind in KINDS if kind not in asked)
    return unparsed_notes(unparsed, len(items), "name none of the possible ones, and are wrong") + [
        f"there are no questions of some kinds: {missing}"] * bool(missing)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
