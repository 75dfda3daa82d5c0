"""Finds what is wrong with a row of a data set: all problems at once, not only the first."""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax.data.examples import lay_out
from llava_jax.data.fields import ANY_MARK
from llava_jax.data.records import REASONS, BadRow, Record
from llava_jax.data.sources import Source
from llava_jax.errors import UserError
from llava_jax.images import Layout
from llava_jax.prepare.image_checks import Problem, check_medium
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, NoSupervisedTokens, encode_conversation
from llava_jax.text.templates import IMAGE, Template
from llava_jax.text.tokenizer import Tokenizer, Tokens
from llava_jax.video import Video

SUSPECT = {
    "empty_answer": "an answer without text",
    "empty_question": "a question without text and image",
    "wrong_type": "an image of another type than its name says",
    "animated": "an image of several frames; training sees the first",
    "rotated": "an image that viewers rotate, as its EXIF says, and training does not",
    "transparent": "an image with transparent pixels; training sees the colours beneath",
    "faint": "a grey image of 16 or 32 bits with hardly a difference left in 8",
    "separator": "text that is a mark of the template or a special token",
    "media_mark": "text that looks like the position of a video, audio or image",
    "duplicate_id": "the id of an earlier row of the same source",
    "duplicate": "images, questions and answers of an earlier row",
    "duplicate_question": "images and questions of an earlier row, other answers",
}
"""Kinds of findings in rows that training would use. Rows with one of REASONS are unusable."""
KINDS = (*REASONS, *SUSPECT)

ROW = np.dtype([("id", "u8"), ("question", "u8"), ("answer", "u4"),
                ("tokens", "i4"), ("supervised", "i4"), ("images", "u2"), ("tiles", "u1"), ("good", "?")])
"""Fields that are kept of a row, in 32 bytes. Texts and images are 64-bit hashes; `question` is 0 without a record."""

_ANGLED = re.compile(r"<+[^<>\s]+>+")  # </s>, <|im_start|>, <<SYS>>: marks of a template that may be next to words
_TOKEN = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a special token can look like


class Finding(NamedTuple):
    """Describes one problem of one row."""

    source: str
    """Path of the data file."""
    row: int
    """Number of the row, from 1."""
    line: int | None
    """Line in a text file, from 1."""
    id: str
    kind: str
    """One of KINDS."""
    message: str

    def as_json(self) -> dict[str, Any]:
        """Returns the fields, and `usable`: whether training would use the row."""
        return {**self._asdict(), "usable": self.kind in SUSPECT}


class Chunk(NamedTuple):
    """Holds what was found in consecutive rows."""

    rows: np.ndarray
    """ROW of every row."""
    images: np.ndarray
    """Hash of every distinct image, uint64."""
    findings: list[Finding]
    unknown: collections.Counter[str]
    """Number of rows by key that nothing reads."""


class Words:
    """Replaces the tokenizer if none is known: it finds what is supervised, but counts words instead of tokens."""

    adds_bos, bos_id, adds_prefix_space = False, None, False

    def tokenize(self, text: str) -> Tokens:
        positions = [match.span() for match in re.finditer(r"\s+|\S+", text)]
        return Tokens([0] * len(positions), positions)


@dataclasses.dataclass(frozen=True)
class Checker:
    """Reads rows, opens their images and tokenises them, as training does, and finds all problems.

    `checker((k, start, stop))` returns the Chunk of these rows of `sources[k]`. Can be pickled. Without a tokenizer in
    `settings` the numbers of tokens are 0 and no row is too long. Repeated rows are found by the caller, because they
    may be in different chunks.
    """

    sources: tuple[Source, ...]
    settings: Settings
    max_length: int
    tiles_per_sequence: int | None
    """Maximum number of tiles of a row; None for any number."""

    def __call__(self, task: tuple[int, int, int]) -> Chunk:
        which, start, stop = task
        source = self.sources[which]
        rows = np.zeros(stop - start, ROW)
        findings: list[Finding] = []
        unknown: collections.Counter[str] = collections.Counter()
        images: dict[int, list[Problem]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's: what it warns of is either found here or harmless
            for row, index in zip(rows, range(start, stop), strict=True):
                record, problems = self._check(source, index, row, images)
                row["good"] = not any(kind in REASONS for kind, _ in problems)
                if record is not None:
                    unknown.update(record.unknown)
                    row["id"] = _hash(f"{which}:{record.id}") if record.id else 0
                if problems:
                    found_id = read_id(source, index) if record is None else record.id
                    findings += [Finding(*locate_row(source, index), found_id, *problem) for problem in problems]
        return Chunk(rows, np.fromiter(images, np.uint64, len(images)), findings, unknown)

    def _check(self, source: Source, index: int, row: np.void, seen: dict[int, list[Problem]]
               ) -> tuple[Record | None, list[Problem]]:
        """Returns the record, if it can be read, and its problems. Fills in `row` and the `seen` images."""
        try:
            record = source[index]
        except BadRow as bad:
            return None, [(bad.reason, _without_location(str(bad), source, index))]
        hashes = [_hash(image) for image in record.images]
        questions, answers = ([turn["value"] for turn in record.turns if (turn["from"] == "gpt") == answer]
                              for answer in (False, True))
        row["images"] = min(len(hashes), 65535)
        row["question"] = _hash(repr((hashes, questions)))
        row["answer"] = _hash(repr(answers)) & 0xFFFFFFFF

        problems = []
        for number, (image, key) in enumerate(zip(record.images, hashes, strict=True), 1):
            if key not in seen:
                seen[key] = check_medium(image, self.settings)
            path = image.path if isinstance(image, Video) else image
            name = f"image {number}" if isinstance(path, bytes) else path.removeprefix(source.image_root + os.sep)
            problems += [(kind, f"{name}: {message}") for kind, message in seen[key]]
        try:
            record, _, layouts = lay_out(record, self.settings.processor, self.settings.exif, self.settings.max_pixels,
                                         self.settings.video)
        except BadRow as bad:
            layouts = ()
            if not any(kind in ("missing_image", "broken_image") for kind, _ in problems):  # it has no layout
                problems.append((bad.reason, _without_location(str(bad), source, index)))
        tiles = sum(layout.tiles for layout in layouts)
        row["tiles"] = min(tiles, 255)
        if self.tiles_per_sequence is not None and tiles > self.tiles_per_sequence:
            limit = f"a packed sequence has {self.tiles_per_sequence} (--tiles-per-sequence)"
            problems.append(("too_long", f"{tiles} tiles, but {limit}"))
        problems += self._tokenise(record, layouts, row)
        problems += self._check_texts(record, supervised=all(kind != "no_supervised_tokens" for kind, _ in problems))
        return record, problems

    def _tokenise(self, record: Record, layouts: Sequence[Layout], row: np.void) -> list[Problem]:
        """Finds what training refuses about the tokens. Fills in their numbers."""
        settings = self.settings
        try:
            # One token per image is quicker, and the number of missing tokens is known.
            example = encode_conversation(record.turns, settings.template, settings.tokenizer or Words(), 1)
        except NoSupervisedTokens as error:
            return [("no_supervised_tokens", str(error).removeprefix("nothing to learn: the conversation has "))]
        except UserError as error:
            return [("malformed", str(error))]
        problems = []
        used = np.count_nonzero(example.tokens == IMAGE_TOKEN_ID)
        if used != len(record.images):  # an <image> is in a turn that is left out
            problems.append(("image_count", f"{len(record.images)} images, but {used} in the turns that are used"))
        if settings.tokenizer is not None:
            length = row["tokens"] = len(example.tokens) - used + sum(len(layout.index) for layout in layouts)
            row["supervised"] = np.count_nonzero(example.labels != IGNORE)
            context = settings.context or math.inf
            longest, limit = min((self.max_length, "--max-length"), (context, "the model's context"))
            if length > longest:
                problems.append(("too_long", f"{length} tokens, {length - longest} more than {limit} {longest}"))
        return problems

    def _check_texts(self, record: Record, supervised: bool) -> list[Problem]:
        problems = []
        marks: dict[str, int] = {}
        opening = True  # before the first question, where encoding leaves an answer out
        for number, turn in enumerate(record.turns, 1):
            role, text = turn["from"], turn["value"]
            opening &= role != "human"
            if not text.strip() and not opening:
                if role == "human":
                    problems.append(("empty_question", f"turn {number} has neither text nor image"))
                elif supervised:
                    problems.append(("empty_answer", f"turn {number} has no text"))
            for mark in _find_marks(text, separators(self.settings.template), self.settings.tokenizer):
                marks.setdefault(mark, number)
            if role == "human" and (mark := ANY_MARK.search(text)):
                problems.append(("media_mark", f"turn {number} contains {mark[0]}"))
        if marks:
            found = ", ".join(f"turn {number} contains {mark!r}" for mark, number in list(marks.items())[:4])
            problems.append(("separator", found))
        return problems


@functools.cache
def separators(template: Template) -> tuple[str, ...]:
    """Returns the words and marks with which a template separates turns."""
    strings = [template.before_system, template.after_system, template.user, template.after_user, template.assistant,
               template.before_end, template.end, template.after_end, template.between,
               template.image.replace(IMAGE, " ")]
    marks = [mark for text in strings if text.strip() for mark in _ANGLED.findall(text) or [text.strip()]]
    return tuple(dict.fromkeys(marks))


def locate_row(source: Source, index: int) -> tuple[str, int, int | None]:
    """Returns the path of the source, the row's number and, in a text file, its line, both from 1."""
    line = re.search(r" \(line (\d+)\)$", source.where(index))
    return source.path, index + 1, line and int(line[1])


def read_id(source: Source, index: int) -> str:
    """Returns the id of a row, or "" if it cannot be read."""
    try:
        found = source.row(index)["id"]
    except (BadRow, KeyError, TypeError, IndexError):
        return ""
    return str(found) if isinstance(found, str | int) else ""


def _without_location(message: str, source: Source, index: int) -> str:
    where, found_id = source.where(index), read_id(source, index)
    return message.removeprefix(where).removeprefix(f", id {found_id:.80}").removeprefix(": ")


def _find_marks(text: str, known: Sequence[str], tokenizer: Tokenizer | None) -> list[str]:
    marks = [mark for mark in known if mark in text]
    if tokenizer is not None and ("<" in text or "[" in text):
        found = (mark for mark in _TOKEN.findall(text) if mark != IMAGE and mark not in marks)
        marks += [mark for mark in found if tokenizer.special_id(mark) is not None]
    return marks


def _hash(content: str | bytes | Video) -> int:
    """Returns a hash of 64 bits, never 0."""
    if not isinstance(content, bytes):
        content = str(content).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) or 1
