"""MM-Vet: open questions, judged by GPT-4 (Yu et al. 2023); here its answers are written for the official judge."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.evaluate.tasks.base import EMPTY, Answer, Question, ScoredAnswer, Scores, unparsed_notes
from llava_jax.evaluate.tasks.question_file import QuestionFileTask
from llava_jax.files import replacing


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
        """No figures."""
        empty = [answer for answer in answers if not answer.text.strip()]
        notes = [*self.size_notes(questions), *unparsed_notes(empty, len(answers), EMPTY),
                 "judged by the benchmark's own notebook, from mm-vet.json"]
        return Scores({}, "", [ScoredAnswer(answer.id, None) for answer in answers], notes)

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """{v1_ID: text}."""
        path = os.path.join(folder, "mm-vet.json")
        with replacing(path) as file:
            file.write(json.dumps({f"v1_{answer.id}": answer.text for answer in answers}, indent=2).encode())
        return [path]
