"""TextVQA: questions whose answer is written in the picture; the published ones come with what an OCR read."""

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
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find_question_file, fits, need, read_json

ANNOTATIONS = "TextVQA_0.5.1_val.json"
REFERENCES = 10  # human answers to a question

Annotations = Mapping[tuple[Any, str], Mapping[str, Any]]


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
        """UserError as well for a question that the annotations do not have."""
        questions, annotations = super().load(data), self._annotations(data)
        for question in questions:
            try:
                _annotation(annotations, question.id, question.text)
            except UserError as error:
                path = find_question_file(data, self.question_file)
                raise UserError(f"{path}, question {question.id!r}: {error}") from None
        return questions

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """The mean over the answers that there are, each matched by image and question as its line gives them."""
        annotations, items = self._annotations(data), []
        for answer in answers:
            try:
                references = _annotation(annotations, answer.id, answer.prompt)["answers"]
            except UserError as error:
                raise UserError(f"{data}: the answer to question {answer.id!r}: {error}") from None
            read = evalai.process(answer.text)
            score = evalai.soft_accuracy(read, [evalai.process(reference) for reference in references])
            items.append(ScoredAnswer(answer.id, score, " | ".join(references), read))
        if not items:
            raise UserError("TextVQA: there are no answers to score")
        mean = 100 * (sum(item.score for item in items) / len(items))
        unread = [answer for answer, item in zip(answers, items, strict=True)
                  if not item.score and not is_short_phrase(answer.text, item.parsed)]
        notes = [*self.size_notes(questions), *unparsed_notes(unread, len(answers), f"{NOT_A_PHRASE}, and are wrong")]
        return Scores({"accuracy": mean}, "accuracy", items, notes)

    def _annotations(self, data: str) -> Annotations:
        path = need(data, ANNOTATIONS)
        content = read_json(path)
        if not fits(content, {"data": [{"image_id": int | str, "question": str, "answers": [str]}]}):
            raise UserError(f"{path}: not TextVQA's annotations: {{data: [{{image_id, question, answers}}]}}; "
                             "the test split has no answers")
        counts = {len(row["answers"]) for row in content["data"]}
        if counts != {REFERENCES}:
            raise UserError(f"{path}: every question needs {REFERENCES} human answers; the counts here are "
                             f"{', '.join(map(str, sorted(counts))) or 'none'}")
        return {(row["image_id"], row["question"].lower()): row for row in content["data"]}


def question_of(prompt: str) -> str:
    """The question in a prompt, in lower case; UserError for a prompt of none of LLaVA's three forms.

    These are `OCR tokens: ... Question: Q Short answer:`; Q, a line of OCR tokens (before or after it) and the
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


def _annotation(annotations: Annotations, image: Any, prompt: str) -> Mapping[str, Any]:
    question = question_of(prompt)
    if (image, question) not in annotations:
        raise UserError(f"TextVQA: {ANNOTATIONS} has no question {question!r} of image {image!r}; "
                         "the files are of different versions")
    return annotations[image, question]
