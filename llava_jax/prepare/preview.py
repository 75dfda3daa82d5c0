"""`prepare preview`: shows some records of a data set on one HTML page."""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Annotated

import tyro

from llava_jax.cli import Flag
from llava_jax.config import Data
from llava_jax.data.examples import DataSpec
from llava_jax.data.records import BadRow
from llava_jax.data.sources import Mixture, open_mixture
from llava_jax.errors import UserError
from llava_jax.pages import page
from llava_jax.prepare.options import require_at_least
from llava_jax.prepare.preview_page import PreviewRecord, render_page
from llava_jax.prepare.settings import ModelOptions


def draw_rows(mixture: Mixture, count: int, seed: int) -> list[int]:
    """Draws `count` different rows of the mixture, from every source in proportion to its rows in an epoch."""
    draw = random.Random(seed)
    ends = list(itertools.accumulate(mixture.counts))
    drawn = draw.sample(range(ends[-1]), min(count, ends[-1]))
    which = [bisect.bisect_right(ends, position) for position in drawn]
    rows = [iter(draw.sample(range(len(source)), min(which.count(i), len(source))))
            for i, source in enumerate(mixture.sources)]
    found = [(i, next(rows[i], None)) for i in which]
    return [mixture.starts[i] + row for i, row in found if row is not None]


def read_rows(numbers: Sequence[int], spec: DataSpec) -> list[PreviewRecord]:
    """Reads rows as training does; the error of a bad row is part of its record."""
    shown, mixture = [], spec.mixture
    for position, number in enumerate(numbers, 1):
        source, index = mixture.locate(number)
        row = record = example = tiles = bad = None
        try:
            row = source.row(index)
            record = source[index]
            record, *_ = spec.lay_out(number)
            example = spec.text(number)
            tiles = spec.tiles(number)
        except BadRow as error:
            bad = error
        shown.append(PreviewRecord(position, source.where(index), row, record, example, tiles, bad))
    return shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview(ModelOptions):
    """Shows some records as the model gets them, on one HTML page.

    The page has the tiles, every token and whether it is supervised, and the packed sequences.
    """

    tiles_per_sequence: int = Data.tiles_per_sequence
    """Number of tiles of a packed sequence (data.tiles_per_sequence of a recipe)."""
    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 12
    """Number of records to show, drawn at random."""
    out: str = "preview.html"
    """Path of the page."""
    seed: int = 0
    """Random seed of the draw."""
    first: Flag = False
    """Whether to show the first records instead."""
    rows: tuple[int, ...] = ()
    """Numbers of the rows to show instead, from 1 through all files of a mixture."""

    def run(self) -> int:
        if not self.model:
            raise UserError("preview shows tokens: give --model, the directory of a model or of a tokenizer")
        require_at_least(1, self, "count", "max_length", "tiles_per_sequence")
        page.check_page(self.out, "--out")
        mixture = open_mixture(self.data, self.image_root)
        settings, max_length = self.load_settings(), self.max_length or Data.sequence_length
        spec = DataSpec(mixture=mixture, **vars(settings), sequence_length=max_length,
                        tiles_per_sequence=self.tiles_per_sequence)
        shown = read_rows(self._numbers(mixture), spec)
        bad = sum(record.bad is not None for record in shown)
        how = "chosen" if self.rows else "the first" if self.first else f"drawn with seed {self.seed}"
        about = {
            "format": "; ".join(dict.fromkeys(source.format for source in mixture.sources)),
            "records": f"{mixture.starts[-1]:,}",
            "shown": f"{len(shown)}, {how}, {bad} bad",
            "model": self.model,
            "template": settings.template.name,
            "images": f"{settings.processor.mode_name}, {settings.processor.size} × {settings.processor.size}",
        }
        page.write(self.out, render_page(f"Preview of {self.data}", about, shown, settings, max_length,
                                         self.tiles_per_sequence))
        print(f"{self.out}: {len(shown)} record{'s' * (len(shown) != 1)}, {bad} bad")
        return 0

    def _numbers(self, mixture: Mixture) -> list[int]:
        total = mixture.starts[-1]
        if wrong := [row for row in self.rows if not 1 <= row <= total]:
            raise UserError(f"{mixture.name}: no row {wrong[0]}; the rows are 1 to {total}")
        if self.rows:
            return [row - 1 for row in self.rows]
        return list(range(min(self.count, total))) if self.first else draw_rows(mixture, self.count, self.seed)
