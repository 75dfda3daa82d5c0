"""Images from bytes to model input, on the host: open, make square, resize, normalise.

PIL resizes uint8 images with its own rounding, which no device reproduces, and the pre-trained vision towers
saw exactly these pixels. So everything up to the uint8 tile happens here; the tile is what crosses to the device.
"""

import io
import os
import stat

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from llava_jax.errors import UserError

# OpenAI's CLIP statistics of RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MODES = ("square", "pad")
PAD_COLOUR = (122, 116, 104)  # CLIP_MEAN * 255, truncated: padding is nearly 0 once normalised
MAX_PIXELS = 2**28  # of any image made on the way: 1 GB in PIL; at size 336 an image of 1 x 2377 still fits


class MissingImage(UserError):
    """Raised where an image file does not exist."""


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Reads an image file, or the bytes of one, as RGB; what is transparent becomes white.

    Raises MissingImage if the file is missing and UserError if it is empty, not an image, truncated or a
    decompression bomb: one line that names the file.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UserError("it is no regular file")  # a pipe would be waited for, a device never end
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _rgb(image)
    except FileNotFoundError:
        raise MissingImage(f"{name}: no such image file") from None
    except UnidentifiedImageError:  # its own text is about Python objects
        raise UserError(f"{name}: not an image, or of an unknown format") from None
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise UserError(f"{name}: the image cannot be read ({error})") from None


def prepare(image: Image.Image, size: int = 336, mode: str = "pad") -> UInt8[np.ndarray, "tiles size size 3"]:
    """Turns an image of any PIL mode into the square tiles that the vision tower sees.

    "square" resizes the shorter edge to `size` and crops the centre (CLIP; LLaVA 1.0 and stage 1 of 1.5);
    "pad" first pads the image to a square with CLIP's mean colour (LLaVA 1.5). Both give one tile, equal bit for
    bit to what transformers' CLIPImageProcessorPil and LlavaImageProcessorPil(do_pad=True) normalise. Rotation
    noted in EXIF is not applied, as in LLaVA. Raises UserError for an unknown mode, an image without pixels, and
    one so elongated that resizing it would need gigabytes.
    """
    if mode not in MODES:
        raise UserError(f"image mode {mode!r} is unknown; choose one of: {', '.join(MODES)}")
    if 0 in image.size:
        raise UserError(f"an image of {image.width} x {image.height} pixels has nothing to prepare")
    image = _rgb(image)
    if mode == "pad":
        image = _pad_to_square(image)
    return np.array(_resize_and_crop(image, size))[None]


def normalise(tiles: UInt8[np.ndarray, "*shape 3"]) -> Float32[np.ndarray, "*shape 3"]:
    """Scales to [0, 1] in float64, rounds to float32, then applies CLIP's mean and std, as transformers does."""
    scaled = (tiles * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)


def _rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    _check_pixels(image, side * side)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    short, long = min(image.size), max(image.size)
    resized = int(size * long / short)  # truncated, as CLIP's processor does
    _check_pixels(image, size * resized)
    width, height = (size, resized) if image.width <= image.height else (resized, size)
    left, top = (width - size) // 2, (height - size) // 2
    # One call for both directions: PIL picks by the sizes which one it resizes and rounds first, so cropping in
    # between, to save work, would change pixels.
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _check_pixels(image: Image.Image, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise UserError(f"an image of {image.width} x {image.height} pixels is too large or elongated to resize")
