"""Finds what is wrong with one image or video: it cannot be opened, or training sees less of it than people do."""

import os

from PIL import Image

from llava_jax.data.records import Medium
from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, MissingImage, open_header, open_image, orientation, read_image
from llava_jax.prepare.settings import Settings
from llava_jax.video import MissingPyAV, Video, decode_frames, sampled_frames

IMAGE_SECONDS = 30.0
"""Maximum seconds to decode one image. Training has no limit, because all hosts must skip the same rows."""
FAINT_LEVELS = 16
"""Number of grey levels, of 256, below which a grey image of 16 or 32 bits counts as faint."""

Problem = tuple[str, str]
"""Kind of a finding, and its message."""


def check_medium(medium: Medium, settings: Settings) -> list[Problem]:
    """Opens an image or a video as training does, and decodes what training decodes of it."""
    if not isinstance(medium, Video):
        return _check_image(medium, settings)
    try:
        sampled = sampled_frames(medium, settings.video, settings.max_pixels)
        for _ in decode_frames(medium, sampled.indices, settings.max_pixels):
            pass
    except MissingImage:
        return [("missing_image", "no such video file")]
    except MissingPyAV:
        raise
    except UserError as error:
        return [("broken_image", str(error).removeprefix(f"{medium.path}: ").removeprefix("the video "))]
    return []


def _check_image(image: str | bytes, settings: Settings) -> list[Problem]:
    """Opens an image, and decodes it completely, because that finds a truncated file."""
    content = image if isinstance(image, bytes) else b""
    try:
        content = content or read_image(image, settings.max_pixels)
        opened = open_image(content, settings.exif, settings.max_pixels, IMAGE_SECONDS)
        # An elongated image grows when its shorter side is resized to that of a tile, and may be refused. The layout of
        # anyres refuses it earlier.
        processor, ratio = settings.processor, max(opened.size) / min(opened.size)
        if processor.is_fixed and processor.size**2 * ratio >= MAX_PIXELS:
            processor(opened)
    except MissingImage:
        return [("missing_image", "no such image file")]
    except UserError as error:
        name = image if isinstance(image, str) else f"image of {len(content)} bytes"
        reason = str(error).removeprefix(f"{name}: ").removeprefix(f"image of {len(content)} bytes: ")
        return [("broken_image", reason.removeprefix("the image "))]
    with open_header(content, settings.max_pixels) as header:
        # MPO is a JPEG to which a camera has added a preview.
        format_ = "JPEG" if header.format == "MPO" else header.format
        animated = header.format != "MPO" and _is_animated(header)
        rotation = orientation(header)
    problems = _check_pixels(content, opened, settings.max_pixels)
    if rotation != 1 and not settings.exif:
        problems.append(("rotated", f"EXIF orientation {rotation}: viewers rotate it, training does not (data.exif)"))
    suffix = "" if isinstance(image, bytes) else os.path.splitext(image)[1].lower()
    if Image.registered_extensions().get(suffix, format_) != format_:
        problems.append(("wrong_type", f"contains {format_}, but is named {suffix}"))
    if animated:
        problems.append(("animated", "has several frames; training sees the first"))
    return problems


def _check_pixels(content: bytes, opened: Image.Image, max_pixels: int) -> list[Problem]:
    """Finds what an image loses when it becomes RGB of 8 bits."""
    with open_header(content, max_pixels) as image:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image.load()
            if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                return [("transparent", "has transparent pixels; training sees the colours beneath")]
        elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
            low, high = opened.getextrema()[0]
            smallest, largest = image.getextrema()
            if high - low < FAINT_LEVELS and smallest < largest:
                return [("faint", f"its values from {smallest:g} to {largest:g} become {low} to {high} of 255")]
    return []


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # there is a second frame, and it is damaged
        return True
