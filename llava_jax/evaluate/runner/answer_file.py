"""Files of answers: lines as LLaVA's scripts write them, added one by one, read with care."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_jax.errors import DISK_FULL_ERRNOS, UserError, user_path
from llava_jax.evaluate.tasks.base import Answer, Question
from llava_jax.files import atomic_write, matches_schema

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of the original's ids, 22 characters each

NOT_ASKED = "not_asked"  # key of an answer's metadata that says why the question was not put to the model

Line = dict[str, Any]
LINE = {"question_id": int | str, "text": str}
OTHERS = "the answers are of another version, or asked with other options"


def make_line(question: Question, text: str, model_id: str, metadata: Mapping[str, Any] | None = None) -> Line:
    """A line of an answer file. Its `answer_id` is the same whenever the same model answers the same question."""
    prompt = question.text if question.prompt is None else question.prompt
    told = json.dumps([model_id, question.id, prompt, dict(question.fields)])
    number, letters = int.from_bytes(hashlib.sha256(told.encode()).digest()), []
    for _ in range(22):
        number, letter = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[letter])
    return {"question_id": question.id, "prompt": prompt, "text": text, **question.fields,
            "answer_id": "".join(letters), "model_id": model_id, "metadata": dict(metadata or {})}


def to_answer(line: Mapping[str, Any]) -> Answer:
    return Answer(line["question_id"], line["text"], line.get("prompt", ""), line)


def read(path: str, partial: bool = False) -> tuple[list[Line], list[str]]:
    """The lines of an answer file, and a note on what was left out.

    UserError for a file or line that is not one of answers. If `partial`, a last line that is
    broken off is left out instead.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file of answers")
    lines, end = scan(path)
    notes = []
    if end < os.path.getsize(path):
        if not partial:
            raise UserError(f"{path}, line {len(lines) + 1}: the last line is broken off; was the file copied before "
                             "it was whole? --partial leaves that line out")
        notes.append(f"{path}: the last line is broken off and left out")
    if not lines:
        raise UserError(f"{path}: the file has no answers")
    return lines, notes


def scan(path: str) -> tuple[list[Line], int]:
    """The lines of an answer file, and where the last whole one ends; what follows it is broken off.

    UserError for another line that is not an answer.
    """
    lines, end = [], 0
    with user_path(path), open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                try:
                    line = json.loads(data)
                except (ValueError, RecursionError) as error:
                    if not data.endswith(b"\n"):
                        break
                    raise UserError(f"{path}, line {number}: not a line of JSON ({error})") from None
                if not matches_schema(line, LINE) or not isinstance(line.get("prompt", ""), str):
                    raise UserError(f"{path}, line {number}: not an answer with question_id and text")
                lines.append(line)
            end += len(data)
    return lines, end


def match(questions: Sequence[Question], lines: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For each line the number of its question, from 0; None if there is no such question, or it has its answer.

    A question is known by its id, its prompt and its fields, as far as all lines have them. Where several questions are
    alike, their lines stand in the order of the questions.
    """
    names = ["prompt", *(questions[0].fields if questions else ())]
    names = [name for name in names if all(name in line for line in lines)]
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, question in enumerate(questions):
        known = {"prompt": question.text if question.prompt is None else question.prompt, **question.fields}
        places[_key(question.id, known, names)].append(place)
    found = (places.get(_key(line["question_id"], line, names)) for line in lines)
    return [place.popleft() if place else None for place in found]


def check(path: str, title: str, questions: Sequence[Question], lines: Sequence[Line], ordered: bool) -> None:
    """UserError, one line, unless each question has one answer, all of one model; if `ordered`, in their order."""
    models = models_of(lines)
    if len(models) > 1:
        raise UserError(f"{path}: the answers are of {len(models)} models: {', '.join(models[:3])}; --partial scores "
                         "them as they are")
    for name in ("prompt", *(questions[0].fields if questions else ())):
        without = [line["question_id"] for line in lines if name not in line]
        if 0 < len(without) < len(lines):
            raise UserError(f"{path}: {len(without):,} of {len(lines):,} answers have no {name!r}, the first is to "
                             f"{without[0]!r}; are they of one run?")
    ids = Counter(question.id for question in questions)
    other = [line["question_id"] for line in lines if line["question_id"] not in ids]
    if other:
        raise UserError(f"{path}: {len(other):,} of {len(lines):,} answers are to questions that {title} does not "
                         f"have here, the first to {other[0]!r} (its own begin with {questions[0].id!r}); they are of "
                         "another benchmark, version or split")
    places, given = match(questions, lines), Counter(line["question_id"] for line in lines)
    if doubled := [id for id in given if given[id] > ids[id]]:
        raise UserError(f"{path}: {len(doubled):,} questions have more than one answer, the first is {doubled[0]!r}; "
                         "--partial scores the file as the original does")
    if None in places:
        line = lines[places.index(None)]
        known = [question for question in questions if question.id == line["question_id"]]
        prompts = [question.text if question.prompt is None else question.prompt for question in known]
        if line.get("prompt", prompts[0]) not in prompts:
            raise UserError(f"{path}: question {known[0].id!r} was asked as {_short(line['prompt'])}, and {title} "
                             f"asks {_short(prompts[0])}; {OTHERS}")
        told = {name: line[name] for name in known[0].fields if name in line}
        if all({**question.fields, **told} != question.fields for question in known):
            raise UserError(f"{path}: question {known[0].id!r} was not asked with {_short(str(told))}; {OTHERS}")
        raise UserError(f"{path}: question {known[0].id!r} has two answers where it was asked once "
                         f"({', '.join(told) or 'the same prompt'})")
    if len(lines) < len(questions):
        missing = sorted(set(range(len(questions))) - set(places))
        raise UserError(f"{path}: {len(missing):,} of {len(questions):,} questions have no answer, the first is "
                         f"{questions[missing[0]].id!r}; --partial scores the file as the original does")
    if ordered and places != sorted(places):
        first = next(n for n, place in enumerate(places) if place != n)
        raise UserError(f"{path}: answer {first + 1} is to question {lines[first]['question_id']!r}, which is another "
                         f"order than that of the questions, and {title} meets answers by their order; sort them, or "
                         "--partial scores the file as it is")


def models_of(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The models whose answers these are, as far as the lines tell."""
    return sorted({str(line["model_id"]) for line in lines if "model_id" in line})


class AnswerFile:
    """A file of answers that only grows; a killed process loses nothing that `add` returned from.

    Attributes:
      lines: those that were there on opening.
      mended: bytes of a broken last line, cut off on opening.

    Raises UserError if another process has it open, or another line than the last is broken.
    """

    def __init__(self, path: str):
        self.path = path
        with user_path(path, missing="no such folder"):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lines, end = scan(path)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(f"{path}: another process is writing to it; wait until it ends") from None
        except BaseException:
            os.close(self._file)
            raise
        self.mended = os.fstat(self._file).st_size - end
        os.ftruncate(self._file, end)
        if end and os.pread(self._file, 1, end - 1) != b"\n":
            os.write(self._file, b"\n")

    def add(self, line: Line) -> None:
        """Writes a line, at once; OSError (a full disk) leaves the file as it was."""
        data = _encode(line)
        before = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data):]
        except OSError as error:
            os.ftruncate(self._file, before)
            if error.errno in DISK_FULL_ERRNOS:
                raise UserError(f"{self.path}: {error.strerror}; the answers before are kept; make room") from error
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


def write(path: str, lines: Iterable[Line]) -> None:
    """A whole answer file, at once."""
    with atomic_write(path) as file:
        file.writelines(_encode(line) for line in lines)


def chunk(count: int, chunks: int, index: int) -> range:
    """The questions of part `index` of `chunks`: contiguous, ceil(count / chunks) each, the last ones fewer."""
    size = -(-count // chunks)
    return range(min(index * size, count), min((index + 1) * size, count))


def remove(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _encode(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _key(id: str | int, values: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([id, *(values[name] for name in names)])


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
