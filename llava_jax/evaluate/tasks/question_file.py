"""Tasks whose questions are in LLaVA's form: JSON lines of {question_id, image, text, [category]}."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax import files
from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Answer, Question, Task
from llava_jax.files import matches_schema, read_json_lines


@dataclass(frozen=True)
class QuestionFileTask(Task):
    """A task with one question file and one folder of images.

    `data` is the folder of `question_file`, or a question file of any name, whose folder then has the other files.
    Images are not opened here, because a file of answers is scored without them.
    """

    image_root: str = ""
    """Folder of the images; default: the benchmark's own."""

    question_file: ClassVar[str]
    image_folder: ClassVar[str] = ""  # the benchmark's own folder of images; "": the questions name the folders
    num_published: ClassVar[int]  # number of questions of the published file
    choices: ClassVar[tuple[str, ...]] = ()
    row_fields: ClassVar[dict[str, Any]] = {}  # schemas of further fields of a question

    def load(self, data: str) -> list[Question]:
        """Returns the questions in the order of the file. Raises UserError for an invalid row."""
        folder, path, questions = self.resolve_image_root(data), self.question_path(data), []
        fields = {"question_id": int | str, "image": str, "text": str} | self.row_fields
        for number, row in read_json_lines(path):
            for key, schema in fields.items():
                if not matches_schema(row.get(key), schema):
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
        """Returns a note if the number of questions is not the published one."""
        if len(questions) == self.num_published:
            return []
        return [f"{len(questions):,} questions; the published file has {self.num_published:,}"]


def data_folder(data: str) -> str:
    """Returns `data`, or the folder of the file `data`. Raises UserError if there is neither."""
    if os.path.isdir(data):
        return data
    if not os.path.isfile(data):
        raise UserError(f"{data}: no such folder or file")
    return os.path.dirname(data)


def find_question_file(data: str, name: str) -> str:
    """Returns `data` itself if it is a file, else the file `name` in it. Raises UserError if it is missing."""
    path = os.path.join(data, name) if os.path.isdir(data) else data
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; --data is the folder with {name}, or a file of that form")
    return path


def find_file(data: str, *names: str) -> str | None:
    """Returns the first of `names` that is in the folder of `data`, or None."""
    paths = (os.path.join(data_folder(data), name) for name in names)
    return next(filter(os.path.exists, paths), None)


def require_file(data: str, *names: str) -> str:
    """Returns the first of `names` that is in the folder of `data`. Raises UserError if none is."""
    path = find_file(data, *names)
    if path is None:
        raise UserError(f"{os.path.join(data_folder(data), names[0])}: no such file or folder")
    return path


def read_json(path: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """Returns an object or a list. Raises UserError that names the file and what was expected if it is not valid."""
    content = files.read_json(path, (dict, list))
    if not is_valid(content):
        raise UserError(f"{path}: {expected}")
    return content


def unanswered_notes(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    """Returns a note if questions have no answer, for tasks whose upload needs all answers."""
    answered = {answer.id for answer in answers}
    missing = sum(question.id not in answered for question in questions)
    return [f"{missing:,} questions have no answer; the upload is written only when all have"] if missing else []
