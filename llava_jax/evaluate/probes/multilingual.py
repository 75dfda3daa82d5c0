"""The same questions in English and Korean: whether a model that was tuned in one language answers in another."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.evaluate.probes.spatial import Probe, by_kind, guessing, judge, mean, notes
from llava_jax.evaluate.probes.words import LANGUAGES, NUMBERS, SIDES, understand
from llava_jax.evaluate.tasks.base import Answer, Question, Scores


@dataclass(frozen=True)
class Multilingual(Probe):
    """The questions of the spatial probes in English, and the same in Korean."""

    title = "Multilingual probes"
    languages = LANGUAGES

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent of right answers by language (the mean of the kinds), of guessing, of questions that are right in
        both, and by language the figures of `spatial`. A Korean question wants a Korean answer, or a digit."""
        items = judge(questions, answers)
        scores, chance = {item.id: item.score for item in items}, guessing(questions)
        figures, parts = {"guessing": mean(chance.values())}, {}
        spoken = dict.fromkeys(question.row["language"] for question in questions)
        for language in spoken:
            asked = [question for question in questions if question.row["language"] == language]
            kinds = by_kind(asked, items)
            figures[language] = mean(kinds[kind] for kind in guessing(asked))
            parts |= {f"{language} {kind}": value for kind, value in kinds.items()}
        rights = defaultdict(list)
        for question in questions:
            rights[question.row["number"]].append(scores.get(question.id, 0.0))
        if whole := [min(right) for right in rights.values() if len(right) == len(self.languages)]:
            figures["both"] = 100 * mean(whole)
        told = [*notes(questions, answers, items), *_english(questions, answers)]
        return Scores(figures | parts, next(reversed(spoken)), items, told)

    def _question(self, question: Question, language: str, said: Mapping[str, Any]) -> Question:
        asked = super()._question(question, language, said)
        return replace(asked, id=f"{question.id}-{language}", row=asked.row | {"number": question.id})


def _english(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    korean = {question.id for question in questions if question.row["language"] == "ko"}
    texts = [answer.text for answer in answers if answer.id in korean]
    words = (*SIDES, "yes", "no", *NUMBERS)
    count = sum(bool(re.search("[A-Za-z]", text) and understand("en", text, words)) for text in texts)
    return [f"{count:,} of {len(texts):,} answers to Korean questions have English words"] * bool(count)
