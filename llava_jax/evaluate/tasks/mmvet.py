"""MM-Vet: open questions, judged by GPT-4 (Yu et al. 2023); here its answers are written for the official judge."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.evaluate.tasks.base import EMPTY, Answer, Item, Question, Scores, unread_notes
from llava_jax.evaluate.tasks.questions import QuestionFile
from llava_jax.files import replacing


@dataclass(frozen=True)
class MMVet(QuestionFile):
    """MM-Vet: writes the file that its notebook judges."""

    title = "MM-Vet"
    needs = "llava-mm-vet.jsonl, images/"
    file = "llava-mm-vet.jsonl"
    pictures = "images"
    published = 218
    max_new_tokens = 1024

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """No figures."""
        empty = [answer for answer in answers if not answer.text.strip()]
        notes = [*self.size_notes(questions), *unread_notes(empty, len(answers), EMPTY),
                 "judged by the benchmark's own notebook, from mm-vet.json"]
        return Scores({}, "", [Item(answer.id, None) for answer in answers], notes)

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer], folder: str) -> list[str]:
        """{v1_ID: text}."""
        path = os.path.join(folder, "mm-vet.json")
        with replacing(path) as file:
            file.write(json.dumps({f"v1_{answer.id}": answer.text for answer in answers}, indent=2).encode())
        return [path]
