"""Shapes from a fixed set: prompts and tiles are padded to them, so that few programs are compiled."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np


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
"""Bucket of what follows a prefix."""


def batch_key(num_images: int, num_tokens: int) -> tuple[int, int]:
    """Returns what prompts have in common that share a batch without much padding: tile slots and length."""
    return bucket(num_images), length_bucket(num_tokens)


def pad_tokens(prompts: Sequence[Sequence[int]], rows: int,
               bucket: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as int32 [rows, T] with zeros behind them, and their lengths; 1 for rows of padding.

    `bucket` computes T from the longest prompt's length.
    """
    padded, lengths = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return padded, lengths


def pad_tiles(tiles: Sequence[np.ndarray], rows: int) -> np.ndarray | None:
    """Returns the tiles of each row in equally many slots, uint8 [rows, I, H, W, 3]; None if there are none."""
    slots = bucket(max(map(len, tiles)))
    if not slots:
        return None
    padded = np.zeros((rows, slots, *next(row.shape[1:] for row in tiles if len(row))), np.uint8)
    for row, own in enumerate(tiles):
        padded[row, : len(own)] = own
    return padded
