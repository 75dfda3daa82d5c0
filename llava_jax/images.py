"""Turns images into model input on the host: square tiles, normalised pixels, and the order of the visual tokens.

PIL resizes uint8 images with its own rounding, which no device reproduces, and the pre-trained vision towers
saw exactly these pixels. So everything up to the uint8 tile happens here; the tile is what crosses to the device.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
MERGES = ("flat", "spatial", "spatial_unpad")

ImageMode = Literal["crop", "pad", "resize"]
"""Modes with one tile for an image."""

SHRINK_FROM = 1.1
"""Ratio of a canvas's side to the cap's from which `anyres_max_N` shrinks it (LLaVA-OneVision)."""

MAX_RANGE = 32
"""Largest number of tiles in a range of pinpoints without dots."""

MAX_PINPOINTS = 1024
"""Maximum number of pinpoints that a text may name."""

Media = Image.Image | tuple[int, int] | list[Image.Image] | int
"""An image, or its size (width, height); the frames of a video, or their number."""


class Layout(NamedTuple):
    """The visual tokens of one image or video, in order.

    `index[k]` is the feature of the k-th visual token. Features are numbered over all tiles of the image. The index
    after the last one is the newline. With `weight`, each token is the weighted sum of four features.
    """

    tiles: int
    index: Int32[np.ndarray, "tokens"] | Int32[np.ndarray, "tokens 4"]
    weight: Float32[np.ndarray, "tokens 4"] | None = None


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images and frames into the square tiles of a vision tower, and lays out their visual tokens.

    Raises UserError for an unknown mode, for pinpoints that are no multiple of `size`, and for sizes below 1.

    Modes:
      crop: resize the shorter edge to `size` and crop the centre (CLIP; LLaVA 1.0 and stage 1 of 1.5).
      pad: pad to a square with the mean colour, then resize (LLaVA 1.5).
      resize: resize to the square, whatever the ratio (SigLIP).
      anyres: the image resized to one tile, then the tiles of a canvas that keeps the ratio (LLaVA 1.6). The canvas is
        the best of `pinpoints`. Visual tokens are those of the first tile, then those of the canvas as `merge` says.

    The frames of a video become one tile each: with CLIP's statistics cropped, as the original does, otherwise resized.
    """

    size: int = 336
    """Side of a tile in pixels."""
    mode: Literal["crop", "pad", "resize", "anyres"] = "pad"
    """Mode, which determines how an image becomes tiles."""
    patches: int = 24
    """Number of visual tokens along one side of a tile: a patch each, or 2 x 2 with a projector that merges them."""
    class_token: bool = False
    """Whether the class token's feature precedes those of a tile's patches."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Mean of each colour in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    """Standard deviation of each colour in [0, 1]."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Sizes (width, height) of the canvas that `anyres` chooses from; the first one wins a tie."""
    max_tiles: int = 0
    """Number of tiles N of `anyres_max_N`: a canvas of more patches than N tiles is shrunk bilinearly; 0: never."""
    rule: Literal["original", "transformers"] = "original"
    """Rounding of a canvas's rows and columns without padding: truncated (LLaVA), or as transformers does."""
    merge: Literal["flat", "spatial", "spatial_unpad"] | None = None
    """Order of an image's visual tokens: tile by tile, the canvas row by row, or that without padding and with a
    newline after each row. Default: spatial_unpad for anyres, otherwise flat."""
    several: Literal["same", "pad"] = "same"
    """Treatment of several images of one conversation: each in `mode`, or each padded to one tile (OneVision)."""
    video_pool: Literal["bilinear", "average"] | None = None
    """Halving of a frame's rows and columns of patches. Default: bilinear with `max_tiles`, otherwise none."""
    video_newline: Literal["one_token", "grid", "frame", "no_token"] = "one_token"
    """Positions of newlines in a video: at its end, after each row, after each frame, or nowhere. Ignored without
    `has_newline`."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"image mode {self.mode!r} is unknown; choose one of: {', '.join(MODES)}")
        if self.merge not in (None, *MERGES):
            raise UserError(f"merge type {self.merge!r} is not supported; {', '.join(MERGES)} are")
        if min(self.size, self.patches) < 1:
            raise UserError(f"image size {self.size} and {self.patches} patches must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise UserError(f"image mean {self.mean} and std {self.std} must be three numbers, with std above 0")
        if self.mode == "anyres" and not self.pinpoints:
            raise UserError(f"image mode {self.mode_name} needs pinpoints, such as (336x672),(672x336), or a range "
                            "such as (1x1),...,(6x6)")
        if self.mode != "anyres" and self.pinpoints:
            raise UserError(f"image mode {self.mode} has pinpoints, and anyres alone reads them")
        if self.max_tiles < 0 or self.max_tiles and self.mode != "anyres":
            raise UserError(f"max_tiles is {self.max_tiles}: it must be 0, or above 0 with image mode anyres")
        if self.mode == "anyres" and self.class_token:
            raise UserError("image mode anyres has no position for a class token; take feature_select patch")
        if self.video_pool and self.class_token:
            raise UserError("video_pool has no position for a class token; take feature_select patch")
        for name, choices in (("rule", ("original", "transformers")), ("several", ("same", "pad")),
                              ("video_pool", (None, "bilinear", "average")),
                              ("video_newline", ("one_token", "grid", "frame", "no_token"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; supported: {', '.join(map(str, choices))}")
        for width, height in self.pinpoints:
            if width < self.size or height < self.size or width % self.size or height % self.size:
                raise UserError(f"pinpoint {width} x {height} is no multiple of the tile's {self.size} pixels; "
                                "give multiples, or a range such as (1x1),...,(6x6)")
            if width * height > MAX_PIXELS:
                raise UserError(f"pinpoint {width} x {height} has more than {MAX_PIXELS:,} pixels")

    @property
    def features_per_tile(self) -> int:
        """Number of features that the model reads of one tile."""
        return self.patches**2 + self.class_token

    @property
    def is_fixed(self) -> bool:
        """Whether the layout is the same for every image: one tile."""
        return self.mode != "anyres"

    @property
    def merge_type(self) -> str:
        """`merge`, or its default for the mode."""
        return self.merge or ("flat" if self.is_fixed else "spatial_unpad")

    @property
    def has_newline(self) -> bool:
        """Whether visual tokens can be newlines, so that the model has the parameter `image_newline`."""
        return self.merge_type == "spatial_unpad"

    @property
    def pool(self) -> str | None:
        """`video_pool`, or its default."""
        return self.video_pool or ("bilinear" if self.max_tiles else None)

    @property
    def is_weighted(self) -> bool:
        """Whether layouts can have weights, so that batches have `visual_weight`."""
        return self.pool is not None

    @property
    def mode_name(self) -> str:
        """Name of the mode that `with_mode` takes, with its number of tiles."""
        return f"anyres_max_{self.max_tiles}" if self.max_tiles else self.mode

    def with_mode(self, mode: str, pinpoints: str = "") -> "ImageProcessor":
        """Returns the processor with another mode: one of MODES, or anyres_max_N.

        anyres reads `pinpoints` (`parse_pinpoints`), by default the present ones. anyres_max_N also pads several images
        of a conversation to one tile each, as LLaVA-OneVision does. Raises UserError for unknown texts.
        """
        name, max_tiles = parse_mode(mode)
        points = parse_pinpoints(pinpoints, self.size) if pinpoints else self.pinpoints
        merge = self.merge if (name == "anyres") != self.is_fixed else None
        return replace(self, mode=name, max_tiles=max_tiles, pinpoints=points if name == "anyres" else (), merge=merge,
                       several="pad" if max_tiles else "same" if name == "anyres" else self.several)

    def for_images(self, count: int) -> "ImageProcessor":
        """Returns the processor of one of `count` images of a conversation, as `several` says."""
        return self._padded if count > 1 and self.several == "pad" else self

    @functools.cached_property
    def _padded(self) -> "ImageProcessor":
        return replace(self, mode="pad", pinpoints=(), max_tiles=0, merge=self.merge_type, video_pool=self.pool)

    @functools.cached_property
    def frames(self) -> "ImageProcessor":
        """The processor of a video's frames."""
        crops = self.rule == "original" and self.mean == CLIP_MEAN
        return replace(self._padded, mode="crop" if crops else "resize")

    def layouts(self, media: Sequence[Media]) -> list[Layout]:
        """Returns the layouts of all images and videos of one conversation.

        Raises UserError for a video without frames, and for an image that no pinpoint fits.
        """
        one = self.for_images(sum(not isinstance(item, int | list) for item in media))
        layouts = []
        for item in media:
            if isinstance(item, int | list):
                layouts.append(_video_layout(self.frames, item if isinstance(item, int) else len(item)))
            else:
                layouts.append(one.layout(*(item.size if isinstance(item, Image.Image) else item)))
        return layouts

    def tiles(self, media: Sequence[Image.Image | list[Image.Image]]) -> UInt8[np.ndarray, "tiles size size 3"]:
        """Returns the tiles of all images and videos (lists of frames) of one conversation."""
        one = self.for_images(sum(not isinstance(item, list) for item in media))
        tiles = [np.zeros((0, self.size, self.size, 3), np.uint8)]
        for item in media:
            tiles += [self.frames(frame) for frame in item] if isinstance(item, list) else [one(item)]
        return np.concatenate(tiles)

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
        return _one_tile_layout(self) if self.is_fixed else _anyres_layout(self, width, height)

    def no_visual_tokens(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Returns `visual_index` (and, if `is_weighted`, `visual_weight`) of tokens [*shape] that are all text."""
        if not self.is_weighted:
            return {"visual_index": np.full(shape, -1, np.int32)}
        return {"visual_index": np.full((*shape, 4), -1, np.int32), "visual_weight": np.zeros((*shape, 4), np.float32)}

    def visual_tokens(self, layouts: Sequence[Layout], first_tile: int, num_tiles: int) -> dict[str, np.ndarray]:
        """Returns the visual tokens of several images as indices into the features of a sequence's `num_tiles` tiles.

        The images' tiles start at `first_tile`. The newline is one more row: num_tiles * features_per_tile.
        `visual_index` is int32 [tokens]. If `is_weighted`, it is [tokens, 4], with `visual_weight` float32 [tokens, 4].
        """
        shape = (4,) if self.is_weighted else ()
        parts, weights = [np.zeros((0, *shape), np.int32)], [np.zeros((0, 4), np.float32)]
        for tiles, index, weight in layouts:
            newline, first = tiles * self.features_per_tile, first_tile * self.features_per_tile
            moved = np.where(index == newline, num_tiles * self.features_per_tile, index + first).astype(np.int32)
            first_tile += tiles
            if self.is_weighted and weight is None:
                moved, weight = np.repeat(moved[:, None], 4, axis=1), np.broadcast_to(ONE_FEATURE, (len(moved), 4))
            parts.append(moved)
            weights.append(weight)
        found = {"visual_index": np.concatenate(parts)}
        return found | {"visual_weight": np.concatenate(weights)} if self.is_weighted else found

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
            raise UserError(f"an image of {width} x {height} pixels is too elongated for every pinpoint: scaled to fit "
                            "one, it has no pixels; crop it, leave it out, or add a pinpoint of its shape")
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


ONE_FEATURE = np.array([1, 0, 0, 0], np.float32)
"""Weights of a token that is one feature."""


def parse_mode(mode: str, name: str = "image mode") -> tuple[str, int]:
    """Returns mode and max_tiles of a text, for example ("anyres", 9) of anyres_max_9; `name` is that of the field."""
    capped = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", mode)
    if not capped and mode not in MODES:
        raise UserError(f"{name} {mode!r} is unknown; choose one of: {', '.join(MODES)}, anyres_max_N (N tiles)")
    return ("anyres", int(capped[1])) if capped else (mode, 0)


def parse_pinpoints(text: str, size: int) -> tuple[tuple[int, int], ...]:
    """Returns the pinpoints (width, height) that a text lists, in order.

    Sizes in pixels, "(336x672),(672x336)" or "[(336, 672), [672, 336]]". Or a range "(1x1),...,(6x6)" in tiles of
    `size` pixels: all widths from the first to the last, and for each width all heights (LLaVA-NeXT). Raises UserError.
    """
    pair = r"[(\[]\s*(\d{1,5})\s*[x,]\s*(\d{1,5})\s*[)\]]"
    points = [(int(width), int(height)) for width, height in re.findall(pair, text)]
    # The original has ranges without dots. Numbers above MAX_RANGE are pixels, of another tower if they are small.
    are_tiles = "x" in text and any(min(point) < size for point in points) and max(map(max, points)) <= MAX_RANGE
    if "..." in text or are_tiles:
        (left, low), (right, high) = points[:1] + points[-1:] if len(points) > 1 else [(0, 0)] * 2
        count = max(0, right - left + 1) * max(0, high - low + 1)
        points = [(size * width, size * height) for width in range(left, right + 1) for height in range(low, high + 1)
                  ] if count <= MAX_PINPOINTS else []
    rest = re.sub(r"[\s,.\[\]()]", "", re.sub(pair, "", text))
    is_cut = any(text.count(opening) != text.count(closing) for opening, closing in ("()", "[]"))
    if rest or is_cut or not 1 <= len(points) <= MAX_PINPOINTS or not min(map(min, points)):
        raise UserError(f"model.pinpoints {text!r:.200}: give sizes in pixels such as (336x672),(672x336), or a range "
                        "of tiles such as (1x1),...,(6x6)")
    return tuple(points)


@functools.lru_cache(64)
def _one_tile_layout(processor: ImageProcessor) -> Layout:
    # The index after the last feature is the newline.
    return Layout(1, np.arange(processor.features_per_tile + processor.has_newline, dtype=np.int32))


@functools.lru_cache(64)
def _anyres_layout(processor: ImageProcessor, width: int, height: int) -> Layout:
    size, side = processor.size, processor.patches
    canvas = processor.canvas(width, height)
    columns, rows = canvas[0] // size, canvas[1] // size
    tiles = 1 + rows * columns
    features = np.arange(tiles * side**2, dtype=np.int32)
    if processor.merge_type == "flat":
        return Layout(tiles, features)
    # The canvas as one image of patches.
    base, index, weight = features[: side**2], features[side**2 :].reshape(rows, columns, side, side), None
    index = index.swapaxes(1, 2).reshape(rows * side, columns * side)
    if not processor.has_newline:
        return Layout(tiles, np.concatenate([base, index.ravel()]))
    index = _unpad(index, width, height, processor.rule)
    if processor.max_tiles:
        ratio = math.sqrt(index.size / (processor.max_tiles * side**2))
        if ratio > SHRINK_FROM:
            index, weight = _bilinear(index, *(max(1, int(count // ratio)) for count in index.shape))
    index, weight = _end_rows(index, weight, tiles * side**2)
    if weight is None:
        return Layout(tiles, np.concatenate([base, index]))
    weight = np.concatenate([np.broadcast_to(ONE_FEATURE, (len(base), 4)), weight])
    return Layout(tiles, np.concatenate([np.repeat(base[:, None], 4, axis=1), index]), weight)


@functools.lru_cache(64)
def _video_layout(processor: ImageProcessor, frames: int) -> Layout:
    if frames < 1:
        raise UserError("a video without frames has nothing to prepare")
    side, weight = processor.patches, None
    index = np.arange(processor.features_per_tile, dtype=np.int32).reshape(-1, side if processor.pool else 1)
    if processor.pool == "average":
        half = side // 2
        index = index[: 2 * half, : 2 * half].reshape(half, 2, half, 2).swapaxes(1, 2).reshape(half, half, 4)
        weight = np.full(index.shape, 0.25, np.float32)
    elif processor.pool:
        index, weight = _bilinear(index, math.ceil(side / 2), math.ceil(side / 2))
    elif not processor.class_token:
        index = index.reshape(side, side)
    starts = processor.features_per_tile * np.arange(frames, dtype=np.int32)
    rows = {"grid": frames * len(index), "frame": frames}.get(processor.video_newline, 1)
    index = np.stack([index + start for start in starts])
    index = index.reshape(rows, -1, *index.shape[3:])
    if weight is not None:
        weight = np.stack([weight] * frames).reshape(index.shape)
    has_newline = processor.has_newline and processor.video_newline != "no_token"
    newline = frames * processor.features_per_tile if has_newline else None
    return Layout(frames, *_end_rows(index, weight, newline))


def _unpad(index: Int32[np.ndarray, "rows columns"], width: int, height: int, rule: str
           ) -> Int32[np.ndarray, "kept_rows kept_columns"]:
    """Cuts the padding off a canvas of patches.

    The original truncates here and rounds up when it resizes, so a row of padding may stay.
    """
    rows, columns = index.shape
    kept = (lambda length: int(round(length, 7))) if rule == "transformers" else int
    if width / height > columns / rows:
        cut = (rows - kept(height * (columns / width))) // 2
        return index[cut : rows - cut]
    cut = (columns - kept(width * (rows / height))) // 2
    return index[:, cut : columns - cut]


def _bilinear(index: Int32[np.ndarray, "rows columns"], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns [height, width, 4] indices and weights of a bilinear resize (align_corners False, no antialias)."""
    (top, bottom, y), (left, right, x) = map(_neighbours, index.shape, (height, width))
    corners = [index[np.ix_(rows, columns)] for rows in (top, bottom) for columns in (left, right)]
    weights = [np.outer(a, b) for a in (1 - y, y) for b in (1 - x, x)]
    return np.stack(corners, -1), np.stack(weights, -1).astype(np.float32)


def _neighbours(size: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = np.maximum((np.arange(count) + 0.5) * (size / count) - 0.5, 0)
    first = position.astype(int)
    return first, np.minimum(first + 1, size - 1), position - first


def _end_rows(index: np.ndarray, weight: np.ndarray | None, newline: int | None
              ) -> tuple[np.ndarray, np.ndarray | None]:
    """Puts the newline, if there is one, after each row of [rows, columns] or [rows, columns, 4]; joins the rows."""
    corners = index.shape[2:]
    if newline is not None:
        end = (len(index), 1, *corners)
        index = np.concatenate([index, np.full(end, newline, np.int32)], axis=1)
        weight = None if weight is None else np.concatenate([weight, np.broadcast_to(ONE_FEATURE, end)], axis=1)
    return index.reshape(-1, *corners), None if weight is None else weight.reshape(-1, *corners)


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
