"""MMBench, English and Chinese: multiple choice, where an answer must be right for every rotation of the options.

The published TSV has a question once for each rotation, under indices that differ by a million. LLaVA's `--all-rounds`
rotates the options itself (Liu et al. 2023).
"""

import base64
import binascii
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.cli import Flag
from llava_jax.errors import UserError, user_path
from llava_jax.evaluate.tasks.base import (
    LETTER_INSTRUCTION,
    Answer,
    Question,
    ScoredAnswer,
    Scores,
    Task,
    unparsed_notes,
)
from llava_jax.evaluate.tasks.question_file import find_question_file

LETTERS = ("A", "B", "C", "D")
REQUIRED_COLUMNS = ("index", "question", "hint", *LETTERS, "image")
DROPPED_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category")  # not in the upload
PREDICTION_COLUMN = 6  # position of the answers in the upload
MAX_INDEX_DIGITS = 18
ROTATION_STEP = 1_000_000
"""Rows whose indices differ by a multiple of this are one question."""
NO_VALUE = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
            "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""Cells that pandas, with which the original reads the table, reads as missing values."""


@dataclass(frozen=True)
class MMBench(Task):
    """MMBench, dev: writes the upload for its server; with the answers in the table, accuracy of the letters."""

    all_rounds: Flag = False
    """Whether to ask each question once for every rotation of its options."""

    title = "MMBench dev"
    required_files = "mmbench_dev_20230712.tsv, which has the pictures"
    max_new_tokens = 1024
    required_packages = ("openpyxl",)
    question_file: ClassVar[str] = "mmbench_dev_20230712.tsv"
    instruction: ClassVar[str] = LETTER_INSTRUCTION
    num_published: ClassVar[int] = 4377

    def load(self, data: str) -> list[Question]:
        """Returns the questions. Raises UserError for other columns, or a row without question, options or image."""
        questions = []
        for where, row in _read_rows(self.question_path(data)):
            options = options_of(row)
            if is_missing(row["question"]) or not options:
                raise UserError(f"{where}: the row has no question or no options")
            try:
                image = base64.b64decode(row["image"])
            except binascii.Error as error:
                raise UserError(f"{where}: the image is not in base64 ({error})") from None
            cells = {key: value for key, value in row.items() if key != "image"}
            letters = LETTERS[: len(options)]
            start = row["question"] if is_missing(row["hint"]) else f"{row['hint']}\n{row['question']}"
            for rotation in range(len(options) if self.all_rounds else 1):
                rotated = [*options[rotation:], *options[:rotation]]
                listed = (f"{letter}. {option}" for letter, option in zip(letters, rotated, strict=True))
                prompt = "\n".join([start, *listed])
                fields = {"round_id": rotation, "options": rotated,
                          "option_char": [*letters[rotation:], *letters[:rotation]]}
                questions.append(Question(int(row["index"]), prompt + self.instruction, (image,), cells, letters,
                                          prompt, fields))
        if not questions:
            raise UserError(f"{self.question_path(data)}: the table has no rows")
        return questions

    def question_path(self, data: str) -> str:
        return find_question_file(data, self.question_file)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Returns percentages if the table has the answers. Missing answers are wrong.

        `circular` is of questions right in every rotation, and by category; `accuracy` is of single answers.
        `parse_letter` reads the letters. The server asks a language model if its rules read none.
        """
        rows = {question.id: question.row for question in questions}
        notes = []
        if len(rows) != self.num_published:
            notes.append(f"{len(rows):,} rows; the published table has {self.num_published:,}")
        asked = {(question.id, question.fields["round_id"]): question for question in questions}
        keys = [(answer.id, _round(answer)) for answer in answers]
        unparsed = [answer for answer, key in zip(answers, keys, strict=True)
                    if key in asked and not parse_letter(answer.text, asked[key].fields["options"])]
        notes += unparsed_notes(unparsed, len(answers), "name no option by the rules used here; the server asks a "
                                "language model, and a score made here counts them as wrong")
        if any(is_missing(row.get("answer")) for row in rows.values()):
            notes.append("no score: the table has no answers; upload mmbench_upload.xlsx")
            return Scores({}, "", [ScoredAnswer(answer.id, None) for answer in answers], notes)
        right, items = dict.fromkeys(asked, False), []
        for answer, key in zip(answers, keys, strict=True):
            if key not in asked:
                raise UserError(f"MMBench: an answer to round {answer.line.get('round_id')!r} of question {answer.id}, "
                                "which was not asked; are these answers with --all-rounds?")
            fields, row = asked[key].fields, rows[answer.id]
            letter = parse_letter(answer.text, fields["options"])
            parsed = fields["option_char"][LETTERS.index(letter)] if letter else ""
            right[key] = parsed == row["answer"]
            items.append(ScoredAnswer(answer.id, float(right[key]), row["answer"], parsed, row.get("category") or ""))
        return Scores(*self._figures(rows, right), items, notes)

    def _figures(self, rows: Mapping[int, Mapping[str, str]], right: Mapping[tuple[int, int], bool]
                 ) -> tuple[dict[str, float], str]:
        """Returns the figures and the name of the main one."""
        rotations = defaultdict(list)
        for (id, _), value in right.items():
            rotations[id % ROTATION_STEP].append(value)
        figures, main = {"accuracy": _percent(list(right.values()))}, "accuracy"
        if any(len(values) > 1 for values in rotations.values()):
            main = "circular"
            figures = {main: _percent([all(values) for values in rotations.values()]), **figures}
        for column in ("l2-category", "category"):
            groups = defaultdict(dict)
            for id, row in rows.items():
                if not is_missing(row.get(column)):
                    groups[row[column]][id % ROTATION_STEP] = all(rotations[id % ROTATION_STEP])
            figures |= {f"{column}: {name}": _percent(list(groups[name].values())) for name in sorted(groups)}
        return figures, main

    def submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, bytes]:
        """Returns the table without hints, categories and images, with the answers as column `prediction`, as xlsx.

        Raises UserError that names the package if openpyxl is not installed.
        """
        try:
            import openpyxl
            from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
        except ImportError:
            raise UserError("MMBench's upload is an Excel file: pip install openpyxl (or llava_jax[mmbench])") from None
        predictions = {answer.id: answer.text for answer in answers}  # the last of several rounds, as in the original
        rows = {question.id: question.row for question in questions}
        columns = [name for name in next(iter(rows.values())) if name not in DROPPED_COLUMNS]
        columns.insert(PREDICTION_COLUMN, "prediction")
        book = openpyxl.Workbook()
        for line, row in enumerate([dict(zip(columns, columns, strict=True)), *rows.values()], 1):
            for number, name in enumerate(columns, 1):
                if line > 1 and name == "index":
                    book.active.cell(line, number, int(row[name]))
                    continue
                value = predictions.get(int(row["index"])) if line > 1 and name == "prediction" else row[name]
                if value is not None and (name == "prediction" or not is_missing(value)):
                    cell = book.active.cell(line, number)
                    # Excel refuses control characters and halves of surrogate pairs.
                    cell.value = ILLEGAL_CHARACTERS_RE.sub("", value.encode(errors="replace").decode())
                    cell.data_type = "s"  # because "=..." would be a formula
        content = io.BytesIO()
        book.save(content)
        return {"mmbench_upload.xlsx": content.getvalue()}


@dataclass(frozen=True)
class MMBenchCN(MMBench):
    """MMBench in Chinese, dev."""

    title = "MMBench-CN dev"
    required_files = "mmbench_dev_cn_20231003.tsv, which has the pictures"
    question_file = "mmbench_dev_cn_20231003.tsv"
    instruction = "\n请直接回答选项字母。"
    num_published = 4329


def is_missing(value: str | None) -> bool:
    """Whether a cell is a missing value to the original."""
    return value is None or value in NO_VALUE or value.lower() in ("nan", "none")


def options_of(row: Mapping[str, str]) -> list[str]:
    """Returns the options before the first missing one."""
    count = next((n for n, letter in enumerate(LETTERS) if is_missing(row[letter])), len(LETTERS))
    return [row[letter] for letter in LETTERS[:count]]


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """Returns the letter of `options` that an answer names, or None.

    That is a letter alone; a capital in front, with `.`, `:` or `)`; "the answer is X."; or the text of one option.
    Case, outer blanks and full stops do not count.
    """
    letters = LETTERS[: len(options)]
    plain = _plain(text)
    if plain.upper() in letters:
        return plain.upper()
    if (front := re.match(r"\s*\(?([A-D])[.:)]", text)) and front[1] in letters:
        return front[1]
    for letter in letters:
        if f"the answer is {letter}.".lower() in text.lower():
            return letter
    same = [letter for letter, option in zip(letters, options, strict=True) if plain == _plain(option)]
    return same[0] if len(same) == 1 else None


def _read_rows(path: str) -> list[tuple[str, dict[str, str]]]:
    """Returns the position and the cells of each row. Cells after the end of a short row are None."""
    csv.field_size_limit(sys.maxsize)  # because an image is a cell
    rows: list[tuple[str, dict[str, str]]] = []
    with user_path(path), open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
        table = csv.DictReader(file, delimiter="\t")
        try:
            missing = [name for name in REQUIRED_COLUMNS if name not in (table.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: not a table of MMBench, it has no column {', '.join(missing)}")
            rows += ((f"{path}, line {table.line_num}", row) for row in table)
        except UnicodeDecodeError:
            raise UserError(f"{path}, after line {table.line_num}: no UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{path}, after line {table.line_num}: not a table ({error})") from None
    for where, row in rows:
        if None in row or row["image"] is None or row["index"] is None:
            raise UserError(f"{where}: the row has more cells than the first line, or ends before the picture")
        if not (row["index"].isdecimal() and len(row["index"]) <= MAX_INDEX_DIGITS):
            raise UserError(f"{where}: the index {row['index']!r:.80} is not a number")
    if doubled := len(rows) - len({int(row["index"]) for _, row in rows}):
        raise UserError(f"{path}: {doubled:,} rows have the index of another")
    return rows


def _round(answer: Answer) -> int | None:
    """Returns the round of an answer: 0 if its line has none, None if it is invalid."""
    number = answer.line.get("round_id", 0)
    return number if isinstance(number, int) else None


def _plain(text: str) -> str:
    return text.strip().strip(".").strip().lower()


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values)
