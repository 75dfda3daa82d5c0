"""Pixels against transformers' processors, bit for bit; `test_anyres.py` has anyres and videos."""

import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_data import PIL_MODES, SIZES, image_of_mode, noise, transparent
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.images import ImageProcessor

WAYS = [("crop", 336), ("crop", 30), ("pad", 336), ("pad", 61), ("resize", 384), ("resize", 30)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def processor(request):
    """An ImageProcessor, and the pixels that transformers computes, as HWC."""
    transformers = pytest.importorskip("transformers")
    mode, size = request.param
    square = {"height": size, "width": size}
    if mode == "resize":
        oracle, half = transformers.SiglipImageProcessorPil(size=square), (0.5, 0.5, 0.5)
        return ImageProcessor(size, mode, mean=half, std=half), pixels_of(oracle)
    kind = transformers.CLIPImageProcessorPil if mode == "crop" else transformers.LlavaImageProcessorPil
    extra = {} if mode == "crop" else {"do_pad": True}
    return ImageProcessor(size, mode), pixels_of(kind(size={"shortest_edge": size}, crop_size=square, **extra))


def pixels_of(oracle):
    return lambda image: oracle(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)


def assert_identical(image: Image.Image, processor) -> None:
    """`processor` is transformers of what the original makes of an image, which drops transparency."""
    processor, expected = processor
    tiles = processor(image)
    assert tiles.shape == (1, processor.size, processor.size, 3) and tiles.dtype == np.uint8
    pixels = processor.normalise(tiles)
    assert pixels.dtype == np.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of palettes
        opaque = image.convert("RGB")
    opaque.info.clear()  # PIL keeps a transparent colour there, which transformers would make white
    np.testing.assert_array_equal(pixels[0], expected(opaque))


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sizes_equal_transformers(size, processor):
    assert_identical(Image.fromarray(noise(*size, 3), "RGB"), processor)


@pytest.mark.parametrize("mode", [*PIL_MODES, "I", "F"])
def test_modes_equal_transformers(mode, processor):
    assert image_of_mode(mode).mode == mode
    assert_identical(image_of_mode(mode), processor)


@pytest.mark.skipif("LLAVA_PHOTOS" not in os.environ, reason="LLAVA_PHOTOS: photos and original_pixels.json")
def test_photos_are_the_original_s_to_the_bit():
    """original_pixels.json: {file: {"SIZE_MODE": first 24 hex digits of the SHA-256 of float32 [3, SIZE, SIZE]}}."""
    folder = Path(os.environ["LLAVA_PHOTOS"])
    compared = 0
    for name, about in json.loads((folder / "original_pixels.json").read_text()).items():
        for way in (key for key in about if "_" in key):
            size, mode = way.split("_")
            processor = ImageProcessor(int(size), {"square": "crop"}.get(mode, mode))
            pixels = processor.normalise(processor(open_image(folder / name)))[0].transpose(2, 0, 1)
            assert hashlib.sha256(pixels.tobytes()).hexdigest()[:24] == about[way], (name, way)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("fields, message", [
    ({"mode": "square"}, "image mode 'square' is unknown; choose one of: crop, pad, resize, anyres"),
    ({"mode": "anyres"}, "anyres needs pinpoints"), ({"pinpoints": ((336, 336),)}, "anyres alone reads them"),
    ({"mode": "anyres", "pinpoints": ((336, 300),)}, "pinpoint 336 x 300 is no multiple of the tile's 336 pixels"),
    ({"mode": "anyres", "pinpoints": ((336, 672),), "class_token": True}, "no position for a class token"),
    ({"size": 0}, "must be at least 1"), ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
])
def test_invalid_processors_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor(**fields)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UserError, match="0 x 5 pixels"):
        ImageProcessor()(Image.new("RGB", (0, 5)))


def test_elongated_images_are_refused_before_memory_runs_out():
    for image in (Image.new("RGB", (20_000, 1)), Image.new("RGB", (1, 20_000))):
        with pytest.raises(UserError, match="too elongated to resize"):
            ImageProcessor(336, "crop")(image)


@pytest.mark.parametrize("strip", [1, 5000, 2**22])
def test_padding_in_strips_is_padding(strip, monkeypatch):
    monkeypatch.setattr("llava_jax.image_files.STRIP_PIXELS", strip)
    for number, (width, height) in enumerate([*SIZES, (2000, 3), (3, 2000)]):
        image = Image.fromarray(noise(width, height, 3, number))
        side = max(width, height)
        padded = Image.new("RGB", (side, side), (122, 116, 104))
        padded.paste(image, ((side - width) // 2, (side - height) // 2))
        for size in (336, 61):
            expected = padded.resize((size, size), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(ImageProcessor(size)(image)[0], np.asarray(expected))


@pytest.mark.parametrize(
    "palette, alpha",
    [(True, 3), (True, bytes(range(0, 256, 16))), (False, None)],
    ids=["index", "alphas", "colour"],
)
def test_transparency_beside_the_pixels_equals_transformers(palette, alpha, processor):
    image = transparent(palette, alpha)
    assert image.info["transparency"] is not None
    assert_identical(image, processor)


def test_one_tile_layouts_count_through():
    for class_token in (False, True):
        processor = ImageProcessor(28, patches=2, class_token=class_token)
        assert processor.is_fixed and processor.layout(7, 900).tiles == 1
        assert processor.layout().index.tolist() == list(range(4 + class_token))


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_visual_index_moves_each_image_behind_the_one_before(sizes, before, after):
    processor = ImageProcessor(28, "anyres", 2, pinpoints=((56, 28), (28, 84), (2800, 2800)))
    layouts = [processor.layout(*size) for size in sizes]
    total = before + sum(layout.tiles for layout in layouts) + after
    expected, tile = [], before
    for layout in layouts:
        for feature in layout.index.tolist():
            expected.append(total * 4 if feature == layout.tiles * 4 else tile * 4 + feature)
        tile += layout.tiles
    found = processor.visual_tokens(layouts, before, total)["visual_index"]
    assert found.tolist() == expected and found.dtype == np.int32
    assert max(expected, default=0) <= total * 4


def test_a_canvas_is_the_image_scaled_and_centred_on_black():
    tiles = ImageProcessor(28, "anyres", 2, pinpoints=((56, 28),))(Image.new("RGB", (56, 56), "white"))
    assert tiles.shape == (3, 28, 28, 3) and (tiles[0] == 255).all()
    canvas = np.concatenate([tiles[1], tiles[2]], axis=1)
    edge = math.ceil((56 - 28) / 2)
    assert (canvas[:, edge : 56 - edge] == 255).all()
    assert not canvas[:, :edge].any() and not canvas[:, 56 - edge :].any()
