"""Images of a page: scaled down, encoded as data URLs, and never from outside the image folder."""

import base64
import io
import os
from typing import NamedTuple

from PIL import Image

from llava_jax.image_files import open_image

MAX_PNG_PIXELS = 224 * 224
"""Number of pixels up to which a thumbnail is a PNG with exact pixels. A larger one is a JPEG."""


class Thumbnail(NamedTuple):
    """An image as a data URL, or the problem with it."""

    url: str = ""
    width: int = 0
    height: int = 0
    scale: int = 1  # factor by which a page enlarges it, pixel by pixel
    problem: str = ""


def make_thumbnail(image: Image.Image, max_side: int, min_side: int = 0) -> Thumbnail:
    """Scales an image down to `max_side` pixels. A page shows one smaller than half of `min_side` enlarged."""
    image = image.copy()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    kind = "png" if image.width * image.height <= MAX_PNG_PIXELS else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "png" else {"quality": 85}))
    url = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Thumbnail(url, image.width, image.height, max(1, min_side // max(image.size)))


def load_thumbnail(image: str | bytes, root: str, max_side: int, min_side: int = 0) -> Thumbnail:
    """Makes a thumbnail of an image file inside the folder `root`, or of an encoded image.

    Pages are passed on, so a path that leads out of `root` is a problem, even through a link.
    """
    if isinstance(image, str) and not _is_inside(image, root):
        return Thumbnail(problem=f"{image} is outside of {os.path.realpath(root)}")
    try:
        return make_thumbnail(open_image(image), max_side, min_side)
    except (OSError, ValueError) as error:
        return Thumbnail(problem=" ".join(str(error).split()))


def _is_inside(path: str, root: str) -> bool:
    root = os.path.realpath(root)
    try:
        return os.path.commonpath([os.path.realpath(path), root]) == root
    except ValueError:  # a NUL in the path
        return False
