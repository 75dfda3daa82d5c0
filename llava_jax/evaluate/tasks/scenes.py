"""The miniature's questions about its own scenes: their answer is a word."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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
from llava_jax.evaluate.tasks.question_file import QuestionFileTask


@dataclass(frozen=True)
class Scenes(QuestionFileTask):
    """The miniature's scenes: accuracy by kind of question, in percent."""

    title = "Scenes of coloured shapes (the miniature)"
    required_files = "questions.jsonl and its pictures; the miniature's training leaves them in runs/mini/data"
    question_file = "questions.jsonl"
    image_folder = ""  # the questions name the folders
    max_new_tokens = 8  # an answer that is longer is wrong in any case

    def load(self, data: str) -> list[Question]:
        questions = super().load(data)
        for question in questions:
            if not all(isinstance(question.row.get(key), str) for key in ("answer", "kind")):
                raise UserError(f"{self.question_path(data)}: question {question.id} has no answer or kind")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent of right answers, `overall` and by kind; one that is missing is wrong, of doubled ones the last
        counts."""
        rows, right, items = {question.id: question.row for question in questions}, {}, []
        for answer in answers:
            if answer.id not in rows:
                raise UserError(f"there is no question {answer.id!r}; these are answers to other questions")
            row, read = rows[answer.id], normal(answer.text)
            right[answer.id] = read == normal(row["answer"])
            items.append(ScoredAnswer(answer.id, float(right[answer.id]), row["answer"], read, row["kind"]))
        kinds = defaultdict(list)
        for id, row in rows.items():
            for kind in ("overall", row["kind"]):
                kinds[kind].append(right.get(id, False))
        unread = [answer for answer in answers if not is_short_phrase(answer.text, normal(answer.text))]
        notes = unparsed_notes(unread, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        return Scores({kind: 100 * sum(found) / len(found) for kind, found in kinds.items()}, "overall", items, notes)


def normal(answer: str) -> str:
    """An answer without capitals, outer blanks and final full stop."""
    return answer.strip().rstrip(".").lower()
