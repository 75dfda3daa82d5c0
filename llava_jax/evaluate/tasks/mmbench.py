"""MMBench, English and Chinese: multiple choice, right only if right however the options are ordered.

The published TSV has a question once for each rotation of its options, under indices that differ by a million; LLaVA's
`--all-rounds` rotates them itself (Liu et al. 2023).
"""

import base64
import binascii
import csv
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
from llava_jax.files import replacing

LETTERS = ("A", "B", "C", "D")
NEEDED = ("index", "question", "hint", *LETTERS, "image")
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # not in the upload
PREDICTION = 6  # the column of the answers in the upload
LONGEST_INDEX = 18  # digits
COPY = 1_000_000  # rows whose indices differ by a multiple of this are one question
# What pandas, with which the original reads the table, takes for no value.
NO_VALUE = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
            "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


@dataclass(frozen=True)
class MMBench(Task):
    """MMBench, dev: writes the upload for its server; with the answers in the table, accuracy of the letters."""

    all_rounds: bool = False
    """ask each question once for every rotation of its options"""

    title = "MMBench dev"
    required_files = "mmbench_dev_20230712.tsv, which has the pictures"
    max_new_tokens = 1024
    required_packages = ("openpyxl",)
    question_file: ClassVar[str] = "mmbench_dev_20230712.tsv"
    suffix: ClassVar[str] = LETTER_INSTRUCTION
    num_published: ClassVar[int] = 4377

    def load(self, data: str) -> list[Question]:
        """UserError for a table of other columns, or a row without question, options or picture."""
        questions = []
        for where, row in _rows(find_question_file(data, self.question_file)):
            options = options_of(row)
            if no_value(row["question"]) or not options:
                raise UserError(f"{where}: the row has no question or no options")
            try:
                image = base64.b64decode(row["image"])
            except binascii.Error as error:
                raise UserError(f"{where}: the image is not in base64 ({error})") from None
            kept = {key: value for key, value in row.items() if key != "image"}
            letters = LETTERS[: len(options)]
            start = row["question"] if no_value(row["hint"]) else f"{row['hint']}\n{row['question']}"
            for turn in range(len(options) if self.all_rounds else 1):
                turned = [*options[turn:], *options[:turn]]
                listed = (f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True))
                prompt = "\n".join([start, *listed])
                fields = {"round_id": turn, "options": turned, "option_char": [*letters[turn:], *letters[:turn]]}
                questions.append(Question(int(row["index"]), prompt + self.suffix, (image,), kept, letters, prompt,
                                          fields))
        if not questions:
            raise UserError(f"{find_question_file(data, self.question_file)}: the table has no rows")
        return questions

    def question_path(self, data: str) -> str:
        return find_question_file(data, self.question_file)

    def score(self, data: str, questions: Sequence[Question], answers: Sequence[Answer]) -> Scores:
        """Percent, if the table has the answers: `circular`, of questions right in every rotation, and by category;
        and `accuracy`, of single answers. An answer that is missing is wrong.

        The letters are read by `read_letter`; the server asks a language model where a rule does not find one.
        """
        rows = {question.id: question.row for question in questions}
        notes = []
        if len(rows) != self.num_published:
            notes.append(f"{len(rows):,} rows; the published table has {self.num_published:,}")
        asked = {(question.id, question.fields["round_id"]): question for question in questions}
        known = ((answer, asked.get((answer.id, _round(answer)))) for answer in answers)
        unread = [answer for answer, question in known
                  if question and not read_letter(answer.text, question.fields["options"])]
        notes += unparsed_notes(unread, len(answers), "name no option by the rules used here; the server asks a "
                              "language model, and a score made here counts them as wrong")
        if any(no_value(row.get("answer")) for row in rows.values()):
            notes.append("no score: the table has no answers; upload mmbench_upload.xlsx")
            return Scores({}, "", [ScoredAnswer(answer.id, None) for answer in answers], notes)
        right, items = dict.fromkeys(asked, False), []
        for answer in answers:
            key = answer.id, _round(answer)
            if key not in asked:
                raise UserError(f"MMBench: an answer to round {answer.line.get('round_id')!r} of question {key[0]}, "
                                 "which was not asked; are these answers with --all-rounds?")
            fields, truth = asked[key].fields, rows[answer.id]["answer"]
            letter = read_letter(answer.text, fields["options"])
            read = fields["option_char"][LETTERS.index(letter)] if letter else ""
            right[key] = read == truth
            items.append(ScoredAnswer(answer.id, float(right[key]), truth, read, rows[answer.id].get("category") or ""))
        rotations = defaultdict(list)
        for id, turn in asked:
            rotations[id % COPY].append(right[id, turn])
        figures, main = {"accuracy": _percent(list(right.values()))}, "accuracy"
        if any(len(rights) > 1 for rights in rotations.values()):
            main = "circular"
            figures = {main: _percent([all(rights) for rights in rotations.values()]), **figures}
        for column in ("l2-category", "category"):
            groups = defaultdict(dict)
            for id, row in rows.items():
                if not no_value(row.get(column)):
                    groups[row[column]][id % COPY] = all(rotations[id % COPY])
            figures |= {f"{column}: {name}": _percent(list(groups[name].values())) for name in sorted(groups)}
        return Scores(figures, main, items, notes)

    def write_submission(self, data: str, questions: Sequence[Question], answers: Sequence[Answer],
                         folder: str) -> list[str]:
        """The table without hints, categories and pictures, with the answers as column `prediction`, as xlsx.

        Raises UserError that names the package if openpyxl is not there.
        """
        try:
            import openpyxl
            from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
        except ImportError:
            raise UserError("MMBench's upload is an Excel file: pip install openpyxl "
                              "(or llava_jax[mmbench])") from None
        predictions = {answer.id: answer.text for answer in answers}  # of several rounds the last, as in the original
        rows = {question.id: question.row for question in questions}
        columns = [name for name in next(iter(rows.values())) if name not in DROPPED]
        columns.insert(PREDICTION, "prediction")
        book = openpyxl.Workbook()
        for line, row in enumerate([dict(zip(columns, columns, strict=True)), *rows.values()], 1):
            for number, name in enumerate(columns, 1):
                if line > 1 and name == "index":
                    book.active.cell(line, number, int(row[name]))
                    continue
                value = predictions.get(int(row["index"])) if line > 1 and name == "prediction" else row[name]
                if value is not None and (name == "prediction" or not no_value(value)):
                    cell = book.active.cell(line, number)
                    # Without what Excel refuses: control characters, and halves of surrogate pairs.
                    cell.value = ILLEGAL_CHARACTERS_RE.sub("", value.encode(errors="replace").decode())
                    cell.data_type = "s"  # "=..." is no formula
        path = os.path.join(folder, "mmbench_upload.xlsx")
        with replacing(path) as file:
            book.save(file)
        return [path]


@dataclass(frozen=True)
class MMBenchCN(MMBench):
    """MMBench in Chinese, dev."""

    title = "MMBench-CN dev"
    required_files = "mmbench_dev_cn_20231003.tsv, which has the pictures"
    question_file = "mmbench_dev_cn_20231003.tsv"
    suffix = "\n请直接回答选项字母。"
    num_published = 4329


def no_value(value: str | None) -> bool:
    """Whether a cell is empty to the original."""
    return value is None or value in NO_VALUE or value.lower() in ("nan", "none")


def options_of(row: Mapping[str, str]) -> list[str]:
    """Those before the first that is missing."""
    options = []
    for letter in LETTERS:
        if no_value(row[letter]):
            break
        options.append(row[letter])
    return options


def read_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names, of those of `options`, else None.

    A letter alone; a capital in front, with `.`, `:` or `)`; "the answer is X."; or the text of one option. Case,
    outer blanks and periods do not count.
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


def _rows(path: str) -> list[tuple[str, dict[str, str]]]:
    """Where each row stands, and its cells; those after the end of a short row are None."""
    csv.field_size_limit(sys.maxsize)  # a picture is a cell
    rows: list[tuple[str, dict[str, str]]] = []
    with user_path(path), open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
        table = csv.DictReader(file, delimiter="\t")
        try:
            missing = [name for name in NEEDED if name not in (table.fieldnames or ())]
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
        if not (row["index"].isdecimal() and len(row["index"]) <= LONGEST_INDEX):
            raise UserError(f"{where}: the index {row['index']!r:.80} is not a number")
    doubled = len(rows) - len({int(row["index"]) for _, row in rows})
    if doubled:
        raise UserError(f"{path}: {doubled:,} rows have the index of another")
    return rows


def _round(answer: Answer) -> int | None:
    """The round that an answer is to, 0 where its line has none; None for what is no round."""
    number = answer.line.get("round_id", 0)
    return number if isinstance(number, int) else None


def _plain(text: str) -> str:
    return text.strip().strip(".").strip().lower()


def _percent(rights: Sequence[bool]) -> float:
    return 100 * sum(rights) / len(rights)
