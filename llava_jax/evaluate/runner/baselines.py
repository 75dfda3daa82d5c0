"""What a model scores without seeing: the same questions with another picture, or with the picture's patches mixed."""

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
Shown = tuple[str | bytes | Image.Image, ...]


def shown(baseline: Baseline, questions: Sequence[Question], config: LlavaConfig) -> Callable[[Question], Shown]:
    """What a model with this `config` is shown with each of `questions`: the question's own images ("none"), or

    - "blind": those of another question, the next in the order of their paths (the first ones after the last). What is
      right then comes from the questions alone.
    - "shuffled": its own as the vision tower would see them, with the tower's patches in random places. What is right
      then needs no more than a bag of patches. The places come from the picture's pixels: they are the same whatever is
      asked of a picture, and others for each picture.

    UserError for "blind" if all questions have the same images.
    """
    if baseline == "blind":
        sets = sorted({question.images for question in questions if question.images}, key=str)
        if len(sets) == 1:
            raise UserError("all questions are about the same picture; to be asked blind they need another one")
        others = dict(zip(sets, sets[1:] + sets[:1], strict=True))
        return lambda question: others.get(question.images, ())
    if baseline == "shuffled":
        return lambda question: tuple(_shuffled(image, config) for image in question.images)
    return lambda question: question.images


def shuffle(tile: UInt8[np.ndarray, "side side 3"], patch: int) -> UInt8[np.ndarray, "side side 3"]:
    """A tile whose squares of `patch` pixels have changed places; what is left at its right and lower edge stays."""
    count = len(tile) // patch
    whole = count * patch
    patches = tile[:whole, :whole].reshape(count, patch, count, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
    order = random.Random(zlib.crc32(tile.tobytes())).sample(range(len(patches)), len(patches))
    mixed = tile.copy()
    mixed[:whole, :whole] = (
        patches[order].reshape(count, count, patch, patch, 3).swapaxes(1, 2).reshape(whole, whole, 3)
    )
    return mixed


def _shuffled(image: str | bytes, config: LlavaConfig) -> Image.Image:
    """`prepare` leaves this picture as it is, for it has the tower's size."""
    [tile] = config.processor(open_image(image, config.exif))
    return Image.fromarray(shuffle(tile, config.vision.patch_size))
