"""VQAv2 and VizWiz: short answers, uploaded to a server; scored here where there are annotations."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from llava_jax.evaluate.tasks.question_file import (
    QuestionFileTask,
    find,
    fits,
    read_json,
    read_json_lines,
    unanswered_notes,
)
from llava_jax.files import replacing

ALL_OF_TEST = "llava_vqav2_mscoco_test2015.jsonl"


@dataclass(frozen=True)
class _Uploaded(QuestionFileTask):
    """What the two have in common: a server that knows the answers, and a tool that scores with those of val."""

    annotations: str = ""
    """the benchmark's annotations of these questions (val), to score them here"""

    server: ClassVar[str]
    key: ClassVar[str]  # what questions and annotations have in common
    wrapped: ClassVar[bool] = False  # whether the list of annotations is in an object

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        if self.annotations:
            self._rows(questions)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        notes = self.size_notes(questions)
        texts = {answer.id: evalai.process(answer.text) for answer in answers}  # of doubled ones the last, as uploaded
        unread = [answer for answer in answers if not is_short_phrase(answer.text, texts[answer.id])]
        if not self.annotations:
            notes += unparsed_notes(unread, len(answers), NOT_A_PHRASE)
            notes.append(f"no score without annotations; upload to {self.server}")
            return Scores({}, "", [ScoredAnswer(answer.id, None, parsed=texts[answer.id]) for answer in answers], notes)
        rows, scores = self._rows(questions), {}
        for id, row in rows.items():
            read = evalai.challenge_form(texts.get(id, ""))
            scores[id] = evalai.soft_accuracy(read, self._references(row["references"]))
        unread = [answer for answer in unread if not scores.get(answer.id)]
        notes += unparsed_notes(unread, len(answers), f"{NOT_A_PHRASE}, and are wrong")
        groups = defaultdict(list)
        for id, row in rows.items():
            groups["accuracy"].append(scores[id])
            for kind in ("answer_type", "question_type"):
                if kind in row:
                    groups[f"{kind.replace('_', ' ')}: {row[kind]}"].append(scores[id])
        items = [ScoredAnswer(answer.id, scores[answer.id], " | ".join(rows[answer.id]["references"]), texts[answer.id],
                      str(rows[answer.id].get("answer_type", ""))) for answer in answers if answer.id in rows]
        names = sorted(groups, key=lambda name: (name.split(":")[0] != "accuracy", name))
        figures = {name: 100 * sum(groups[name]) / len(groups[name]) for name in names}
        return Scores(figures, "accuracy", items, notes)

    def _rows(self, questions: Sequence[Question]) -> dict[int | str, dict[str, Any]]:
        """Each question's annotation, by the question's id."""
        known, rows = self._known(), {}
        for question in questions:
            key = question.row[self.key]
            if key not in known:
                raise UserError(f"{self.annotations}: no annotation of {key!r}; it is of another split")
            rows[question.id] = known[key]
        return rows

    def _known(self) -> dict[Any, dict[str, Any]]:
        """The annotations by their `key`, each with its human answers as `references`."""
        content = read_json(self.annotations)
        row = {self.key: int | str, "answers": [{"answer": str}]}
        right = fits(content, {"annotations": [row]} if self.wrapped else [row])
        rows = (content["annotations"] if self.wrapped else content) if right else []
        if not rows or not all(row["answers"] for row in rows):
            form = f"[{{{self.key}, answers: [{{answer}}]}}]"
            form = f"{{annotations: {form}}}" if self.wrapped else form
            raise UserError(f"{self.annotations}: not annotations of {self.title}: {form} is expected")
        return {row[self.key]: {**row, "references": [answer["answer"] for answer in row["answers"]]} for row in rows}

    def _references(self, references: Sequence[str]) -> Sequence[str]:
        """The human answers as the benchmark's tool compares them."""
        return references


@dataclass(frozen=True)
class VqaV2(_Uploaded):
    """VQAv2, test-dev."""

    title = "VQAv2 test-dev"
    required_files = f"llava_vqav2_mscoco_test-dev2015.jsonl, {ALL_OF_TEST} (for the upload), test2015/"
    question_file = "llava_vqav2_mscoco_test-dev2015.jsonl"
    image_folder = "test2015"
    num_published = 107_394
    server = "eval.ai, challenge 830"
    key = "question_id"
    wrapped = True

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """With annotations: accuracy as the VQA challenge's tool has it, by answer type and question type too."""
        scores = super().score(data, questions, answers)
        if self.annotations or find(data, ALL_OF_TEST):
            return scores
        note = f"without {ALL_OF_TEST} the upload has these questions alone; the server wants all of test2015"
        return Scores(scores.figures, scores.main, scores.items, [*scores.notes, note])

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """[{question_id, answer}] of all test2015 questions; an empty answer where there is none."""
        texts = {answer.id: evalai.process(answer.text) for answer in answers}
        everything = find(data, ALL_OF_TEST)
        ids = [question.id for question in questions]
        if everything and not self.annotations:
            ids = self._all_ids(everything)
        rows = [{"question_id": id, "answer": texts.get(id, "")} for id in ids]
        return [_write(os.path.join(folder, "vqav2_upload.json"), rows)]

    def check_ground_truth(self, data: str, questions: Sequence[Question]) -> None:
        super().check_ground_truth(data, questions)
        if (everything := find(data, ALL_OF_TEST)) and not self.annotations:
            self._all_ids(everything)

    def _all_ids(self, path: str) -> list[int | str]:
        ids = []
        for number, row in read_json_lines(path):
            if not fits(row, {"question_id": int | str}):
                raise UserError(f"{path}, line {number}: 'question_id' is missing, or of another kind")
            ids.append(row["question_id"])
        return ids

    def _references(self, references: Sequence[str]) -> Sequence[str]:
        # The tool leaves human answers as they are where all are the same, and their articles and numbers always.
        if len(set(references)) == 1:
            return references
        return [evalai.punctuation(reference) for reference in references]


@dataclass(frozen=True)
class VizWiz(_Uploaded):
    """VizWiz: questions of blind people about their own pictures, test."""

    title = "VizWiz test"
    required_files = "llava_test.jsonl, test/"
    question_file = "llava_test.jsonl"
    image_folder = "test"
    num_published = 8000
    server = "eval.ai, challenge 1911"
    key = "image"

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """With annotations: accuracy as VizWiz's tool has it, by answer type too."""
        scores = super().score(data, questions, answers)
        return Scores(scores.figures, scores.main, scores.items, [*scores.notes, *unanswered_notes(questions, answers)])

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """[{image, answer}] in the order of the questions; nothing unless all have an answer."""
        if unanswered_notes(questions, answers):
            return []
        texts = {answer.id: evalai.process(answer.text) for answer in answers}
        rows = [{"image": question.row["image"], "answer": texts[question.id]} for question in questions]
        return [_write(os.path.join(folder, "vizwiz_upload.json"), rows)]


def _write(path: str, rows: list[dict]) -> str:
    with replacing(path) as file:
        file.write(json.dumps(rows).encode())
    return path
