"""Benchmarks whose questions stand in LLaVA's form: JSON lines of {question_id, image, text, [category]}."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax import files
from llava_jax.errors import UserError, user_path
from llava_jax.evaluate.tasks.base import Answer, Question, Task


@dataclass(frozen=True)
class QuestionFileTask(Task):
    """A benchmark with one question file and one folder of images.

    `data` is the folder that holds `file`, or such a file of any name, whose folder is then looked in for the rest.
    Nothing here looks at images: a file of answers is scored without them.
    """

    image_root: str = ""
    """folder of the images; empty: where the benchmark has them"""

    question_file: ClassVar[str]
    image_folder: ClassVar[str]  # the benchmark's own folder of images
    num_published: ClassVar[int]  # questions of the published file
    choices: ClassVar[tuple[str, ...]] = ()

    def load(self, data: str) -> list[Question]:
        """The questions in the order of the file; UserError for a row of another form."""
        folder = self.resolve_image_root(data)
        path = find_question_file(data, self.question_file)
        questions = []
        for number, row in read_json_lines(path):
            for key, form in (("question_id", int | str), ("image", str), ("text", str)):
                if not fits(row.get(key), form):
                    raise UserError(f"{path}, line {number}: not a question of {self.title}: {key!r} is "
                                     f"{'missing' if key not in row else 'of another kind'}")
            image = os.path.join(folder, row["image"])
            questions.append(Question(row["question_id"], row["text"], (image,), row, self.choices))
        if not questions:
            raise UserError(f"{path}: the file has no questions")
        return questions

    def resolve_image_root(self, data: str) -> str:
        return self.image_root or os.path.join(data_folder(data), self.image_folder)

    def question_path(self, data: str) -> str:
        return find_question_file(data, self.question_file)

    def size_notes(self, questions: Sequence[Question]) -> list[str]:
        """Says so when this is not the published number of questions."""
        if len(questions) == self.num_published:
            return []
        return [f"{len(questions):,} questions; the published file has {self.num_published:,}"]


def data_folder(data: str) -> str:
    """The folder that `data` is, or is in. UserError if there is nothing."""
    if os.path.isdir(data):
        return data
    if not os.path.isfile(data):
        raise UserError(f"{data}: no such folder or file")
    return os.path.dirname(data)


def find_question_file(data: str, name: str) -> str:
    """`data` itself if it is a file, else the file `name` in it; UserError if there is none."""
    path = os.path.join(data, name) if os.path.isdir(data) else data
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; --data is the folder with {name}, or a file of that form")
    return path


def find(data: str, *names: str) -> str | None:
    """The first of `names` that is in the folder of `data`."""
    paths = (os.path.join(data_folder(data), name) for name in names)
    return next(filter(os.path.exists, paths), None)


def need(data: str, *names: str) -> str:
    """The same; UserError if none is there."""
    path = find(data, *names)
    if path is None:
        raise UserError(f"{os.path.join(data_folder(data), names[0])}: no such file or folder")
    return path


def make_folder(path: str) -> None:
    """Makes a folder and those above it; UserError that names it where that is forbidden, or a file is in the way."""
    with user_path(path):
        os.makedirs(path, exist_ok=True)


def read_json(path: str) -> Any:
    """An object or a list; UserError that names the file."""
    return files.read_json(path, (dict, list))


def fits(value: Any, form: Any) -> bool:
    """Whether `value`, of a JSON file, has a form: a type; a list of one form, which all its items have; or an object
    of forms by key, of which none may be missing. True and False are no numbers."""
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], form[key]) for key in form)
    return isinstance(value, form) and (form is bool or not isinstance(value, bool))


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of every line that is not blank."""
    with user_path(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise UserError(f"{path}, line {number}: broken JSON (nested too deeply)") from None
            except ValueError as error:  # broken UTF-8 as well
                raise UserError(f"{path}, line {number}: broken JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, row


def unanswered_notes(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    """A note if questions have no answer, for the benchmarks whose upload needs all of them."""
    there = {answer.id for answer in answers}
    missing = sum(question.id not in there for question in questions)
    return [f"{missing:,} questions have no answer; the upload is written only when all have"] if missing else []
