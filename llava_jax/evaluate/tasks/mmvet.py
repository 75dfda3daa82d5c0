"""MM-Vet: open questions that GPT-4 judges (Yu et al. 2023). Its answers are written for the official judge."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.evaluate.tasks.base import EMPTY, Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask


@dataclass(frozen=True)
class MMVet(QuestionFileTask):
    """MM-Vet: writes the file that its notebook judges."""

    title = "MM-Vet"
    required_files = "llava-mm-vet.jsonl, images/"
    question_file = "llava-mm-vet.jsonl"
    image_folder = "images"
    num_published = 218
    max_new_tokens = 1024

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns no figures."""
        empty = [answer for answer in answers if not answer.text.strip()]
        notes = [*self.size_notes(questions), *unparsed_notes(empty, len(answers), EMPTY),
                 "judged by the benchmark's own notebook, from mm-vet.json"]
        return Scores({}, "", [ScoredAnswer(answer.id, None) for answer in answers], notes)

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns {v1_ID: text}."""
        texts = {f"v1_{answer.id}": answer.text for answer in answers}
        return {"mm-vet.json": json.dumps(texts, indent=2).encode()}
