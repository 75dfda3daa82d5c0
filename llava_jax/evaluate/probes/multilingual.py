"""Probes in English and Korean: does a model that was tuned in one language answer in another?"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.evaluate.probes.spatial import Probe, by_kind, guessing, make_notes, mean, score_answers
from llava_jax.evaluate.probes.wording import LANGUAGES, NUMBERS, SIDES, parse_answer
from llava_jax.evaluate.tasks.base import Answer, Question, Scores, group_scores


@dataclass(frozen=True)
class Multilingual(Probe):
    """Questions of the spatial probes in English and in Korean."""

    title = "Multilingual probes"
    languages = LANGUAGES

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns percentages: guessing, each language (the mean over the kinds), questions right in both languages.

        The figures of `spatial` follow for each language. A Korean question needs a Korean answer, or a digit.
        """
        items = score_answers(questions, answers)
        scores, chance = {item.id: item.score for item in items}, guessing(questions)
        figures, parts = {"guessing": mean(chance.values())}, {}
        languages = dict.fromkeys(question.row["language"] for question in questions)
        for language in languages:
            asked = [question for question in questions if question.row["language"] == language]
            kinds = by_kind(asked, items)
            figures[language] = mean(kinds[kind] for kind in guessing(asked))
            parts |= {f"{language} {kind}": value for kind, value in kinds.items()}
        by_number = group_scores((scores.get(question.id, 0.0), [question.row["number"]]) for question in questions)
        if in_both := [min(values) for values in by_number.values() if len(values) == len(self.languages)]:
            figures["both"] = 100 * mean(in_both)
        return Scores(figures | parts, next(reversed(languages)), items,
                      [*make_notes(questions, answers, items), *_english_notes(questions, answers)])

    def _question(self, question: Question, language: str, wording: Mapping[str, Any]) -> Question:
        asked = super()._question(question, language, wording)
        return replace(asked, id=f"{question.id}-{language}", row=asked.row | {"number": question.id})


def _english_notes(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    korean = {question.id for question in questions if question.row["language"] == "ko"}
    texts = [answer.text for answer in answers if answer.id in korean]
    words = (*SIDES, "yes", "no", *NUMBERS)
    count = sum(bool(re.search("[A-Za-z]", text) and parse_answer("en", text, words)) for text in texts)
    return [f"{count:,} of {len(texts):,} answers to Korean questions have English words"] * bool(count)
