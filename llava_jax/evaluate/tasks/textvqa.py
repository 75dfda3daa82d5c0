"""TextVQA: questions whose answer is written in the image. The published prompts contain tokens of an OCR."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks import evalai
from llava_jax.evaluate.tasks.base import (
    NOT_A_PHRASE,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    is_short_phrase,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, read_json, require_file
from llava_jax.files import matches_schema

ANNOTATIONS = "TextVQA_0.5.1_val.json"
SCHEMA = {"data": [{"image_id": int | str, "question": str, "answers": [str]}]}
NUM_REFERENCES = 10
"""Number of human answers to a question."""

References = Mapping[tuple[Any, str], Sequence[str]]
"""(image, question in lower case) -> human answers."""


@dataclass(frozen=True)
class TextVqa(QuestionFileTask):
    """TextVQA, validation: soft accuracy against ten human answers, after the VQA challenge's normalisation."""

    title = "TextVQA val"
    required_files = f"llava_textvqa_val_v051_ocr.jsonl, {ANNOTATIONS}, train_images/"
    question_file = "llava_textvqa_val_v051_ocr.jsonl"
    image_folder = "train_images"
    num_published = 5000
    uses_prompts = True

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for a question that the annotations lack."""
        questions, references = super().load(data), self._references(data)
        for question in questions:
            _find(references, question.id, question.text, f"{self.question_path(data)}, question {question.id!r}")
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns the mean over the answers. An answer's references follow from its image and its line's prompt."""
        references_of, items = self._references(data), []
        for answer in answers:
            references = _find(references_of, answer.id, answer.prompt, f"{data}: the answer to question {answer.id!r}")
            parsed = evalai.process(answer.text)
            score = evalai.soft_accuracy(parsed, [evalai.process(reference) for reference in references])
            items.append(ScoredAnswer(answer.id, score, " | ".join(references), parsed))
        if not items:
            raise UserError("TextVQA: there are no answers to score")
        mean = 100 * (sum(item.score for item in items) / len(items))
        unparsed = [answer for answer, item in zip(answers, items, strict=True)
                    if not item.score and not is_short_phrase(answer.text, item.parsed)]
        notes = [*self.size_notes(questions),
                 *unparsed_notes(unparsed, len(answers), f"{NOT_A_PHRASE}, and are wrong")]
        return Scores({"accuracy": mean}, "accuracy", items, notes)

    def _references(self, data: str) -> References:
        path = require_file(data, ANNOTATIONS)
        rows = read_json(path, lambda x: matches_schema(x, SCHEMA), "not TextVQA's annotations: {data: [{image_id, "
                         "question, answers}]}; the test split has no answers")["data"]
        counts = {len(row["answers"]) for row in rows}
        if counts != {NUM_REFERENCES}:
            raise UserError(f"{path}: every question needs {NUM_REFERENCES} human answers; the counts here are "
                            f"{', '.join(map(str, sorted(counts))) or 'none'}")
        return {(row["image_id"], row["question"].lower()): row["answers"] for row in rows}


def parse_question(prompt: str) -> str:
    """Returns the question of a prompt in lower case. Raises UserError if it has none of LLaVA's three forms.

    The forms are `OCR tokens: ... Question: Q Short answer:`; Q, a line of OCR tokens (before or after it) and the
    instruction; and Q and the instruction alone.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"TextVQA: a prompt of none of the known forms: {prompt!r}")


def _find(references: References, image: Any, prompt: str, where: str) -> Sequence[str]:
    try:
        question = parse_question(prompt)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if (image, question) not in references:
        raise UserError(f"{where}: TextVQA: {ANNOTATIONS} has no question {question!r} of image {image!r}; "
                        "the files are of different versions")
    return references[image, question]
