"""Turns images into model input on the host: square tiles, normalised pixels, and the order of the visual tokens.

PIL resizes uint8 images with its own rounding, which no device reproduces, and the pre-trained vision towers
saw exactly these pixels. So everything up to the uint8 tile happens here; the tile is what crosses to the device.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, open_image, row_strips, to_rgb

__all__ = ["CLIP_MEAN", "CLIP_STD", "MODES", "ImageMode", "ImageProcessor", "Layout", "open_image"]

# OpenAI's CLIP statistics of RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

MODES = ("crop", "pad", "resize", "anyres")

ImageMode = Literal["crop", "pad", "resize"]
"""Modes that a recipe or a command line can choose. `anyres` needs pinpoints, so only a checkpoint sets it."""


class Layout(NamedTuple):
    """The visual tokens of one image, in order.

    `index[k]` is the feature of the k-th visual token. Features are numbered over all tiles of the image. The index
    after the last one is the newline.
    """

    tiles: int
    index: Int32[np.ndarray, "tokens"]


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into the square tiles of a vision tower, and lays out their visual tokens.

    Raises UserError for an unknown mode, for pinpoints that are no multiple of `size`, and for sizes below 1.

    Modes:
      crop: resize the shorter edge to `size` and crop the centre (CLIP; LLaVA 1.0 and stage 1 of 1.5).
      pad: pad to a square with the mean colour, then resize (LLaVA 1.5).
      resize: resize to the square, whatever the ratio (SigLIP).
      anyres: the image resized to one tile, then the tiles of a canvas that keeps the ratio (LLaVA 1.6). The canvas is
        the best of `pinpoints`. Visual tokens are those of the first tile, then the canvas row by row without its
        padding, with a newline after each row.
    """

    size: int = 336
    """Side of a tile in pixels."""
    mode: Literal["crop", "pad", "resize", "anyres"] = "pad"
    """Mode, which determines how an image becomes tiles."""
    patches: int = 24
    """Number of patches along one side of a tile."""
    class_token: bool = False
    """Whether the class token's feature precedes those of a tile's patches."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Mean of each colour in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    """Standard deviation of each colour in [0, 1]."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Sizes (width, height) of the canvas that `anyres` chooses from; the first one wins a tie."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"image mode {self.mode!r} is unknown; choose one of: {', '.join(MODES)}")
        if min(self.size, self.patches) < 1:
            raise UserError(f"image size {self.size} and {self.patches} patches must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise UserError(f"image mean {self.mean} and std {self.std} must be three numbers, with std above 0")
        if (self.mode == "anyres") != bool(self.pinpoints):
            raise UserError("image mode anyres needs pinpoints, and no other mode reads them")
        if self.mode == "anyres" and self.class_token:
            raise UserError("image mode anyres has no position for a class token; take feature_select patch")
        for width, height in self.pinpoints:
            if width < self.size or height < self.size or width % self.size or height % self.size:
                raise UserError(f"pinpoint {width} x {height} is no multiple of the tile's {self.size} pixels")

    @property
    def features_per_tile(self) -> int:
        """Number of features that the model reads of one tile."""
        return self.patches**2 + self.class_token

    @property
    def is_fixed(self) -> bool:
        """Whether the layout is the same for every image: one tile."""
        return self.mode != "anyres"

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "tiles size size 3"]:
        """Returns the tiles of an image of any PIL mode, which becomes RGB as `open_image` says.

        crop, pad and resize give one tile. It is equal bit for bit to what transformers' CLIPImageProcessorPil,
        LlavaImageProcessorPil(do_pad=True) and SiglipImageProcessorPil normalise of the image's `convert("RGB")`.
        (By themselves, the first two put transparent pixels on white; the original LLaVA does not.)

        Raises UserError for an image without pixels, and for one so elongated that resizing it would need gigabytes.
        """
        if 0 in image.size:
            raise UserError(f"an image of {image.width} x {image.height} pixels has nothing to prepare")
        image = to_rgb(image)
        if self.mode == "anyres":
            return np.stack([np.asarray(tile) for tile in self._anyres_tiles(image)])
        resize = {"crop": _resize_and_crop, "resize": _resize}.get(self.mode) or functools.partial(
            _pad_and_resize, colour=tuple(int(255 * mean) for mean in self.mean))
        return np.array(resize(image, self.size))[None]

    def normalise(self, tiles: UInt8[np.ndarray, "*shape 3"]) -> Float32[np.ndarray, "*shape 3"]:
        """Scales to [0, 1] in float64, rounds to float32, then applies mean and std, as transformers does."""
        scaled = (tiles * (1 / 255)).astype(np.float32)
        return (scaled - np.float32(self.mean)) / np.float32(self.std)

    def layout(self, width: int = 1, height: int = 1) -> Layout:
        """Returns the layout of an image of this size. Only `anyres` reads the size.

        Raises UserError if `anyres` has no canvas for an image so elongated.
        """
        return _anyres_layout(self, width, height) if self.mode == "anyres" else _one_tile_layout(self)

    def visual_index(
        self, layouts: Sequence[Layout], first_tile: int, num_tiles: int
    ) -> Int32[np.ndarray, "tokens"]:
        """Returns the visual tokens of several images as indices into the features of a sequence's `num_tiles` tiles.

        The images' tiles start at `first_tile`. The newline is one more row: num_tiles * features_per_tile.
        """
        parts = [np.zeros(0, np.int32)]
        for tiles, index in layouts:
            newline = index == tiles * self.features_per_tile
            first = first_tile * self.features_per_tile
            parts.append(np.where(newline, num_tiles * self.features_per_tile, index + first).astype(np.int32))
            first_tile += tiles
        return np.concatenate(parts)

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Returns the pinpoint that keeps most of an image's pixels; of several, the one with the least padding."""
        best, chosen = (0, -math.inf), None
        for pinpoint in self.pinpoints:
            scale = min(pinpoint[0] / width, pinpoint[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            rating = kept, kept - pinpoint[0] * pinpoint[1]
            if rating > best:
                best, chosen = rating, pinpoint
        if chosen is None or best[0] == 0:
            raise UserError(f"an image of {width} x {height} pixels is too elongated to resize")
        return chosen

    def _anyres_tiles(self, image: Image.Image) -> list[Image.Image]:
        width, height = self.canvas(*image.size)
        across, down = width / image.width, height / image.height
        if across < down:
            scaled = width, min(math.ceil(image.height * across), height)
        else:
            scaled = min(math.ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))  # black, as LLaVA 1.6 pads
        offset = (width - scaled[0]) // 2, (height - scaled[1]) // 2
        canvas.paste(image.resize(scaled, Image.Resampling.BICUBIC), offset)
        corners = [(x, y) for y in range(0, height, self.size) for x in range(0, width, self.size)]
        return [_resize(image, self.size), *(canvas.crop((x, y, x + self.size, y + self.size)) for x, y in corners)]


@functools.lru_cache(64)
def _one_tile_layout(processor: ImageProcessor) -> Layout:
    return Layout(1, np.arange(processor.features_per_tile, dtype=np.int32))


@functools.lru_cache(4096)
def _anyres_layout(processor: ImageProcessor, width: int, height: int) -> Layout:
    size, side = processor.size, processor.patches
    canvas = processor.canvas(width, height)
    columns, rows = canvas[0] // size, canvas[1] // size
    tiles = 1 + rows * columns
    index = np.arange(side**2, tiles * side**2, dtype=np.int32).reshape(rows, columns, side, side)
    index = index.swapaxes(1, 2).reshape(rows * side, columns * side)  # the canvas as one image of patches
    rows, columns = index.shape
    # The original truncates here and rounds up when it resizes, so a row of padding may stay.
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        index = index[cut : rows - cut]
    else:
        cut = (columns - int(width * (rows / height))) // 2
        index = index[:, cut : columns - cut]
    newline = np.full((len(index), 1), tiles * side**2, np.int32)
    return Layout(tiles, np.concatenate([np.arange(side**2, dtype=np.int32), np.hstack([index, newline]).ravel()]))


def _resize(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _pad_and_resize(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """Pads to a square and resizes that, in strips, because the square of a long image would need gigabytes.

    PIL resizes rows first and then columns, and rounds in between. The rows do not depend on each other.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), colour)
    for rows in row_strips(side, image.height):
        part = image.crop((0, rows.start, image.width, rows.stop))
        strip = Image.new("RGB", (side, part.height), colour)
        strip.paste(part, (left, 0))
        narrow.paste(strip.resize((size, part.height), Image.Resampling.BICUBIC), (0, top + rows.start))
    return _resize(narrow, size)


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
