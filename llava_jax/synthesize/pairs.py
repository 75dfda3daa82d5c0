"""Makes stage-1 data from image-caption pairs: every caption becomes the answer to a random short instruction.

This is the paper's naive expansion (Visual Instruction Tuning, sections 3 and 4.2): a pair gives a conversation of one
turn, whose question is drawn from a pool and asks for a brief description.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from llava_jax.annotations.captions import CaptionFile
from llava_jax.annotations.concept_filter import find_phrases, select
from llava_jax.annotations.context import AnnotationSource, open_contexts
from llava_jax.annotations.noun_phrases import light_chunker
from llava_jax.cli import Flag
from llava_jax.data.records import check_text
from llava_jax.endpoint.server import note
from llava_jax.errors import UserError
from llava_jax.files import atomic_write
from llava_jax.synthesize.output import JsonList
from llava_jax.synthesize.prompts import read_questions
from llava_jax.text.templates import IMAGE

COCO = re.compile(rb'\s*\{\s*"(info|licenses|type|images|annotations)"\s*:\s*[\[{"]')  # start of COCO's files


@dataclasses.dataclass(frozen=True)
class PairsCommand:
    """Turns image-caption pairs into stage-1 records: a random short instruction, and the caption as its answer.

    DATA has a row for every pair, with `image` and either `caption` or a conversation of one answer (metadata.json or
    chat.json of CC3M-595K, a JSON list or JSON lines). It can also be a COCO captions file. Every image then gives one
    of its captions, drawn by seed.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """File with the pairs."""
    out: str = "pairs.json"
    """Path of the JSON list to write."""
    filter: Flag = False
    """Whether to keep only the pairs that the concept-balanced filter selects, with the defaults of `prepare
    filter`."""
    language: str = "en"
    """Language of the instructions; captions stay as they are."""
    questions: str = ""
    """File with your own short instructions, one a line."""
    prefix: str = ""
    """Prefix of the names of images, such as coco/train2017/."""
    seed: int = 0
    """Random seed for the instructions, the position of <image>, the filter, and the choice of an image's caption."""
    bad_rows: Literal["error", "skip"] = "error"
    """Treatment of a row without image or caption: stop with an error, or skip and count it."""
    overwrite: Flag = False
    """Whether to replace OUT if it exists."""
    workers: int | None = None
    """Number of processes that extract noun phrases; default: one per core. 0 uses this process alone."""

    def run(self) -> int:
        self._check()
        questions = read_questions("pairs", self.language, file=self.questions)
        with contextlib.ExitStack() as stack:
            file = CaptionFile(stack.enter_context(_rows(self.data, self.seed)))
            if file.form == "tsv":
                raise UserError(f"{self.data}: lines of caption and URL name no image files; give rows with image and "
                                 "caption, as the downloader's metadata has them")
            kept, read, bad = itertools.repeat(True), 0, 0
            if self.filter:
                phrases, without = find_phrases(file, light_chunker, self.workers, self.bad_rows == "skip")
                kept, bad = select(phrases, seed=self.seed), len(without)
            os.makedirs(os.path.dirname(self.out) or ".", exist_ok=True)
            rows = enumerate(zip(tqdm(file, unit=" pairs", disable=not sys.stderr.isatty()), kept, strict=False))
            made = JsonList(stack.enter_context(atomic_write(self.out)))
            for number, (row, wanted) in rows:
                read += 1
                if not wanted:
                    continue
                try:
                    made.write(self._record(file, row, number, questions))
                except ValueError as error:
                    bad += 1
                    if self.bad_rows == "error":
                        raise UserError(f"{file.where(number)}: {error}; mend it, or leave such rows out with "
                                         "--bad-rows skip") from None
            if not len(made):
                raise UserError(f"{self.data}: none of {read:,} pairs is left" + (
                    ", for no phrase is in 3 of their captions; leave out --filter" if self.filter else ""))
            made.close()
        left_out = f", {bad:,} rows without image or caption left out" if bad else ""
        print(f"{self.out}: {len(made):,} records of {read:,} pairs{left_out}; {len(questions)} instructions")
        return 0

    def _check(self) -> None:
        for name in ("seed", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if os.path.realpath(self.out) == os.path.realpath(self.data):
            raise UserError(f"--out {self.out}: is the file that is read; name another")
        if os.path.isdir(self.out):
            raise UserError(f"--out {self.out}: is a folder; name a file")
        if os.path.lexists(self.out) and not self.overwrite:
            raise UserError(f"--out {self.out}: exists already; add --overwrite to replace it")

    def _record(self, file: CaptionFile, row: bytes, number: int, questions: tuple[str, ...]) -> dict[str, Any]:
        """Returns the record of a row. Raises UserError with the fault of the row."""
        caption, fields = check_text(file.caption(row).strip(), "the caption"), json.loads(row)
        image = fields.get("image")
        if not isinstance(image, str) or not image:
            raise UserError("it names no image" if not image else "image must be the name of a file")
        check_text(image, "image")
        name = fields.get("id")
        if name is None:
            name = os.path.splitext(os.path.basename(image))[0]
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise UserError(f"id is {name!r:.40}; it must be text or a whole number")
        if IMAGE in caption:
            raise UserError(f"the caption holds {IMAGE}")
        draw = random.Random(f"{self.seed} pair {number}")
        question = draw.choice(questions)
        value = f"{IMAGE}\n{question}" if draw.random() < 0.5 else f"{question}\n{IMAGE}"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": caption}]
        return {"id": name, "image": self.prefix + image, "conversations": turns}


@contextlib.contextmanager
def _rows(path: str, seed: int) -> Iterator[str]:
    """Yields a file with a row for every pair: `path` itself, or a temporary file made from a COCO captions file."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        if not COCO.match(file.read(1 << 16)):
            yield path
            return
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        contexts = open_contexts(AnnotationSource(captions=path))
        for what, count in contexts.notes.items():
            note(f"{count:,} {what}")
        for context in contexts:
            caption = random.Random(f"{seed} caption {context.id}").choice(context.captions)
            file.write(json.dumps({"id": context.id, "image": context.image, "caption": caption}) + "\n")
        file.flush()
        yield file.name
