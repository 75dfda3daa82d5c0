"""Where things are, how many they are, and which colour belongs to which: what a bag of patches cannot tell."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llava_jax.errors import UserError
from llava_jax.evaluate.probes.make_probes import FILE, KINDS
from llava_jax.evaluate.probes.words import FORMS, name_choices, understand
from llava_jax.evaluate.tasks.base import Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask
from llava_jax.files import matches_schema

ROW = {"category": str, "set": int | str}
SAID = {"text": str, "answer": str, "choices": [str]}
"""What a probe has, once and in each language."""


@dataclass(frozen=True)
class Probe(QuestionFileTask):
    """What `spatial` and `multilingual` share: the questions of probes.jsonl, in one language or several."""

    name_choices: bool = True
    """end each question with its possible answers"""

    required_files = "probes.jsonl (probes-data makes it from boxes) and its pictures"
    question_file = FILE
    image_folder = ""
    max_new_tokens = 32
    languages: ClassVar[tuple[str, ...]]

    def load(self, data: str) -> list[Question]:
        """Each question in all languages, one after the other; UserError for a file of another form.

        A question without words in one of the languages is left out.
        """
        path = self.question_path(data)
        whole = [(question, {"en": question.row, **question.row}) for question in super().load(data)]
        whole = [(question, said) for question, said in whole if all(language in said for language in self.languages)]
        if not whole:
            raise UserError(f"{path}: no question is there in all of these languages: {', '.join(self.languages)}")
        for question, said in whole:
            if not (matches_schema(question.row, ROW)
                    and all(matches_schema(said[language], SAID) for language in self.languages)):
                raise UserError(f"{path}: question {question.id!r} is no probe, which has {', '.join([*SAID, *ROW])}")
            for language in self.languages:
                answer, choices = said[language]["answer"], said[language]["choices"]
                if answer not in choices:
                    raise UserError(f"{path}: question {question.id!r}: {answer!r} is none of its choices")
                if unknown := set(choices) - set(FORMS[language]):
                    raise UserError(f"{path}: question {question.id!r}: {unknown.pop()!r} is no answer to a probe")
        return [self._question(question, language, said[language])
                for question, said in whole for language in self.languages]

    def _question(self, question: Question, language: str, said: Mapping[str, Any]) -> Question:
        row = {key: said[key] for key in ("answer", "choices")} | {
            "category": question.row["category"], "set": question.row["set"], "language": language}
        text = said["text"] + (name_choices(language, said["choices"]) if self.name_choices else "")
        return replace(question, text=text, row=row, choices=tuple(said["choices"]))


@dataclass(frozen=True)
class Spatial(Probe):
    """Probes of space: left, right, above, below, inside, between, counting, and which attribute is whose."""

    title = "Spatial probes"
    languages = ("en",)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent of right answers: of all kinds together (their mean), what guessing gives, of each kind, and of its
        sets that are right as a whole. A missing answer is wrong, and of doubled ones the last counts."""
        items = judge(questions, answers)
        figures, chance = by_kind(questions, items), guessing(questions)
        whole = {"all": mean(figures[kind] for kind in chance), "guessing": mean(chance.values())}
        return Scores(whole | figures, "all", items, notes(questions, answers, items))


def judge(questions: Sequence[Question], answers: Sequence[Answer]) -> list[ScoredAnswer]:
    """Of each answer, what it says and whether that is right. UserError for an answer to another question."""
    rows, items = {question.id: question.row for question in questions}, []
    for answer in answers:
        if answer.id not in rows:
            raise UserError(f"there is no question {answer.id!r}; these are answers to other questions")
        row = rows[answer.id]
        read = understand(row["language"], answer.text, row["choices"])
        items.append(ScoredAnswer(answer.id, float(read == row["answer"]), row["answer"], read, row["category"]))
    return items


def by_kind(questions: Sequence[Question], items: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Percent of right answers of each kind, and, as "KIND, sets", of sets without a wrong one."""
    scores = {item.id: item.score for item in items}
    right, sets = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for question in questions:
        kind, score = question.row["category"], scores.get(question.id, 0.0)
        right[kind].append(score)
        sets[kind][question.row["set"]].append(score)
    figures = {}
    for kind in right:
        figures[kind] = 100 * mean(right[kind])
        figures[f"{kind}, sets"] = 100 * mean(min(scores) for scores in sets[kind].values())
    return figures


def guessing(questions: Sequence[Question]) -> dict[str, float]:
    """What percent of each kind is right if answers are drawn among the possible ones; one constant answer gives no
    more."""
    chances = defaultdict(list)
    for question in questions:
        chances[question.row["category"]].append(100 / len(question.choices))
    return {kind: mean(values) for kind, values in chances.items()}


def notes(questions: Sequence[Question], answers: Sequence[Answer], items: Sequence[ScoredAnswer]) -> list[str]:
    """What a figure alone would hide."""
    unread = [answer for answer, item in zip(answers, items, strict=True) if not item.parsed]
    asked = {question.row["category"] for question in questions}
    missing = ", ".join(kind for kind in KINDS if kind not in asked)
    return unparsed_notes(unread, len(items), "name none of the possible ones, and are wrong") + [
        f"there are no questions of some kinds: {missing}"] * bool(missing)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
