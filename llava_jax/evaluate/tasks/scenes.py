"""The miniature's questions about its own scenes, with answers of one word."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.evaluate.tasks.base import (
    NOT_A_PHRASE,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    group_scores,
    index_questions,
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
    row_fields = {"answer": str, "kind": str}
    max_new_tokens = 8  # because a longer answer is wrong in any case

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns the percentage of right answers, `overall` and by kind. Missing answers are wrong."""
        by_id, right, items = index_questions(questions, answers), {}, []
        for answer in answers:  # the last of several to one question counts
            row, parsed = by_id[answer.id].row, normalize(answer.text)
            right[answer.id] = parsed == normalize(row["answer"])
            items.append(ScoredAnswer(answer.id, float(right[answer.id]), row["answer"], parsed, row["kind"]))
        groups = group_scores((right.get(id, False), ("overall", question.row["kind"]))
                              for id, question in by_id.items())
        unparsed = [answer for answer in answers if not is_short_phrase(answer.text, normalize(answer.text))]
        notes = unparsed_notes(unparsed, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        return Scores({kind: 100 * sum(scores) / len(scores) for kind, scores in groups.items()}, "overall", items,
                      notes)


def normalize(answer: str) -> str:
    """Returns an answer in lower case, without outer blanks and final full stops."""
    return answer.strip().rstrip(".").lower()
