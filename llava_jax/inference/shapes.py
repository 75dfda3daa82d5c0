"""Pads prompts and tiles to shapes from a fixed set, so that few programs are compiled."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from llava_jax.images import ImageProcessor, Layout
from llava_jax.text.encode import IMAGE_TOKEN_ID


def bucket(count: int) -> int:
    """Returns the next power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0


def length_bucket(length: int, smallest: int = 64, steps: int = 2) -> int:
    """Returns the next of 64, 96, 128, 192, 256, 384, ...: at most a third of a padded row is padding.

    More `steps` from one power of two to the next leave less padding.
    """
    step = max(bucket(length), smallest * 2) // 2 // steps
    return max(smallest, -(-length // step) * step)


prefix_bucket = partial(length_bucket, smallest=16, steps=8)
"""Bucket of a prefix that several prompts share."""

short_bucket = partial(length_bucket, smallest=16)
"""Bucket of the tokens that follow a prefix."""


def tile_bucket(count: int) -> int:
    """Returns the next of 1, 2, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: a canvas of 1.6 has up to 5 tiles."""
    return bucket(count) if count <= 4 else length_bucket(count, smallest=1, steps=4)


def batch_key(num_tiles: int, num_tokens: int) -> tuple[int, int]:
    """Returns the padded number of tiles and tokens. Prompts with the same key share a batch with little padding."""
    return tile_bucket(num_tiles), length_bucket(num_tokens)


def pad_tokens(prompts: Sequence[Sequence[int]], rows: int,
               bucket: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as int32 [rows, T] with zeros behind them, and their lengths; 1 for rows of padding.

    `bucket` computes T from the longest prompt's length.
    """
    padded, lengths = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return padded, lengths


def pad_tiles(tokens: np.ndarray, tiles: Sequence[np.ndarray], layouts: Sequence[Sequence[Layout]],
              processor: ImageProcessor) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Returns the tiles of each row in equally many slots, and the rows' visual_index and visual_weight.

    `tokens` has the padded rows, `layouts` those of each row's images. The tiles are uint8 [rows, I, H, W, 3]. Returns
    None for all three if there are no tiles, and no weights if the processor has none.
    """
    slots = tile_bucket(max(map(len, tiles)))
    if not slots:
        return None, None, None
    padded = np.zeros((len(tokens), slots, processor.size, processor.size, 3), np.uint8)
    visual = processor.no_visual_tokens(tokens.shape)
    for row, (row_tiles, images) in enumerate(zip(tiles, layouts, strict=True)):
        padded[row, : len(row_tiles)] = row_tiles
        for name, values in processor.visual_tokens(images, 0, slots).items():
            visual[name][row, tokens[row] == IMAGE_TOKEN_ID] = values
    return padded, visual["visual_index"], visual.get("visual_weight")
