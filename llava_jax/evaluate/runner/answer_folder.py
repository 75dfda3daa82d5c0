"""The folder of a run: the settings, and the answers of all processes that share it."""

import contextlib
import glob
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.runner import answer_file
from llava_jax.evaluate.runner.answer_file import Line
from llava_jax.evaluate.tasks.base import Question
from llava_jax.files import make_folder, read_json, write_file, write_json_lines

SETTINGS, ANSWERS = "run.json", "answers.jsonl"


class AnswerFolder:
    """The folder of one benchmark's answers by one model."""

    def __init__(self, path: str):
        self.path = path
        self.settings_path, self.answers_path = os.path.join(path, SETTINGS), os.path.join(path, ANSWERS)

    def chunk_path(self, num_chunks: int, index: int) -> str:
        """Returns the answer file of one process."""
        name = ANSWERS if num_chunks == 1 else f"answers-{index}-of-{num_chunks}.jsonl"
        return os.path.join(self.path, name)

    def exists(self) -> bool:
        return os.path.exists(self.settings_path)

    def start(self, settings: Mapping[str, Any], questions: Sequence[Question]) -> dict[int, Line]:
        """Writes the settings of a new run, or returns the answers of an earlier one by index of their question.

        Raises UserError if the answers are of other questions, another model, or an unknown run.
        """
        make_folder(self.path)
        if self.exists():
            try:
                earlier = identity(read_json(self.settings_path))
            except (KeyError, TypeError, UserError) as error:
                raise UserError(f"{self.settings_path}: broken ({error}); --overwrite starts again") from None
            if differ := {key: value for key, value in identity(settings).items() if earlier[key] != value}:
                parts = ", ".join(f"{key} ({earlier[key]}, not {value})" for key, value in differ.items())
                raise UserError(f"{self.path}: holds answers of another run, which differs in {parts}; choose "
                                "another --out, or --overwrite")
        elif files := self._answer_files():
            raise UserError(f"{files[0]}: no {SETTINGS} beside it says which model's answers these are; --answers "
                            "scores such a file, and --overwrite deletes it")
        else:
            write_file(self.settings_path, json.dumps(settings, indent=2, ensure_ascii=False))
        return self.read(questions)

    def read(self, questions: Sequence[Question]) -> dict[int, Line]:
        """Returns the answers of all processes by index of their question, without incomplete lines."""
        while True:
            try:
                lines = [line for path in self._answer_files() for line in answer_file.scan(path)[0]]
                break
            except FileNotFoundError:  # another process has just joined the files
                continue
        indices = answer_file.match(questions, lines)
        return {index: line for index, line in zip(indices, lines, strict=True) if index is not None}

    def join(self, lines: Sequence[Line]) -> None:
        """Writes all answers to one file, and removes the files of single processes."""
        write_json_lines(self.answers_path, lines)
        remove(*(path for path in self._answer_files() if path != self.answers_path))

    def clear(self) -> None:
        """Removes the settings and all answers."""
        remove(self.settings_path, *self._answer_files())

    def _answer_files(self) -> list[str]:
        return sorted(glob.glob(os.path.join(glob.escape(self.path), "answers*.jsonl")))


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that must be equal for all answers of a run."""
    model = settings["model"]
    return {"benchmark": settings["benchmark"], "questions": settings["questions_hash"], "name": settings["name"],
            "model": model["hash"], **{key: model[key] for key in ("template", "dtype", "score_by", "baseline")}}


def chunk(count: int, num_chunks: int, index: int) -> range:
    """Returns the questions of one chunk: contiguous, ceil(count / num_chunks) each, fewer in the last chunks."""
    size = -(-count // num_chunks)
    return range(min(index * size, count), min((index + 1) * size, count))


def remove(*paths: str) -> None:
    """Removes files that may be missing."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
