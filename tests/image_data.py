"""Images of every PIL mode and many sizes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZES = [
    (336, 336), (224, 224), (1, 1), (1, 97), (97, 1), (2, 301), (301, 2), (3, 3), (640, 480), (480, 640),
    (337, 336), (336, 337), (335, 336), (500, 375), (101, 57), (333, 500), (1024, 33), (33, 1024),
    (672, 336), (41, 1000), (999, 350), (673, 1009),
]  # fmt: skip
PIL_MODES = ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"]
GREYS = ["I;16", "I;16B", "I", "F"]


def noise(width: int, height: int, bands: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)


def grey_of_mode(values: np.ndarray, mode: str) -> Image.Image:
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}
    return Image.fromarray(values.astype(kinds[mode]))


def image_of_mode(mode: str, width: int = 61, height: int = 83) -> Image.Image:
    if mode in GREYS:
        return grey_of_mode(noise(width, height, 1)[..., 0], mode)
    if mode == "LAB":
        return Image.fromarray(noise(width, height, 3), "LAB")
    rgba = Image.fromarray(noise(width, height, 4), "RGBA")
    if mode in ("LA", "PA"):
        grey = rgba.convert("L").convert("L" if mode == "LA" else "P")
        return Image.merge("LA", (grey, rgba.getchannel("A"))) if mode == "LA" else grey.convert("PA")
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def transparent(palette: bool, alpha) -> Image.Image:
    """An image that carries its transparency beside the pixels, as PNG and GIF files do."""
    image = Image.fromarray(noise(45, 30, 3), "RGB")
    image = image.quantize(16) if palette else image
    file = io.BytesIO()
    image.save(file, "PNG", transparency=alpha if palette else image.getpixel((3, 4)))
    return Image.open(io.BytesIO(file.getvalue()))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, packed: bytes, colour: int = 2, chunks: bytes = b"") -> bytes:
    """A PNG whose header names this size and colour type, with these packed pixels, whatever they are."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", packed)
            + png_chunk(b"IEND", b""))
