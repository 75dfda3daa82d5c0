"""One clear line for every file that is no image; sizes, modes and rotations as PIL has them."""

import errno
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from image_data import GREYS, PIL_MODES, grey_of_mode, image_of_mode, noise, png
from PIL import Image, ImageOps

from llava_jax.errors import UserError
from llava_jax.image_files import image_size, open_image, orientation, turn_upright
from llava_jax.images import ImageProcessor


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode):
    image = image_of_mode({"RGBa": "RGBA", "La": "LA"}[mode]).convert(mode)
    expected = image.convert(mode.upper()).convert("RGB")
    np.testing.assert_array_equal(ImageProcessor(30)(image), ImageProcessor(30)(expected))


def seen(image: Image.Image, file_format: str = "TIFF") -> np.ndarray:
    """The grey levels of an image once it has been a file."""
    levels = np.asarray(open_image(_bytes(image, file_format)))
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


@pytest.mark.parametrize("mode, file_format", [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_greys_of_16_bits_are_scaled_by_the_range_of_the_type(mode, file_format):
    values = np.random.default_rng(1).integers(0, 65536, (83, 61))
    values[0, :2] = 0, 65535
    expected = np.rint(values / 257).astype(np.uint8)
    assert len(np.unique(expected)) > 250
    np.testing.assert_array_equal(seen(grey_of_mode(values, mode), file_format), expected)
    eight = noise(61, 83, 1)[..., 0]
    np.testing.assert_array_equal(seen(grey_of_mode(eight.astype(int) * 257, "I;16"), file_format), eight)


@pytest.mark.parametrize("mode, low, high", [("I", -50, 400), ("I", 0, 10**6), ("I", -(2**31), 2**31 - 1),
                                             ("F", 0, 1), ("F", -1, 1), ("F", 0, 4000.5), ("F", -3e38, 3e38)])
def test_greys_of_32_bits_keep_their_contents(mode, low, high):
    values = np.linspace(low, high, 256, dtype=np.float64).reshape(16, 16)
    levels = seen(grey_of_mode(values, mode))
    expected = (values - low) / (high - low) * 255
    assert np.abs(levels - expected).max() < 1.01 and levels.min() == 0 and levels.max() == 255


def test_floats_that_are_no_numbers():
    values = np.array([[0.0, 0.5, 1.0], [np.nan, np.inf, -np.inf]], np.float32)
    assert seen(Image.fromarray(values)).tolist() == [[0, 128, 255], [0, 255, 0]]
    assert seen(Image.fromarray(np.full((2, 2), np.nan, np.float32))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("mode", [mode for mode in [*PIL_MODES, *GREYS] if mode not in ("PA", "HSV")])  # no file has
def test_opening_a_file_gives_the_same_pixels(mode, tmp_path):
    path = tmp_path / "image"
    tiffs = ("I", "F", "I;16B", "LAB", "RGBX")
    file_format = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in tiffs else "PNG"
    image_of_mode(mode).save(path, file_format)
    opened = open_image(path)
    assert opened.mode == "RGB"
    with Image.open(path) as expected:
        np.testing.assert_array_equal(ImageProcessor(30)(opened), ImageProcessor(30)(expected))
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(opened))


def test_of_transparent_pixels_the_colour_stays():
    assert open_image(_bytes(Image.new("RGBA", (2, 2), (200, 0, 0, 0)))).getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("file_format, mode", [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"),
                                               ("WEBP", "RGB"), ("AVIF", "RGB")])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(file_format, mode, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = _bytes(image_of_mode(mode), file_format, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        assert orientation(image) == turn
        upright = ImageOps.exif_transpose(image)
    as_stored, turned = open_image(content), open_image(content, exif=True)
    assert as_stored.size == image_of_mode(mode).size and turned.size == upright.size
    expected = ImageProcessor(30)(upright)
    np.testing.assert_array_equal(ImageProcessor(30)(turned), expected)
    assert (turn == 1) == np.array_equal(ImageProcessor(30)(as_stored), expected)


def test_pil_turns_tiffs_itself():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = _bytes(image_of_mode("RGB"), "TIFF", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        assert orientation(image) == 1
    assert open_image(content).size == open_image(content, exif=True).size == (83, 61)


def test_exif_that_is_damaged_is_none():
    content = _bytes(image_of_mode("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with Image.open(io.BytesIO(content)) as image:
        assert orientation(image) == 1
    assert open_image(content, exif=True).size == (61, 83)


def _bytes(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "the file is empty|not an image"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "not an image but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer.*git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an HEIC image, as iPhones write it"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "XML, such as SVG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"%PDF-1.7", "a PDF"),
        (b"<html>404</html>", "not an image"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "JPEG")[:-900], "truncated"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "PNG")[:-900], "truncated"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "GIF")[:900], "truncated"),
        (b"P6 0 0 255\n", "not an image"),
        (b"P6 3 3 255\n" + bytes(27), "not an image, or of an unknown format; known are JPEG, PNG, WebP, GIF, BMP"),
    ],
    ids=["empty", "page", "lfs", "heic", "mp4", "svg", "jxl", "jp2", "eps", "pdf", "html", "jpeg", "png", "gif",
         "no-pixels", "ppm"],
)
def test_broken_files_are_one_line_that_names_them(content, says, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        open_image(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "object at" not in message
    with pytest.raises(UserError, match=f"image of {len(content)} bytes: .*{says}"):
        open_image(content)


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_sizes_from_the_header_are_those_of_the_opened_image(file_format, exif, tmp_path):
    for turn in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = turn
        content = _bytes(image_of_mode("RGB"), file_format, **({} if file_format in ("GIF", "BMP") else {"exif": tags}))
        (tmp_path / "image").write_bytes(content)
        expected = open_image(content, exif).size
        assert image_size(content, exif) == image_size(tmp_path / "image", exif) == expected


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg: no such image file"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="nowhere.jpg: no such image file"):
        image_size(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=f"{tmp_path}: the image cannot be read"):
        open_image(tmp_path)


def webp_header(width: int, height: int, kind: str) -> bytes:
    """A WebP of 34 bytes."""
    width, height = width - 1, height - 1
    body = {
        "VP8L": b"\x2f" + (width | height << 14).to_bytes(4, "little"),
        "VP8X": bytes(4) + width.to_bytes(3, "little") + height.to_bytes(3, "little"),
        "VP8 ": b"\x10\0\0\x9d\x01\x2a" + (width + 1).to_bytes(2, "little") + (height + 1).to_bytes(2, "little"),
    }[kind].ljust(14, b"\0")
    return b"RIFF" + (26).to_bytes(4, "little") + b"WEBP" + kind.encode() + (14).to_bytes(4, "little") + body


def png_bomb(width: int, height: int) -> bytes:
    packer = zlib.compressobj(9)
    row = bytes(4 * width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, pixels, colour=6)


BOMBS = {
    "png": lambda: png_bomb(13_000, 13_000),
    **{f"webp {kind} {side}": lambda kind=kind, side=side: webp_header(side, side, kind)
       for kind in ("VP8L", "VP8X", "VP8 ") for side in (9000, 16383)},
    "gif": lambda: b"GIF89a" + b"\xff\xff\xff\xff" + bytes(3) + b",\0\0\0\0" + b"\xff\xff\xff\xff" + b"\0\x02\x01\0\0;",
    "bmp": lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_told_from_their_headers(bomb, tmp_path):
    """In a process of its own that may map 100 MB more than it does: libwebp maps two canvases when it is made."""
    (tmp_path / "bomb").write_bytes(BOMBS[bomb]())
    script = """
import resource, sys
import llava_jax.image_files as image_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 100 * 2**20, -1))
try:
    image_files.open_image(sys.argv[1])
except image_files.UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-W", "error", "-c", script, tmp_path / "bomb"]
    ran = subprocess.run(command, capture_output=True, text=True)
    says, grown = ran.stdout.splitlines()
    assert "the image cannot be read (" in says and "pixels" in says and int(grown) < 50, ran


def test_the_limit_of_pixels_is_an_option():
    content = _bytes(Image.new("RGB", (60, 40)))
    assert open_image(content, max_pixels=2400).size == (60, 40)
    with pytest.raises(UserError, match=r"60 x 40 pixels, more than the limit of 2,399 \(max_pixels\)"):
        open_image(content, max_pixels=2399)


def test_a_tiff_whose_tiles_are_larger_than_itself():
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30000, 323: 30000, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (16, 16)
    with pytest.raises(UserError, match="30,000 x 30,000 pixels"):
        open_image(content)


def test_a_jpeg_of_thousands_of_scans():
    content = _bytes(image_of_mode("RGB"), "JPEG", progressive=True)
    assert 2 < content.count(b"\xff\xda") < 20 and open_image(content)
    start = content.rindex(b"\xff\xda")
    with pytest.raises(UserError, match="a JPEG of 3,0.. scans, more than 100"):
        open_image(content[:start] + 3000 * content[start:-2] + content[-2:])


def test_a_time_limit(monkeypatch):
    content = _bytes(Image.fromarray(noise(300, 200, 3)), "JPEG")
    assert open_image(content, seconds=1000)
    clock = iter(range(1000))
    monkeypatch.setattr("llava_jax.image_files.time.monotonic", lambda: next(clock))
    with pytest.raises(UserError, match=r"decoding takes more than 2 s"):
        open_image(content, seconds=2)


FAULTS = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale"), OSError(errno.ENOMEM, "no memory"),
          MemoryError()]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["builtins.open", "os.stat", "PIL.Image.open", "PIL.Image.Image.load",
                                   "PIL.Image.Image.convert"])
def test_a_fault_of_the_machine_is_no_bad_image(where, fault, tmp_path, monkeypatch):
    path = tmp_path / "good.png"
    path.write_bytes(_bytes(image_of_mode("L")))

    def fail(*_, **__):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(fault)) as raised:
            open_image(path)
    assert raised.value is fault and open_image(path)


def test_a_decoder_without_memory_is_no_bad_image(monkeypatch):
    content = _bytes(image_of_mode("L"))

    def fail(_):
        raise OSError("out of memory error when reading image file")  # as PIL writes it, without a code

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError, match="image of .* bytes: out of memory"):
        open_image(content)


def test_a_mistake_of_this_code_is_no_bad_image(monkeypatch):
    monkeypatch.setattr("llava_jax.image_files.read_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_image("any.png")


def test_an_image_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = _bytes(image_of_mode("RGB"), "JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        once = turn_upright(image)
    assert once.size == (83, 61) and turn_upright(once) is once
    assert turn_upright(open_image(content, exif=True)).size == (83, 61)
    assert turn_upright(open_image(content)).size == (83, 61)
