"""Answer files: lines as LLaVA's scripts write them, read with all checks."""

import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_jax.errors import UserError, user_path
from llava_jax.evaluate.tasks.base import Answer, Question
from llava_jax.files import matches_schema

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""Letters of the original's answer ids, which have 22 of them."""

NOT_ASKED = "not_asked"
"""Key of an answer's metadata with the reason why the model was not asked the question."""

MAX_QUOTED = 120
Line = dict[str, Any]
SCHEMA = {"question_id": int | str, "text": str}
OTHER_VERSION = "the answers are of another version, or asked with other options"


def make_line(question: Question, text: str, model_id: str, metadata: Mapping[str, Any] | None = None) -> Line:
    """Returns a line of an answer file. Its `answer_id` is the same whenever the same model answers the question."""
    prompt = question.logged_prompt
    content = json.dumps([model_id, question.id, prompt, dict(question.fields)])
    number, letters = int.from_bytes(hashlib.sha256(content.encode()).digest()), []
    for _ in range(22):
        number, letter = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[letter])
    return {"question_id": question.id, "prompt": prompt, "text": text, **question.fields,
            "answer_id": "".join(letters), "model_id": model_id, "metadata": dict(metadata or {})}


def to_answer(line: Mapping[str, Any]) -> Answer:
    return Answer(line["question_id"], line["text"], line.get("prompt", ""), line)


def read(path: str, partial: bool = False) -> tuple[list[Line], list[str]]:
    """Returns the lines of an answer file, and notes on what was left out.

    Raises UserError for a file or line without answers. If `partial`, an incomplete last line is left out instead.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file of answers")
    lines, is_complete = scan(path)
    if not is_complete and not partial:
        raise UserError(f"{path}, line {len(lines) + 1}: the last line is broken off; was the file copied before "
                        "it was whole? --partial leaves that line out")
    if not lines:
        raise UserError(f"{path}: the file has no answers")
    return lines, [f"{path}: the last line is broken off and left out"] * (not is_complete)


def scan(path: str) -> tuple[list[Line], bool]:
    """Returns the complete lines of an answer file, and whether the last line is complete.

    Raises UserError for another line that is not an answer.
    """
    lines = []
    with user_path(path), open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                line = json.loads(data)
            except (ValueError, RecursionError) as error:
                if not data.endswith(b"\n"):
                    return lines, False
                raise UserError(f"{path}, line {number}: not a line of JSON ({error})") from None
            if not matches_schema(line, SCHEMA) or not isinstance(line.get("prompt", ""), str):
                raise UserError(f"{path}, line {number}: not an answer with question_id and text")
            lines.append(line)
    return lines, True


def match(questions: Sequence[Question], lines: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Returns the index of each line's question, or None if there is no such question, or it has its answer.

    A question is identified by its id, its prompt and its fields, as far as all lines have them. Lines of equal
    questions follow the order of the questions.
    """
    names = ["prompt", *(questions[0].fields if questions else ())]
    names = [name for name in names if all(name in line for line in lines)]
    indices: dict[str, deque[int]] = defaultdict(deque)
    for index, question in enumerate(questions):
        indices[_key(question.id, {"prompt": question.logged_prompt, **question.fields}, names)].append(index)
    candidates = (indices.get(_key(line["question_id"], line, names)) for line in lines)
    return [found.popleft() if found else None for found in candidates]


def check(path: str, title: str, questions: Sequence[Question], lines: Sequence[Line], ordered: bool) -> None:
    """Raises UserError unless each question has one answer, all of one model and, if `ordered`, in their order."""
    models = models_of(lines)
    if len(models) > 1:
        raise UserError(f"{path}: the answers are of {len(models)} models: {', '.join(models[:3])}; --partial scores "
                        "them as they are")
    for name in ("prompt", *(questions[0].fields if questions else ())):
        without = [line["question_id"] for line in lines if name not in line]
        if 0 < len(without) < len(lines):
            raise UserError(f"{path}: {len(without):,} of {len(lines):,} answers have no {name!r}, the first is to "
                            f"{without[0]!r}; are they of one run?")
    num_asked, num_given = (Counter(ids) for ids in ((question.id for question in questions),
                                                     (line["question_id"] for line in lines)))
    if other := [line["question_id"] for line in lines if line["question_id"] not in num_asked]:
        raise UserError(f"{path}: {len(other):,} of {len(lines):,} answers are to questions that {title} does not "
                        f"have here, the first to {other[0]!r} (its own start with {questions[0].id!r}); they are of "
                        "another benchmark, version or split")
    if doubled := [id for id in num_given if num_given[id] > num_asked[id]]:
        raise UserError(f"{path}: {len(doubled):,} questions have more than one answer, the first is {doubled[0]!r}; "
                        "--partial scores the file as the original does")
    indices = match(questions, lines)
    if None in indices:
        _raise_mismatch(path, title, questions, lines[indices.index(None)])
    if len(lines) < len(questions):
        missing = sorted(set(range(len(questions))) - set(indices))
        raise UserError(f"{path}: {len(missing):,} of {len(questions):,} questions have no answer, the first is "
                        f"{questions[missing[0]].id!r}; --partial scores the file as the original does")
    if ordered and indices != sorted(indices):
        first = next(n for n, index in enumerate(indices) if index != n)
        raise UserError(f"{path}: answer {first + 1} is to question {lines[first]['question_id']!r}, which is another "
                        f"order than that of the questions, and {title} meets answers by their order; sort them, or "
                        "--partial scores the file as it is")


def _raise_mismatch(path: str, title: str, questions: Sequence[Question], line: Line) -> None:
    """Raises UserError that says how a line differs from the questions with its id."""
    asked = [question for question in questions if question.id == line["question_id"]]
    prompts = [question.logged_prompt for question in asked]
    if line.get("prompt", prompts[0]) not in prompts:
        raise UserError(f"{path}: question {asked[0].id!r} was asked as {_quote(line['prompt'])}, and {title} "
                        f"asks {_quote(prompts[0])}; {OTHER_VERSION}")
    fields = {name: line[name] for name in asked[0].fields if name in line}
    if all({**question.fields, **fields} != question.fields for question in asked):
        raise UserError(f"{path}: question {asked[0].id!r} was not asked with {_quote(str(fields))}; {OTHER_VERSION}")
    raise UserError(f"{path}: question {asked[0].id!r} has two answers where it was asked once "
                    f"({', '.join(fields) or 'the same prompt'})")


def models_of(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the models that the lines name."""
    return sorted({str(line["model_id"]) for line in lines if "model_id" in line})


def _key(id: str | int, values: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps([id, *(values[name] for name in names)])


def _quote(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "...")
