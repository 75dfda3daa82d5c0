"""VQAv2 and VizWiz: short answers that a server scores, or annotations of the validation split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks import evalai
from llava_jax.evaluate.tasks.base import (
    NOT_A_PHRASE,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    group_scores,
    is_short_phrase,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import QuestionFileTask, find_file, read_json, unanswered_notes
from llava_jax.files import matches_schema, read_json_lines

ALL_OF_TEST = "llava_vqav2_mscoco_test2015.jsonl"


@dataclass(frozen=True)
class VqaTask(QuestionFileTask):
    """Base class of VQAv2 and VizWiz: a server scores the answers, or annotations do, with the benchmark's tool."""

    annotations: str = ""
    """File of the benchmark's annotations of these questions (val), to score them on this machine."""

    server: ClassVar[str]
    key: ClassVar[str]  # field that identifies a question in questions and annotations
    is_wrapped: ClassVar[bool] = False  # whether the list of annotations is in an object

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        if self.annotations:
            self._annotations_of(questions)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns the accuracy of the benchmark's tool, by answer type and question type too, if it has annotations."""
        notes = self.size_notes(questions)
        texts = {answer.id: evalai.process(answer.text) for answer in answers}  # the last of several, as in the upload
        unparsed = [answer for answer in answers if not is_short_phrase(answer.text, texts[answer.id])]
        if not self.annotations:
            notes += [*unparsed_notes(unparsed, len(answers), NOT_A_PHRASE),
                      f"no score without annotations; upload to {self.server}"]
            items = [ScoredAnswer(answer.id, None, parsed=texts[answer.id]) for answer in answers]
            return Scores({}, "", items, notes)
        rows = self._annotations_of(questions)
        scores = {id: evalai.soft_accuracy(evalai.challenge_form(texts.get(id, "")),
                                           self._normalize_references(row["references"])) for id, row in rows.items()}
        unparsed = [answer for answer in unparsed if not scores.get(answer.id)]
        notes += unparsed_notes(unparsed, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        groups = group_scores((scores[id], ["accuracy", *(f"{kind.replace('_', ' ')}: {row[kind]}" for kind in (
            "answer_type", "question_type") if kind in row)]) for id, row in rows.items())
        names = sorted(groups, key=lambda name: (name != "accuracy", name))
        items = [ScoredAnswer(answer.id, scores[answer.id], " | ".join(rows[answer.id]["references"]),
                              texts[answer.id], str(rows[answer.id].get("answer_type", "")))
                 for answer in answers if answer.id in rows]
        return Scores({name: 100 * sum(groups[name]) / len(groups[name]) for name in names}, "accuracy", items, notes)

    def _annotations_of(self, questions: Sequence[Question]) -> dict[int | str, dict[str, Any]]:
        """Returns the annotation of each question by the question's id, with the human answers as `references`."""
        schema, form = [{self.key: int | str, "answers": [{"answer": str}]}], f"[{{{self.key}, answers: [{{answer}}]}}]"
        if self.is_wrapped:
            schema, form = {"annotations": schema}, f"{{annotations: {form}}}"
        expected = f"not annotations of {self.title}: {form} is expected"
        content = read_json(self.annotations, lambda x: matches_schema(x, schema), expected)
        rows = content["annotations"] if self.is_wrapped else content
        if not rows or not all(row["answers"] for row in rows):
            raise UserError(f"{self.annotations}: {expected}")
        known = {row[self.key]: {**row, "references": [answer["answer"] for answer in row["answers"]]} for row in rows}
        if lost := [question.row[self.key] for question in questions if question.row[self.key] not in known]:
            raise UserError(f"{self.annotations}: no annotation of {lost[0]!r}; it is of another split")
        return {question.id: known[question.row[self.key]] for question in questions}

    def _normalize_references(self, references: Sequence[str]) -> Sequence[str]:
        """Returns human answers as the benchmark's tool compares them."""
        return references


@dataclass(frozen=True)
class VqaV2(VqaTask):
    """VQAv2, test-dev."""

    title = "VQAv2 test-dev"
    required_files = f"llava_vqav2_mscoco_test-dev2015.jsonl, {ALL_OF_TEST} (for the upload), test2015/"
    question_file = "llava_vqav2_mscoco_test-dev2015.jsonl"
    image_folder = "test2015"
    num_published = 107_394
    server = "eval.ai, challenge 830"
    key = "question_id"
    is_wrapped = True

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        super().check_ground_truth(data, questions)
        self._upload_ids(data, questions)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        scores = super().score(data, questions, answers)
        if self.annotations or find_file(data, ALL_OF_TEST):
            return scores
        note = f"without {ALL_OF_TEST} the upload has these questions alone; the server wants all of test2015"
        return replace(scores, notes=[*scores.notes, note])

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns [{question_id, answer}] of all test2015 questions, with an empty text for a missing answer."""
        texts = {answer.id: evalai.process(answer.text) for answer in answers}
        rows = [{"question_id": id, "answer": texts.get(id, "")} for id in self._upload_ids(data, questions)]
        return {"vqav2_upload.json": json.dumps(rows).encode()}

    def _upload_ids(self, data: str, questions: Sequence[Question]) -> list[int | str]:
        path = None if self.annotations else find_file(data, ALL_OF_TEST)
        if path is None:
            return [question.id for question in questions]
        ids = []
        for number, row in read_json_lines(path):
            if not matches_schema(row, {"question_id": int | str}):
                raise UserError(f"{path}, line {number}: 'question_id' is missing, or of another kind")
            ids.append(row["question_id"])
        return ids

    def _normalize_references(self, references: Sequence[str]) -> Sequence[str]:
        # The tool leaves human answers as they are if all are equal, and never changes their articles and numbers.
        if len(set(references)) == 1:
            return references
        return [evalai.punctuation(reference) for reference in references]


@dataclass(frozen=True)
class VizWiz(VqaTask):
    """VizWiz: questions of blind people about their own pictures, test."""

    title = "VizWiz test"
    required_files = "llava_test.jsonl, test/"
    question_file = "llava_test.jsonl"
    image_folder = "test"
    num_published = 8000
    server = "eval.ai, challenge 1911"
    key = "image"

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        scores = super().score(data, questions, answers)
        return replace(scores, notes=[*scores.notes, *unanswered_notes(questions, answers)])

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns [{image, answer}] in the order of the questions, if all have an answer."""
        if unanswered_notes(questions, answers):
            return {}
        texts = {answer.id: evalai.process(answer.text) for answer in answers}
        rows = [{"image": question.row["image"], "answer": texts[question.id]} for question in questions]
        return {"vizwiz_upload.json": json.dumps(rows).encode()}
