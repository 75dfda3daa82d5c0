"""Finds the number of steps of a stage: from its recipe, from its data file, or estimated for published sets."""

import math
from pathlib import Path

import numpy as np

from llava_jax import config
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenizer import Tokenizer

PHOTOS = ([(640, 480)], [(640, 427)], [(480, 640)])
"""Images of a record with a photo: alternatives of typical sizes (width, height)."""
PAGES = ([(1240, 1754)], [(850, 1100)], [(800, 600)], [(1280, 720)])
"""Images of a record with a document, a chart or a screen."""
NO_IMAGE = ([],)
VIDEO = ([32],)
"""Number of frames of a video."""

PUBLISHED = {
    "llava_v1_5_mix665k.json": (0.959, (624_610, 265, PHOTOS), (40_688, 1036, NO_IMAGE)),
    "llava_instruct_150k.json": (0.915, (156_564, 277, PHOTOS)),
    "blip_laion_cc_sbu_558k.json": (1, (558_128, 18, PHOTOS)),
    "scienceqa/llava_train_QCM-LEA.json": (0.997, (6_218, 316, PHOTOS), (6_508, 316, NO_IMAGE)),
    "cc3m_595k/chat.json": (1, (595_375, 16, PHOTOS)),
    "LLaVA-NeXT-Data": (0.998, (602_657, 269, PHOTOS), (135_655, 96, PAGES), (40_688, 1036, NO_IMAGE)),
    "onevision/mid_stage.json": (0.954, (3_557_000, 236, PHOTOS), (300_000, 336, PAGES), (143_000, 636, NO_IMAGE)),
    "onevision/single_image.json": (
        0.993, (1_440_000, 212, PHOTOS), (659_000, 156, PAGES), (643_000, 236, ([(500, 375)], [(400, 200)])),
        (458_000, 636, NO_IMAGE)),
    "onevision/onevision.json": (
        0.835, (800_000, 236, PHOTOS + PAGES), (545_000, 236, tuple([(640, 480)] * count for count in (2, 3, 4))),
        (255_000, 286, VIDEO)),
}
"""Published data files by the end of their paths: how far packed sequences are filled, and parts of the set.

A part has records, mean text tokens of a record, and the images of a record, of which all alternatives are as frequent.
The counts of LLaVA-1.5's sets are published, of later ones the totals. Tokens are estimates by kind of text. Sequences
are filled as far as with packed records of log-normal lengths, in the recipes' sequences.
"""


def length(recipe: config.Recipe, name: str, model: LlavaConfig, rows: int | None = None) -> tuple[int, str] | None:
    """Returns the number of steps of the stage `name`, and its source in words. Returns None if it is unknown.

    It is the stage's own steps if it has them. Otherwise it follows from its data file if that and the tokenizer
    exist, or from the file's name if it is that of a published set. `rows` of an epoch replace those of the data.
    """
    stage = recipe.stages[name]
    if stage.steps is not None and rows is None:
        return stage.steps, "the recipe's steps"
    path = Path(stage.data.path)
    tokenizer = Path(recipe.model.llava or recipe.model.language)
    if rows is not None:
        source = "the rows per epoch given"
    elif path.exists() and tokenizer.is_dir():
        rows, source = _counted(recipe, stage, model, tokenizer), f"counted in {path}"
    elif parts := next((parts for end, parts in PUBLISHED.items() if str(path).endswith(end)), None):
        rows = _estimated(stage.data, model, *parts)
        source = f"an estimate for {path.name} (published counts, typical lengths)"
    else:
        return None
    return max(1, math.floor(stage.epochs * rows / stage.batch_size)), source


def _counted(recipe: config.Recipe, stage: config.Stage, model: LlavaConfig, tokenizer: Path) -> int:
    """Packs the data of a stage. The lengths of its records are stored beside it, where train finds them."""
    from llava_jax.data.pipeline import Batches
    from llava_jax.train.batches import data_spec

    spec = data_spec(stage.data, model, Tokenizer.load(tokenizer), stage.data.path)
    return Batches(spec, stage.batch_size, workers=stage.data.workers, seed=recipe.seed).count_rows()


def _estimated(data: config.Data, model: LlavaConfig, fill: float, *parts: tuple) -> int:
    """Returns the packed sequences of a published set, which its tokens or its tiles fill."""
    processor, needed = model.with_image_mode(data.image_mode).processor, np.zeros(2)
    for records, text, alternatives in parts:
        layouts = [processor.layouts(images) for images in alternatives]
        visual = np.mean([[sum(len(layout.index) for layout in several), sum(layout.tiles for layout in several)]
                          for several in layouts], axis=0)
        needed += records * np.minimum(visual + (text, 0), (data.sequence_length, data.tiles_per_sequence))
    return round(max(needed / (data.sequence_length, data.tiles_per_sequence)) / fill)
