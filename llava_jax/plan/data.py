"""Finds the number of steps of a stage: from its recipe, from its data file, or estimated for published sets."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_jax import config
from llava_jax.data.packing import WINDOW, pack
from llava_jax.images import ImageProcessor
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.tokenizer import Tokenizer

COUNTED_WINDOWS = 4
"""Number of windows of a long data file that are tokenised to estimate its packed sequences."""

DRAWN_RECORDS = 4 * WINDOW
"""Number of records of a published set that are drawn."""

SYSTEM_TOKENS = 36
"""Number of tokens of a conversation besides turns and images: the system text and the roles."""

PHOTOS = ((640, 480), (640, 427), (480, 640))
"""Typical sizes (width, height) of photos, for layouts that depend on the size."""
PAGES = ((1240, 1754), (850, 1100), (800, 600), (1280, 720))
"""Typical sizes of documents, charts and screens."""

# Parts of the published sets: name, records, media of a record, and mean and standard deviation of its tokens without
# media. Media are a number of photos, or alternatives: images by their sizes, videos by their numbers of frames. The
# counts of LLaVA-1.5's sets are published, of later ones the totals. The tokens are estimates by kind of text, drawn
# from a log-normal distribution.
INSTRUCT_150K = (("conversations", 56_681, 1, 280, 90), ("descriptions", 23_240, 1, 150, 40),
                 ("reasoning", 76_643, 1, 240, 60))
MIX_665K = (
    ("conversations", 57_000, 1, 280, 90), ("descriptions", 23_000, 1, 150, 40), ("reasoning", 77_712, 1, 240, 60),
    ("VQAv2", 82_783, 1, 100, 35), ("GQA", 72_140, 1, 220, 100), ("OKVQA", 8_998, 1, 45, 10),
    ("OCR-VQA", 80_000, 1, 110, 25), ("A-OKVQA", 66_160, 1, 65, 12), ("TextCaps", 21_953, 1, 120, 60),
    ("RefCOCO", 48_447, 1, 350, 200), ("VG", 86_417, 1, 550, 250), ("ShareGPT", 40_688, 0, 1000, 800),
)
SCIENCEQA = (("with an image", 6_218, 1, 280, 120), ("text alone", 6_508, 0, 280, 120))
NEXT_779K = (*(part for part in MIX_665K if part[0] != "TextCaps"),
             ("documents and charts", 135_655, [[size] for size in PAGES], 60, 30))
MID_STAGE = (("captions", 3_557_000, 1, 200, 80), ("documents", 300_000, [[size] for size in PAGES], 300, 200),
             ("text alone", 143_000, 0, 600, 300))
SINGLE_IMAGE = (("photos", 1_155_000, 1, 200, 150), ("documents", 659_000, [[size] for size in PAGES], 120, 80),
                ("mathematics", 643_000, [[(500, 375)], [(400, 200)]], 200, 150),
                ("texts in images", 285_000, 1, 80, 40), ("text alone", 458_000, 0, 600, 400))
ONEVISION = (("single images", 800_000, [[size] for size in PHOTOS + PAGES], 200, 150),
             ("several images", 545_000, [[PHOTOS[0]] * count for count in (2, 3, 4)], 200, 150),
             ("videos", 255_000, [[32]], 250, 100))
PUBLISHED = {
    "llava_v1_5_mix665k.json": (MIX_665K, True),
    "llava_instruct_150k.json": (INSTRUCT_150K, True),
    "blip_laion_cc_sbu_558k.json": ((("captions", 558_128, 1, 18, 8),), False),
    "scienceqa/llava_train_QCM-LEA.json": (SCIENCEQA, True),
    "cc3m_595k/chat.json": ((("captions", 595_375, 1, 16, 6),), False),
    "LLaVA-NeXT-Data": (NEXT_779K, True),
    "onevision/mid_stage.json": (MID_STAGE, True),
    "onevision/single_image.json": (SINGLE_IMAGE, True),
    "onevision/onevision.json": (ONEVISION, True),
}
"""Parts of published data files by the end of their paths, and whether conversations have a system text and roles."""


@dataclass(frozen=True)
class Length:
    """Holds the number of steps of a stage."""

    steps: int
    source: str
    """Source of the number, in words."""
    rows: int | None = None
    """Number of packed sequences of an epoch; None if the recipe gives the steps."""


def length(recipe: config.Recipe, name: str, model: LlavaConfig, rows: int | None = None) -> Length | None:
    """Returns the length of the stage `name`, or None if it is unknown. `rows` of an epoch replace those of the data.

    The length is the stage's own steps if it has them. Otherwise it follows from its data file, a part of which is
    tokenised, if the file and the tokenizer exist, or from the file's name if it is that of a published set.
    """
    stage = recipe.stages[name]
    if stage.steps is not None and rows is None:
        return Length(stage.steps, "the recipe's steps")
    path = Path(stage.data.path)
    tokenizer = Path(recipe.model.llava or recipe.model.language)
    if rows is not None:
        source = "the rows per epoch given"
    elif path.exists() and tokenizer.is_dir():
        rows, source = _counted(recipe, stage, model, tokenizer)
    elif parts := next((parts for end, parts in PUBLISHED.items() if str(path).endswith(end)), None):
        rows = _estimated(stage.data, model, *parts)
        source = f"an estimate for {path.name} (published counts, typical lengths)"
    else:
        return None
    return Length(max(1, math.floor(stage.epochs * rows / stage.batch_size)), source, rows)


def _counted(recipe: config.Recipe, stage: config.Stage, model: LlavaConfig, tokenizer: Path) -> tuple[int, str]:
    """Packs the data of a stage, long data in part. Returns the packed sequences of an epoch, and the source."""
    from llava_jax.data.pipeline import Batches
    from llava_jax.train.batches import data_spec

    spec = data_spec(stage.data, model, Tokenizer.load(tokenizer), stage.data.path)
    options = {"workers": stage.data.workers, "seed": recipe.seed}
    complete = Batches(spec, stage.batch_size, **options)
    stride = max(1, complete.order.windows // COUNTED_WINDOWS)
    if stride == 1:
        return complete.count_rows(), f"counted in {stage.data.path}"
    part = Batches(spec, stride, process_count=stride, **options)  # the share of the first of `stride` processes
    share = math.ceil(complete.order.windows / stride) / complete.order.windows
    return round(part.count_rows() / share), f"estimated from a part of {stage.data.path}"


def _estimated(data: config.Data, model: LlavaConfig, parts: tuple, has_system: bool) -> int:
    records = sum(part[1] for part in parts)
    scale, processor = DRAWN_RECORDS / records, model.with_image_mode(data.image_mode).processor
    visual, tiles = _draw_media(parts, scale, processor, np.random.default_rng(2))
    tokens = draw(parts, scale, np.random.default_rng(0)) + visual + (SYSTEM_TOKENS if has_system else 0)
    tokens = np.minimum(tokens, data.sequence_length).astype(int)
    tiles = np.minimum(tiles, data.tiles_per_sequence)
    order = np.random.default_rng(1).permutation(len(tokens))
    windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
    rows = sum(len(pack(tokens[window], tiles[window], data.sequence_length, data.tiles_per_sequence))
               for window in windows)
    return round(rows * records / len(tokens))


def draw(parts: tuple, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Draws the tokens without media of `scale` times the records of the parts."""
    turns = []
    for _, records, _, mean, sd in parts:
        spread = np.log(1 + (sd / mean) ** 2)
        turns.append(rng.lognormal(np.log(mean) - spread / 2, np.sqrt(spread), round(records * scale)))
    return np.concatenate(turns)


def _draw_media(parts: tuple, scale: float, processor: ImageProcessor, rng: np.random.Generator
                ) -> tuple[np.ndarray, np.ndarray]:
    """Draws the visual tokens, and the tiles, of the same records."""
    drawn = []
    for _, records, media, *_ in parts:
        alternatives = [[photo] * media for photo in PHOTOS] if isinstance(media, int) else media
        layouts = [processor.layouts(alternative) for alternative in alternatives]
        counts = np.array([[sum(len(layout.index) for layout in several), sum(layout.tiles for layout in several)]
                           for several in layouts])
        drawn.append(counts[rng.integers(len(counts), size=round(records * scale))])
    return tuple(np.concatenate(drawn).T)
