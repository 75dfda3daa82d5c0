"""`prepare preview`: some records of a data set as one HTML page."""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Annotated

import tyro

from llava_jax.config import Data
from llava_jax.data.examples import Loader
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, open_mixture
from llava_jax.errors import UserError
from llava_jax.pages import page
from llava_jax.prepare.preview_page import PreviewRecord, render_page
from llava_jax.prepare.settings import Settings


def draw_rows(mixture: Mixture, count: int, seed: int) -> list[int]:
    """Numbers of `count` rows of the mixture, each once, drawn as often from each source as an epoch reads it."""
    draw = random.Random(seed)
    ends = list(itertools.accumulate(mixture.counts))
    drawn = draw.sample(range(ends[-1]), min(count, ends[-1]))
    which = [bisect.bisect_right(ends, place) for place in drawn]
    rows = [iter(draw.sample(range(len(source)), min(which.count(i), len(source))))
            for i, source in enumerate(mixture.sources)]
    found = [(i, next(rows[i], None)) for i in which]
    return [mixture.starts[i] + row for i, row in found if row is not None]


def read_rows(numbers: Sequence[int], loader: Loader) -> list[PreviewRecord]:
    """Reads rows as training does, and keeps what is wrong with one."""
    shown, mixture = [], loader.mixture
    for position, number in enumerate(numbers, 1):
        source, index = mixture.locate(number)
        row = record = example = tiles = bad = None
        try:
            row = source.row(index)
            record = source[index]
            example = loader.text(number)
            tiles = loader.pixels(number)
        except BadRow as error:
            bad = error
        shown.append(PreviewRecord(position, source.where(index), row, record, example, tiles, bad))
    return shown


@dataclasses.dataclass(frozen=True)
class Preview:
    """Shows some records as the model gets them, on one HTML page: the pictures after padding or cropping, every token
    and whether it is learned, and the packed rows."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """data file or folder of any format, or a mixture file"""
    model: str = ""
    """directory of a LLaVA, which says tokens, template and image size; or of a tokenizer, for sizes as LLaVA-1.5's"""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 12
    """records to show, drawn at random"""
    output: str = "preview.html"
    """the page"""
    image_root: str = ""
    """folder to which image paths are relative; the data's own folder if empty"""
    template: str = ""
    """conversation template; the model's if empty"""
    max_length: int = Data.sequence_length
    """tokens of a packed row, data.sequence_length of a recipe"""
    tiles_per_sequence: int = Data.tiles_per_sequence
    """image slots of a packed row, data.tiles_per_sequence of a recipe"""
    exif: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """turn images as their EXIF orientation says, data.exif of a recipe"""
    max_pixels: int = Data.max_pixels
    """pixels of an image at most, data.max_pixels of a recipe"""
    seed: int = 0
    """of the draw"""
    first: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """show the first records instead"""
    rows: tuple[int, ...] = ()
    """show these rows instead, numbered from 1 through all files of a mixture"""

    def run(self) -> int:
        if not self.model:
            raise UserError("preview shows tokens: give --model, the directory of a model or of a tokenizer")
        for name in ("count", "max_length", "tiles_per_sequence"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        page.check_page(self.output)
        mixture = open_mixture(self.data, self.image_root)
        settings = dataclasses.replace(
            Settings.load(self.model, self.template), exif=self.exif, max_pixels=self.max_pixels
        )
        loader = Loader(mixture=mixture, **vars(settings), sequence_length=self.max_length,
                        tiles_per_sequence=self.tiles_per_sequence, bad_rows="error")
        shown = read_rows(self._numbers(mixture), loader)
        bad = sum(one.bad is not None for one in shown)
        how = "chosen" if self.rows else "the first" if self.first else f"drawn with seed {self.seed}"
        about = {
            "format": "; ".join(dict.fromkeys(source.format for source in mixture.sources)),
            "records": f"{mixture.starts[-1]:,}",
            "shown": f"{len(shown)}, {how}, {bad} bad",
            "model": self.model,
            "template": settings.template.name,
            "images": f"{settings.image_mode}, {settings.image_size} × {settings.image_size}",
        }
        page.write(self.output, render_page(f"Preview of {self.data}", about, shown, settings, self.max_length,
                                            self.tiles_per_sequence))
        print(f"{self.output}: {len(shown)} record{'s' * (len(shown) != 1)}, {bad} bad")
        return 0

    def _numbers(self, mixture: Mixture) -> list[int]:
        total = mixture.starts[-1]
        if wrong := [row for row in self.rows if not 1 <= row <= total]:
            raise UserError(f"{mixture.name}: no row {wrong[0]}; the rows are 1 to {total}")
        if self.rows:
            return [row - 1 for row in self.rows]
        return list(range(min(self.count, total))) if self.first else draw_rows(mixture, self.count, self.seed)
