"""What is wrong with a row of a data set: all that can be told at once, not only what comes first."""

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
from PIL import Image

from llava_jax.data.fields import ANY_MARK
from llava_jax.data.records import REASONS, BadRow, Record
from llava_jax.data.sources import Source
from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, MissingImage, open_header, open_image, orientation, read_image
from llava_jax.images import prepare
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, NoSupervisedTokens, encode_conversation
from llava_jax.text.templates import IMAGE, Template
from llava_jax.text.tokenizer import Tokenizer, Tokens

# A row with one of REASONS cannot be used; of these, training would not notice anything.
SUSPECT = {
    "empty_answer": "an answer without text",
    "empty_question": "a question without text and image",
    "wrong_type": "an image of another type than its name says",
    "animated": "an image of several frames; training sees the first",
    "rotated": "an image that viewers turn, as its EXIF says, and training does not",
    "transparent": "an image with transparent pixels; training sees the colours beneath",
    "faint": "a grey image of 16 or 32 bits with hardly a difference left in 8",
    "separator": "text that is a mark of the template or a special token",
    "media_mark": "text that looks like the place of a video, audio or image",
    "duplicate_id": "the id of an earlier row of the same source",
    "duplicate": "images, questions and answers of an earlier row",
    "duplicate_question": "images and questions of an earlier row, other answers",
}
KINDS = (*REASONS, *SUSPECT)

# What is kept of every row: 31 bytes. Texts and images are 64-bit hashes, 0 in `question` where there is no record.
ROW = np.dtype([("id", "u8"), ("question", "u8"), ("answer", "u4"),
                ("tokens", "i4"), ("learned", "i4"), ("images", "u2"), ("good", "?")])

IMAGE_SECONDS = 30.0  # for decoding one image; training has no such limit, for all hosts must skip the same rows
FAINT = 16  # of 256 grey levels

_ANGLED = re.compile(r"<+[^<>\s]+>+")  # </s>, <|im_start|>, <<SYS>>: marks of a template that may stand beside words
_TOKEN = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a special token can look like


class Finding(NamedTuple):
    """One thing that is wrong with one row."""

    source: str  # the file
    row: int  # from 1
    line: int | None  # from 1, in a text file
    id: str
    kind: str  # one of KINDS
    message: str

    def as_json(self) -> dict[str, Any]:
        """The fields, and `usable`: whether training would take the row in spite of it."""
        return {**self._asdict(), "usable": self.kind in SUSPECT}


class Chunk(NamedTuple):
    """What was found in a stretch of rows."""

    rows: np.ndarray  # ROW [rows]
    images: np.ndarray  # uint64: a hash of every image, each once
    findings: list[Finding]
    unknown: collections.Counter[str]  # keys that nothing reads, by how many rows have them


class Words:
    """Stands in for a tokenizer where none is known: tells what is learned, but not how many tokens that is."""

    adds_bos, bos_id, puts_blank = False, None, False

    def tokenize(self, text: str) -> Tokens:
        places = [match.span() for match in re.finditer(r"\s+|\S+", text)]
        return Tokens([0] * len(places), places)


@dataclasses.dataclass(frozen=True)
class Checker:
    """Reads rows, opens their images and tokenises them, as training does, and says all that is wrong.

    `checker((k, start, stop))` gives the Chunk of these rows of `sources[k]`. Can be pickled. Without a tokenizer in
    `settings` the numbers of tokens are 0 and no row is too long for `max_length`. Repeated rows are for the caller to
    find: they may be in different chunks.
    """

    sources: tuple[Source, ...]
    settings: Settings
    max_length: int
    tiles_per_sequence: int | None  # None: any number

    def __call__(self, task: tuple[int, int, int]) -> Chunk:
        which, start, stop = task
        source = self.sources[which]
        rows = np.zeros(stop - start, ROW)
        findings: list[Finding] = []
        unknown: collections.Counter[str] = collections.Counter()
        images: dict[int, list[tuple[str, str]]] = {}
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
                    findings += [Finding(*place(source, index), found_id, *problem) for problem in problems]
        return Chunk(rows, np.fromiter(images, np.uint64, len(images)), findings, unknown)

    def _check(
        self, source: Source, index: int, row: np.void, seen: dict[int, list[tuple[str, str]]]
    ) -> tuple[Record | None, list[tuple[str, str]]]:
        """The record, if there is one, and (kind, message) of its problems; fills in `row` and `seen` images."""
        try:
            record = source[index]
        except BadRow as bad:
            return None, [(bad.reason, _without_place(str(bad), source, index))]
        hashes = [_hash(image) for image in record.images]
        questions, answers = ([turn["value"] for turn in record.turns if (turn["from"] == "gpt") == answer]
                              for answer in (False, True))
        row["images"] = min(len(hashes), 65535)
        row["question"] = _hash(repr((hashes, questions)))
        row["answer"] = _hash(repr(answers)) & 0xFFFFFFFF

        problems = []
        for number, (image, key) in enumerate(zip(record.images, hashes, strict=True), 1):
            if key not in seen:
                seen[key] = self._check_image(image)
            name = f"image {number}" if isinstance(image, bytes) else image.removeprefix(source.image_root + os.sep)
            problems += [(kind, f"{name}: {message}") for kind, message in seen[key]]
        if self.tiles_per_sequence is not None and len(record.images) > self.tiles_per_sequence:
            slots = f"a packed row has {self.tiles_per_sequence} slots (--tiles-per-sequence)"
            problems.append(("too_long", f"{len(record.images)} images, but {slots}"))
        problems += self._tokenise(record, row)
        problems += self._check_texts(record, learns=all(kind != "no_supervised_tokens" for kind, _ in problems))
        return record, problems

    def _check_image(self, image: str | bytes) -> list[tuple[str, str]]:
        """Opens an image as training does; nothing less than decoding all of it finds one that is cut off."""
        content, settings = image if isinstance(image, bytes) else b"", self.settings
        try:
            content = content or read_image(image, settings.max_pixels)
            opened = open_image(content, settings.exif, settings.max_pixels, IMAGE_SECONDS)
            if self._tile_pixels(opened) >= MAX_PIXELS:
                prepare(opened, settings.image_size, settings.image_mode)  # refuses some of these
        except MissingImage:
            return [("missing_image", "no such image file")]
        except UserError as error:
            name = image if isinstance(image, str) else f"image of {len(content)} bytes"
            reason = str(error).removeprefix(f"{name}: ").removeprefix(f"image of {len(content)} bytes: ")
            return [("broken_image", reason.removeprefix("the image "))]
        with open_header(content, settings.max_pixels) as header:
            # MPO is how cameras add a preview to a JPEG.
            sort = "JPEG" if header.format == "MPO" else header.format
            animated = header.format != "MPO" and _is_animated(header)
            turned = orientation(header)
        problems = _check_pixels(content, opened, settings.max_pixels)
        if turned != 1 and not settings.exif:
            problems.append(("rotated", f"EXIF orientation {turned}: viewers turn it, training does not (data.exif)"))
        suffix = "" if isinstance(image, bytes) else os.path.splitext(image)[1].lower()
        named = Image.registered_extensions().get(suffix, sort)
        if named != sort:
            problems.append(("wrong_type", f"holds {sort}, but is named {suffix}"))
        if animated:
            problems.append(("animated", "has several frames; training sees the first"))
        return problems

    def _tile_pixels(self, image: Image.Image) -> float:
        """Pixels of the image once its shorter side is resized to that of a tile."""
        return self.settings.image_size**2 * max(image.size) / min(image.size)

    def _tokenise(self, record: Record, row: np.void) -> list[tuple[str, str]]:
        """What training says of the tokens; fills in their numbers."""
        settings = self.settings
        try:
            # One token for each image is quicker, and how many more there would be is known.
            example = encode_conversation(record.turns, settings.template, settings.tokenizer or Words(), 1)
        except NoSupervisedTokens as error:
            return [("no_supervised_tokens", str(error).removeprefix("nothing to learn: the conversation has "))]
        except UserError as error:
            return [("malformed", str(error))]
        problems = []
        used = np.count_nonzero(example.tokens == IMAGE_TOKEN_ID)
        if used != len(record.images):  # an <image> stood in a turn that is left out
            problems.append(("image_count", f"{len(record.images)} images, but {used} in the turns that are used"))
        if settings.tokenizer is not None:
            length = row["tokens"] = len(example.tokens) + used * (settings.tokens_per_image - 1)
            row["learned"] = np.count_nonzero(example.labels != IGNORE)
            most, limit = min((self.max_length, "--max-length"), (settings.context or math.inf, "the model's context"))
            if length > most:
                problems.append(("too_long", f"{length} tokens, {length - most} more than {limit} {most}"))
        return problems

    def _check_texts(self, record: Record, learns: bool) -> list[tuple[str, str]]:
        problems = []
        marks: dict[str, int] = {}
        opening = True  # before the first question, where encoding leaves an answer out
        for number, turn in enumerate(record.turns, 1):
            role, text = turn["from"], turn["value"]
            opening &= role != "human"
            if not text.strip() and not opening:
                if role == "human":
                    problems.append(("empty_question", f"turn {number} has neither text nor image"))
                elif learns:
                    problems.append(("empty_answer", f"turn {number} has no text"))
            for mark in _find_marks(text, separators(self.settings.template), self.settings.tokenizer):
                marks.setdefault(mark, number)
            if role == "human" and (mark := ANY_MARK.search(text)):
                problems.append(("media_mark", f"turn {number} holds {mark[0]}"))
        if marks:
            found = ", ".join(f"turn {number} holds {mark!r}" for mark, number in list(marks.items())[:4])
            problems.append(("separator", found))
        return problems


@functools.cache
def separators(template: Template) -> tuple[str, ...]:
    """The words and marks by which a template tells turns apart."""
    strings = [template.before_system, template.after_system, template.user, template.after_user, template.assistant,
               template.before_end, template.end, template.after_end, template.between,
               template.image.replace(IMAGE, " ")]
    marks = [mark for text in strings if text.strip() for mark in _ANGLED.findall(text) or [text.strip()]]
    return tuple(dict.fromkeys(marks))


def place(source: Source, index: int) -> tuple[str, int, int | None]:
    """Path of the source, row and, in a text file, line; both from 1."""
    line = re.search(r" \(line (\d+)\)$", source.where(index))
    return source.path, index + 1, line and int(line[1])


def read_id(source: Source, index: int) -> str:
    """The id of a row, as far as it can be read."""
    try:
        found = source.row(index)["id"]
    except (BadRow, KeyError, TypeError, IndexError):
        return ""
    return str(found) if isinstance(found, str | int) else ""


def _without_place(message: str, source: Source, index: int) -> str:
    where, found_id = source.where(index), read_id(source, index)
    return message.removeprefix(where).removeprefix(f", id {found_id:.80}").removeprefix(": ")


def _check_pixels(content: bytes, opened: Image.Image, max_pixels: int) -> list[tuple[str, str]]:
    """What is lost of an image that could be opened on its way to RGB of 8 bits."""
    with open_header(content, max_pixels) as image:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image.load()
            if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                return [("transparent", "has transparent pixels; training sees the colours beneath")]
        elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
            low, high = opened.getextrema()[0]
            least, most = image.getextrema()
            if high - low < FAINT and least < most:
                return [("faint", f"its values from {least:g} to {most:g} become {low} to {high} of 255")]
    return []


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # there is a second frame, and it is damaged
        return True


def _find_marks(text: str, known: Sequence[str], tokenizer: Tokenizer | None) -> list[str]:
    marks = [mark for mark in known if mark in text]
    if tokenizer is not None and ("<" in text or "[" in text):
        found = (mark for mark in _TOKEN.findall(text) if mark != IMAGE and mark not in marks)
        marks += [mark for mark in found if tokenizer.special_id(mark) is not None]
    return marks


def _hash(content: str | bytes) -> int:
    """64 bits of a text or an image, never 0."""
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) or 1
