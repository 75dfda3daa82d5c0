"""Opens image files as RGB: checks formats and limits, names what is damaged, and converts every PIL mode."""

import contextlib
import io
import os
import stat
import struct
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_jax.errors import UserError, user_path

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are decoded. PIL has more, and some of them run other programs (EPS)."""

MAX_PIXELS = 2**26
"""Default limit of an image's pixels (8192 x 8192). PIL needs 4 bytes for each, and WebP 12."""

LARGEST_LIMIT = 2 * Image.MAX_IMAGE_PIXELS
"""Largest number of pixels that PIL itself accepts."""

MAX_SCANS = 100
"""Largest number of scans in a JPEG. Cameras and converters write 1 to 10, and each costs as much as the image."""

STRIP_PIXELS = 2**22
"""Number of pixels that are processed at a time."""

ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""

# Errors of decoders on damaged content, besides OSErrors without a code.
_DECODER_ERRORS = (SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
                   EOFError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of half of LARGEST_LIMIT

# Other files under the name of an image, by their first bytes.
_NO_IMAGES = ((b"version https://git-lfs", "a Git LFS pointer in the place of the file; fetch it: git lfs pull"),
              (b"%!PS", "PostScript; convert it to PNG"), (b"\xc5\xd0\xd3\xc6", "EPS; convert it to PNG"),
              (b"%PDF", "a PDF; convert its pages to PNG"), (b"<!doctype html", "a web page, so its download failed"),
              (b"<html", "a web page, so its download failed"), (b"<svg", "SVG; convert it to PNG"),
              (b"<?xml", "XML, such as SVG; convert it to PNG"),
              (b"\0\0\0\x0cjxl ", "JPEG XL; convert it to PNG"), (b"\0\0\0\x0cjp  ", "JPEG 2000; convert it to PNG"))
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


class MissingImage(UserError):
    """Raised if an image file does not exist."""


class TooLarge(ValueError):
    """Raised if an image's header names more pixels than the limit."""


def open_image(
    source: str | os.PathLike | bytes,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    seconds: float | None = None,
) -> Image.Image:
    """Reads an image file, or its bytes, as RGB. As in LLaVA, transparent pixels keep their colour.

    Greys of 16 bits are scaled from 0..65535, because PIL would clip all values above 255 to white. Integers of 32 bits
    and floats are scaled from 0..255 (floats up to 1: 0..1; integers up to 65535: 0..65535), and any other range from
    its smallest to its largest value.

    Args:
      exif: rotate the image as its EXIF orientation says. LLaVA does not.
      max_pixels: largest width times height, checked in the header before anything is decoded.
      seconds: largest time to decode a JPEG or PNG.

    Raises MissingImage if the file is missing and UserError if it is empty, not an image, truncated or too large: one
    line that names the file. Errors of the machine (EIO, ESTALE, no memory) are raised unchanged.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    content = source if isinstance(source, bytes) else read_image(source, max_pixels)
    with decoding(name, content), open_header(content, max_pixels, seconds) as image:
        image.load()
        return to_rgb(turn_upright(image) if exif else image)


def image_size(source: str | os.PathLike | bytes, exif: bool = False, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Reads width and height of an image from its header, as `open_image` returns it. Raises what that raises."""
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source, max_pixels) as file:
        start = file.read(64)
        file.seek(0)
        with decoding(name, start):
            _check_pixels(_webp_size(start), max_pixels)
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(image.size, max_pixels)
                swap = exif and orientation(image) > 4  # rotated by 90 degrees
                return (image.height, image.width) if swap else image.size


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> bytes:
    """Reads an image file. Raises MissingImage, and UserError if it is no regular file, empty or very large."""
    with _open_file(path, max_pixels) as file, user_path(path):
        return file.read()


def _open_file(path: str | os.PathLike, max_pixels: int) -> BinaryIO:
    with user_path(path):
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
                raise UserError(f"{path}: the image cannot be read (it is no regular file)")
            if status.st_size > 16 * max_pixels:  # uncompressed, 4 channels of 32 bits
                raise UserError(f"{path}: the image cannot be read (a file of {status.st_size:,} bytes)")
            if not status.st_size:
                raise UserError(f"{path}: the file is empty (0 bytes)")
            return open(path, "rb")
        except (FileNotFoundError, NotADirectoryError):
            raise MissingImage(f"{path}: no such image file") from None


def open_header(content: bytes, max_pixels: int = MAX_PIXELS, seconds: float | None = None,
                formats: Sequence[str] = FORMATS) -> Image.Image:
    """Opens an image without decoding it.

    Raises TooLarge, another ValueError if decoding would cost too much, and PIL's errors.
    """
    _check_pixels(_webp_size(content), max_pixels)  # PIL allocates both canvases before it reports their size
    image = Image.open(_Timed(content, seconds), formats=formats)
    _check_pixels(image.size, max_pixels)
    tags = getattr(image, "tag_v2", {})  # of TIFF, whose tiles can be larger than the image
    _check_pixels((tags.get(322, 1), tags.get(323, 1)), max_pixels)
    if image.format in ("JPEG", "MPO") and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {MAX_SCANS}")
    image.decodermaxblock = 2**14  # with 64 KB at once, _Timed would be called too seldom
    return image


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotates an image as its EXIF orientation says. Damaged EXIF is ignored."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image file: 1 if it is upright, or if the tag is missing or damaged.

    A TIFF counts as upright, because PIL turns it when it decodes one.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except (OSError, *_DECODER_ERRORS):
        return 1
    return value if value in range(1, 9) else 1


@contextlib.contextmanager
def decoding(name: str, content: bytes) -> Iterator[None]:
    """Turns errors of decoders on bad content into UserError. Errors of the machine pass."""
    try:
        yield
    except UnidentifiedImageError:  # its own message is about Python objects
        raise UserError(f"{name}: {_describe(content)}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        if "out of memory" in str(error):  # PIL's decoders report it so
            raise MemoryError(f"{name}: {error}") from error
        raise UserError(f"{name}: the image cannot be read ({error})") from None
    except _DECODER_ERRORS as error:
        raise UserError(f"{name}: the image cannot be read ({error})") from None


def _describe(content: bytes) -> str:
    """Describes a file that is no image."""
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for prefix, what in _NO_IMAGES:
        if start.startswith(prefix.lower()):
            return f"not an image but {what}"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC:
        return "an HEIC image, as iPhones write it, which cannot be read; convert it to JPEG"
    if content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
        return "not an image but a video, or of another format in its container (ISO)"
    names = ", ".join("WebP" if name == "WEBP" else name for name in FORMATS)
    return f"not an image, or of an unknown format; known are {names}"


class _Timed(io.BytesIO):
    """Bytes that can be read for a limited time."""

    def __init__(self, content: bytes, seconds: float | None):
        super().__init__(content)
        self._seconds, self._end = seconds, None if seconds is None else time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if self._end is not None and time.monotonic() > self._end:
            raise ValueError(f"decoding takes more than {self._seconds:g} s")
        return super().read(size)


def _webp_size(content: bytes) -> tuple[int, int]:
    """Returns width and height in the header of a WebP; (0, 0) for any other content."""
    kind = content[12:16] if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else b""
    number = int.from_bytes
    match kind:
        case b"VP8 ":
            return number(content[26:28], "little") & 0x3FFF, number(content[28:30], "little") & 0x3FFF
        case b"VP8L":
            bits = number(content[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return number(content[24:27], "little") + 1, number(content[27:30], "little") + 1
    return 0, 0


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any PIL mode to RGB, as `open_image` says."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_grey(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "transparency" in image.info:  # it changes no pixel, but PIL warns of it
        image = image.copy()
        del image.info["transparency"]
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    """Converts a grey image of 16 or 32 bits to RGB, scaled to its visible range."""
    values = np.asarray(image)
    grey = np.empty(values.shape, np.uint8)
    if image.mode.startswith("I;16"):
        for rows in row_strips(*image.size):
            grey[rows] = (values[rows].astype(np.uint32) + 128) // 257
        return Image.fromarray(grey).convert("RGB")

    low, high = _finite_range(values, image.size)
    tops = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is not None:
        low, high = 0.0, top
    for rows in row_strips(*image.size):
        part = np.nan_to_num(values[rows].astype(np.float64), nan=low, posinf=high, neginf=low)
        # PIL truncates values that are in 0..255 already, and the original trained on that.
        grey[rows] = np.trunc(part) if top == 255 else np.rint(255 * (part - low) / max(high - low, 1e-30))
    return Image.fromarray(grey).convert("RGB")


def _finite_range(values: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """Returns the smallest and the largest finite value; (0, 0) if there is none."""
    low, high = np.inf, -np.inf
    for rows in row_strips(*size):
        finite = values[rows][np.isfinite(values[rows])]
        if finite.size:
            low, high = min(low, finite.min()), max(high, finite.max())
    return (float(low), float(high)) if low <= high else (0.0, 0.0)


def row_strips(width: int, height: int) -> Iterator[slice]:
    """Yields the rows of an image in strips of at most STRIP_PIXELS, so that intermediate arrays stay small."""
    count = max(1, STRIP_PIXELS // width)
    return (slice(start, min(start + count, height)) for start in range(0, height, count))


def _check_pixels(size: tuple[int, int], limit: int) -> None:
    if size[0] * size[1] > limit:
        raise TooLarge(f"{size[0]:,} x {size[1]:,} pixels, more than the limit of {limit:,} (max_pixels)")
