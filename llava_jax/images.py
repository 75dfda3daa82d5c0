"""Images from RGB to model input, on the host: make square, resize, normalise.

PIL resizes uint8 images with its own rounding, which no device reproduces, and the pre-trained vision towers
saw exactly these pixels. So everything up to the uint8 tile happens here; the tile is what crosses to the device.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, row_strips, to_rgb

# OpenAI's CLIP statistics of RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MODES = ("square", "pad")
PAD_COLOUR = (122, 116, 104)  # CLIP_MEAN * 255, truncated: padding is nearly 0 once normalised


def prepare(image: Image.Image, size: int = 336, mode: str = "pad") -> UInt8[np.ndarray, "tiles size size 3"]:
    """Turns an image of any PIL mode into the square tiles that the vision tower sees.

    "square" resizes the shorter edge to `size` and crops the centre (CLIP; LLaVA 1.0 and stage 1 of 1.5);
    "pad" first pads the image to a square with CLIP's mean colour (LLaVA 1.5). Both give one tile, equal bit for
    bit to what transformers' CLIPImageProcessorPil and LlavaImageProcessorPil(do_pad=True) normalise of the image's
    `convert("RGB")`. (By themselves, these put transparent pixels on white; the original does not.) Modes become RGB
    as `open_image` says. Raises UserError for an unknown mode, an image without pixels, and one so elongated that
    resizing it would need gigabytes.
    """
    if mode not in MODES:
        raise UserError(f"image mode {mode!r} is unknown; choose one of: {', '.join(MODES)}")
    if 0 in image.size:
        raise UserError(f"an image of {image.width} x {image.height} pixels has nothing to prepare")
    image = to_rgb(image)
    return np.array(_pad_and_resize(image, size) if mode == "pad" else _resize_and_crop(image, size))[None]


def normalise(tiles: UInt8[np.ndarray, "*shape 3"]) -> Float32[np.ndarray, "*shape 3"]:
    """Scales to [0, 1] in float64, rounds to float32, then applies CLIP's mean and std, as transformers does."""
    scaled = (tiles * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)


def _pad_and_resize(image: Image.Image, size: int) -> Image.Image:
    """Pads to a square and resizes that, in strips: the square of a long image would need gigabytes.

    PIL resizes rows first and then columns, and rounds in between. The rows do not depend on each other.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), PAD_COLOUR)
    for rows in row_strips(side, image.height):
        part = image.crop((0, rows.start, image.width, rows.stop))
        strip = Image.new("RGB", (side, part.height), PAD_COLOUR)
        strip.paste(part, (left, 0))
        narrow.paste(strip.resize((size, part.height), Image.Resampling.BICUBIC), (0, top + rows.start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    short, long = min(image.size), max(image.size)
    resized = int(size * long / short)  # truncated, as CLIP's processor does
    if size * resized > MAX_PIXELS:
        raise UserError(f"an image of {image.width} x {image.height} pixels is too elongated to resize")
    width, height = (size, resized) if image.width <= image.height else (resized, size)
    left, top = (width - size) // 2, (height - size) // 2
    # One call for both directions: PIL picks by the sizes which one it resizes and rounds first, so cropping in
    # between, to save work, would change pixels.
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
