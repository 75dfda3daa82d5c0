"""Pixels against transformers' processors, bit for bit, and one clear line for every file that is no image."""

import io

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.images import normalise, open_image, prepare

SIZES = [
    (336, 336), (224, 224), (1, 1), (1, 97), (97, 1), (2, 301), (301, 2), (3, 3), (640, 480), (480, 640),
    (337, 336), (336, 337), (335, 336), (500, 375), (101, 57), (333, 500), (1024, 33), (33, 1024),
    (672, 336), (41, 1000), (999, 350), (673, 1009),
]  # fmt: skip
MODES = ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]


def noise(width: int, height: int, bands: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)


def image_of_mode(mode: str, width: int = 61, height: int = 83) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(1).integers(0, 65536, (height, width)).astype(np.uint16))
    if mode in ("I", "F"):
        values = np.random.default_rng(1).integers(-50, 400, (height, width))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
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


WAYS = [("square", 336), ("square", 30), ("pad", 336), ("pad", 61)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def processor(request):
    """(mode, size, the pixels that transformers computes, as HWC)."""
    transformers = pytest.importorskip("transformers")
    mode, size = request.param
    kind = transformers.CLIPImageProcessorPil if mode == "square" else transformers.LlavaImageProcessorPil
    extra = {} if mode == "square" else {"do_pad": True}
    oracle = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **extra)
    return mode, size, lambda image: oracle(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)


def assert_identical(image: Image.Image, processor) -> None:
    mode, size, expected = processor
    tiles = prepare(image, size, mode)
    assert tiles.shape == (1, size, size, 3) and tiles.dtype == np.uint8
    pixels = normalise(tiles)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0], expected(image))


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sizes_equal_transformers(size, processor):
    assert_identical(Image.fromarray(noise(*size, 3), "RGB"), processor)


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_transformers(mode, processor):
    assert image_of_mode(mode).mode == mode
    assert_identical(image_of_mode(mode), processor)


@pytest.mark.parametrize(
    "palette, alpha",
    [(True, 3), (True, bytes(range(0, 256, 16))), (False, None)],
    ids=["index", "alphas", "colour"],
)
def test_transparency_beside_the_pixels_equals_transformers(palette, alpha, processor):
    image = transparent(palette, alpha)
    assert image.info["transparency"] is not None
    assert_identical(image, processor)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("PA", "HSV")])  # no file holds these
def test_opening_a_file_gives_the_same_pixels(mode, tmp_path):
    path = tmp_path / "image"
    file_format = {"CMYK": "JPEG", "YCbCr": "JPEG", "I": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    image_of_mode(mode).save(path, file_format)
    opened = open_image(path)
    assert opened.mode == "RGB"
    with Image.open(path) as expected:
        np.testing.assert_array_equal(prepare(opened, 30), prepare(expected, 30))
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(opened))


def test_transparent_pixels_become_white():
    assert open_image(_bytes(Image.new("RGBA", (2, 2), (200, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def _bytes(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "JPEG")[:-900], "truncated"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "PNG")[:-900], "truncated"),
        (_bytes(Image.fromarray(noise(64, 64, 3)), "GIF")[:900], "truncated"),
        (b"P6 0 0 255\n", "not an image"),
        (b"P6 30000 30000 255\n", "cannot be read"),
    ],
    ids=["empty", "html", "jpeg", "png", "gif", "no-pixels", "bomb"],
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


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg: no such image file"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=f"{tmp_path}: the image cannot be read"):
        open_image(tmp_path)


def test_unknown_mode_lists_the_modes():
    with pytest.raises(UserError, match="'anyres' is unknown; choose one of: square, pad"):
        prepare(Image.new("RGB", (4, 4)), mode="anyres")


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UserError, match="0 x 5 pixels"):
        prepare(Image.new("RGB", (0, 5)))


def test_elongated_images_are_refused_before_memory_runs_out():
    wide, tall = Image.new("RGB", (20_000, 1)), Image.new("RGB", (1, 20_000))
    for image, mode in [(tall, "square"), (wide, "square"), (tall, "pad"), (wide, "pad")]:
        with pytest.raises(UserError, match="too large or elongated"):
            prepare(image, 336, mode)
