"""Stage-1 data of image-caption pairs: each caption becomes the answer to a random short instruction.

The paper's naive expansion (Visual Instruction Tuning, sections 3 and 4.2): of a pair one conversation of one turn,
whose question, drawn from a pool, asks for a brief description.
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
from llava_jax.data.records import check_text
from llava_jax.endpoint.server import note
from llava_jax.errors import UserError
from llava_jax.files import atomic_write
from llava_jax.synthesize.output import JsonList
from llava_jax.synthesize.prompts import read_questions
from llava_jax.text.templates import IMAGE

COCO = re.compile(rb'\s*\{\s*"(info|licenses|type|images|annotations)"\s*:\s*[\[{"]')  # how its files begin


@dataclasses.dataclass(frozen=True)
class PairsCommand:
    """Makes image-caption pairs stage-1 records: a random short instruction, and the caption as its answer.

    DATA holds a row for each pair, with `image` and either `caption` or a conversation of one answer (metadata.json or
    chat.json of CC3M-595K, a JSON list or JSON lines); or it is a COCO captions file, of which every image gives one
    of its captions, drawn by seed.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """file with the pairs"""
    out: str = "pairs.json"
    """JSON list to write"""
    filter: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """keep only the pairs that the concept-balanced filter chooses, as prepare filter with its defaults"""
    language: str = "en"
    """of the instructions; captions are left as they are"""
    questions: str = ""
    """file with short instructions of yours, one a line"""
    prefix: str = ""
    """put before the names of images, such as coco/train2017/"""
    seed: int = 0
    """of the instructions, of the place of <image>, of the filter, and of the choice among an image's captions"""
    bad_rows: Literal["error", "skip"] = "error"
    """what to do about a row without image or caption: stop, or leave it out and count it"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace OUT if it exists"""
    workers: int | None = None
    """processes that look for phrases; by default one for each core, 0 for none besides this one"""

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
        """Raises UserError that says what is wrong with the row."""
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
    """A file with a row for each pair: `path` itself, or one made of a COCO captions file."""
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
