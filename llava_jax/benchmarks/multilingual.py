"""The same questions in English and Korean: whether a model that was tuned in one language answers in another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.benchmarks.bench import Answer, Question, Scores
from llava_jax.benchmarks.probe_words import LANGUAGES, NUMBERS, SIDES, understand
from llava_jax.benchmarks.spatial import Probe, by_kind, guessing, judge, mean, notes


@dataclass(frozen=True)
class Multilingual(Probe):
    """The questions of the spatial probes in English, and the same in Korean."""

    title = "multilingual probes"
    languages = LANGUAGES

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent of right answers by language (the mean of the kinds), of guessing, of questions that are right in
        both, and by language and kind. A Korean question wants a Korean answer, or a digit."""
        items = judge(questions, answers)
        scores = {item.id: item.score for item in items}
        chance = guessing(questions)
        totals, kinds = {"guessing": mean(chance.values())}, {}
        rights = []
        for language in self.languages:
            asked = [question for question in questions if question.row["language"] == language]
            figures = by_kind(asked, items)
            totals[language] = mean(figures[kind] for kind in chance)
            kinds |= {f"{language} {kind}": figures[kind] for kind in chance}
            rights.append([scores.get(question.id, 0.0) for question in asked])
        totals["both"] = 100 * mean(map(min, *rights))
        return Scores(totals | kinds, "ko", items, [*notes(questions, items), *_english(questions, answers)])

    def _question(self, question: Question, language: str, said: Mapping[str, Any]) -> Question:
        asked = super()._question(question, language, said)
        return replace(asked, id=f"{question.id}-{language}")


def _english(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    korean = {question.id for question in questions if question.row["language"] == "ko"}
    texts = [answer.text for answer in answers if answer.id in korean]
    count = sum(bool(understand("en", text, (*SIDES, "yes", "no", *NUMBERS))) for text in texts)
    return [f"{count:,} of {len(texts):,} answers to Korean questions have English words"] * bool(count)
