"""Baselines of a model that does not see: another question's image, or the image's patches in random order."""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import Question
from llava_jax.image_files import open_image
from llava_jax.models.llava import LlavaConfig

Baseline = Literal["none", "blind", "shuffled"]
Images = tuple[str | bytes | Image.Image, ...]


def images_of(baseline: Baseline, questions: Sequence[Question], config: LlavaConfig) -> Callable[[Question], Images]:
    """Returns the function that gives the images which a model with this `config` sees with each of `questions`.

    - "none": the question's own images.
    - "blind": those of another question, the next one in the order of their paths. Right answers come from the text.
    - "shuffled": the question's own, with the vision tower's patches in random order. Right answers need only a bag of
      patches. The order depends on the pixels alone, so it is the same for all questions about an image.

    Raises UserError for "blind" if all questions have the same images.
    """
    if baseline == "blind":
        sets = sorted({question.images for question in questions if question.images}, key=str)
        if len(sets) == 1:
            raise UserError("all questions are about the same picture; to be asked blind they need another one")
        others = dict(zip(sets, sets[1:] + sets[:1], strict=True))
        return lambda question: others.get(question.images, ())
    if baseline == "shuffled":
        return lambda question: tuple(_shuffle_image(image, config) for image in question.images)
    return lambda question: question.images


def shuffle(tile: UInt8[np.ndarray, "side side 3"], patch: int) -> UInt8[np.ndarray, "side side 3"]:
    """Returns a tile with its squares of `patch` pixels in random order. Incomplete squares at the edges stay."""
    count = len(tile) // patch
    side = count * patch
    patches = tile[:side, :side].reshape(count, patch, count, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
    order = random.Random(zlib.crc32(tile.tobytes())).sample(range(len(patches)), len(patches))
    mixed = tile.copy()
    mixed[:side, :side] = patches[order].reshape(count, count, patch, patch, 3).swapaxes(1, 2).reshape(side, side, 3)
    return mixed


def _shuffle_image(image: str | bytes, config: LlavaConfig) -> Image.Image:
    """Returns the image as the tower sees it, shuffled. It has the tower's size, so processing does not change it.

    Of anyres it is the tile of the complete image.
    """
    tile, *_ = config.processor(open_image(image, config.exif))
    return Image.fromarray(shuffle(tile, config.vision.patch_size))
