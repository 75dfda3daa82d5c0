"""Layouts of anyres and video against transformers' processors and against the original's merge in torch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_data import noise
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.images import SIGLIP_MEAN, SIGLIP_STD, ImageProcessor, parse_pinpoints

FIVE = "(336x672),(672x336),(672x672),(1008x336),(336x1008)"
NEXT = ImageProcessor().with_mode("anyres", FIVE)
SIGLIP = ImageProcessor(384, "resize", 27, mean=SIGLIP_MEAN, std=SIGLIP_STD)
ONEVISION = SIGLIP.with_mode("anyres_max_9", "(1x1),...,(6x6)")


def transposed(processor: ImageProcessor) -> ImageProcessor:
    """The processor as transformers works: its pinpoints are (height, width), so that ties go to other ones."""
    return ImageProcessor(**vars(processor) | {"rule": "transformers",
                                               "pinpoints": tuple((h, w) for w, h in processor.pinpoints)})


@pytest.mark.parametrize("size, best, grid, tiles, tokens", [
    ((336, 336), (336, 672), (24, 24), 3, 1176), ((32, 32), (336, 672), (24, 24), 3, 1176),
    ((640, 480), (672, 672), (36, 48), 5, 2340), ((500, 375), (672, 672), (36, 48), 5, 2340),
    ((480, 640), (672, 672), (48, 36), 5, 2352), ((672, 672), (672, 672), (48, 48), 5, 2928),
    ((1024, 899), (672, 672), (42, 48), 5, 2634), ((1920, 1080), (672, 672), (28, 48), 5, 1948),
    ((1000, 250), (1008, 336), (18, 72), 4, 1890), ((300, 1000), (336, 1008), (72, 22), 4, 2232),
    ((100, 80), (336, 672), (20, 24), 3, 1076), ((25, 1), (336, 672), (0, 0), 3, 576)])
def test_next_counts_are_those_of_the_original(size, best, grid, tiles, tokens):
    layout = NEXT.layout(*size)
    assert (NEXT.canvas(*size), layout.tiles, len(layout.index)) == (best, tiles, tokens)
    assert tokens == 576 + grid[0] * (grid[1] + 1) and layout.weight is None
    assert (layout.index == tiles * 576).sum() == grid[0]


@pytest.mark.parametrize("size, best, grid, tokens", [
    ((384, 384), (384, 384), (27, 27), 1485), ((224, 224), (384, 384), (27, 27), 1485),
    ((100, 80), (384, 384), (21, 27), 1317), ((500, 375), (768, 384), (27, 36), 1728),
    ((427, 640), (768, 768), (54, 36), 2727), ((640, 480), (768, 768), (40, 54), 2929),
    ((480, 640), (768, 768), (54, 40), 2943), ((1000, 250), (1152, 384), (21, 81), 2451),
    ((250, 1000), (384, 1152), (81, 21), 2511), ((1024, 768), (1152, 768), (54, 73), 4725),
    ((1280, 720), (1536, 768), (54, 96), 5967), ((3000, 300), (2304, 384), (17, 162), 3500),
    ((800, 800), (1152, 1152), (81, 81), 7371), ((1200, 1200), (1536, 1536), (81, 81), 7371),
    ((2304, 2304), (2304, 2304), (81, 81), 7371), ((1920, 1080), (1920, 1152), (60, 108), 7269),
    ((4000, 3000), (2304, 1920), (70, 93), 7309)])
def test_onevision_counts_are_those_of_the_original(size, best, grid, tokens):
    layout = ONEVISION.layout(*size)
    assert (ONEVISION.canvas(*size), len(layout.index)) == (best, tokens)
    assert layout.tiles == 1 + best[0] * best[1] // 384**2 and tokens == 729 + grid[0] * (grid[1] + 1)
    assert (layout.index.reshape(tokens, -1)[:, 0] == layout.tiles * 729).sum() == grid[0]


def test_a_canvas_shrinks_from_a_ratio_above_1_1_only():
    assert len(ONEVISION.layout(1120, 1360).index) == 8765  # the most that an image has
    ratios = {False: [], True: []}
    for width, height in [(width, 1360) for width in range(900, 1340)]:
        columns, rows = (side * 27 // 384 for side in ONEVISION.canvas(width, height))
        if width / height <= columns / rows:
            columns -= (columns - int(width * (rows / height))) // 2 * 2
            ratio = math.sqrt(rows * columns / (9 * 729))
            layout = ONEVISION.layout(width, height)
            ratios[layout.weight is not None].append(ratio)
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
            assert len(layout.index) == 729 + rows * (columns + 1)
    assert 1.085 < max(ratios[False]) <= 1.1 < min(ratios[True]) < 1.115


@pytest.mark.parametrize("size", [(88, 55), (328, 205), (352, 748), (376, 799), (748, 352), (799, 376)])
def test_the_two_rules_differ_by_two_rows_or_columns(size):
    original, rounded = (len(ImageProcessor(**vars(NEXT) | {"rule": rule}).layout(*size).index)
                         for rule in ("original", "transformers"))
    columns, rows = (side // 14 for side in NEXT.canvas(*size))
    assert rounded - original in (2 * (columns + 1), 2 * rows)


def random_sizes(count: int, longest: int) -> list[tuple[int, int]]:
    """Sizes of all magnitudes, without strips that have no pixels on a canvas."""
    rng = np.random.default_rng(count)
    sizes = np.exp(rng.uniform(np.log(20), np.log(longest), (count, 2))).astype(int)
    return [(width, height) for width, height in sizes.tolist() if max(width, height) < 20 * min(width, height)]


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_counts_equal_transformers(count):
    transformers = pytest.importorskip("transformers")
    for ours, kind, known in (
            (NEXT, transformers.LlavaNextProcessor, {"patch_size": 14, "num_additional_image_tokens": 0}),
            (ONEVISION, transformers.LlavaOnevisionProcessor,
             {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"})):
        ours = transposed(ours)
        grid = [[height, width] for width, height in ours.pinpoints]
        theirs = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=grid), **known)
        theirs._get_unpadded_features = lambda *sizes, kind=kind, theirs=theirs: kind._get_unpadded_features(
            theirs, *sizes)
        for width, height in random_sizes(count // 2, 5000):
            layout = ours.layout(width, height)
            expected = kind._get_number_of_features(theirs, height, width, ours.size, ours.size)
            assert len(layout.index) == expected, (width, height)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_pixels_equal_transformers(count):
    """Tiles of 28 pixels, with the grids of the two models."""
    transformers = pytest.importorskip("transformers")
    square = {"height": 28, "width": 28}
    five = ",".join(f"({w}x{h})" for w, h in ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)))
    clip = transposed(ImageProcessor(28, patches=2).with_mode("anyres", five))
    siglip = ImageProcessor(28, "resize", 2, mean=SIGLIP_MEAN, std=SIGLIP_STD)
    siglip = transposed(siglip.with_mode("anyres_max_9", "(1x1),...,(6x6)"))
    for ours, kind, settings in (
            (clip, transformers.LlavaNextImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": square}),
            (siglip, transformers.LlavaOnevisionImageProcessorPil,
             {"size": square, "image_mean": SIGLIP_MEAN, "image_std": SIGLIP_STD})):
        theirs = kind(image_grid_pinpoints=[[height, width] for width, height in ours.pinpoints], **settings)
        for number, (width, height) in enumerate(random_sizes(count // 2, 250)):
            image = Image.fromarray(noise(width, height, 3, number), "RGB")
            expected = theirs(image, return_tensors="np").pixel_values[0]
            tiles = ours.tiles([image])
            assert len(tiles) == len(expected) == ours.layout(width, height).tiles
            np.testing.assert_array_equal(ours.normalise(tiles).transpose(0, 3, 1, 2), expected)


def test_several_images_of_onevision_are_padded_to_one_tile_each():
    transformers = pytest.importorskip("transformers")
    images = [Image.fromarray(noise(*size, 3), "RGB") for size in ((500, 375), (61, 400), (384, 384))]
    theirs = transformers.LlavaOnevisionImageProcessorPil(image_mean=SIGLIP_MEAN, image_std=SIGLIP_STD)
    expected = np.stack([np.asarray(x)[0] for x in theirs([images]).pixel_values])
    np.testing.assert_array_equal(ONEVISION.normalise(ONEVISION.tiles(images)).transpose(0, 3, 1, 2), expected)
    for layout in ONEVISION.layouts(images) + ONEVISION.layouts([(7, 9), (500, 3)]):
        assert layout.tiles == 1 and layout.weight is None and layout.index.tolist() == [*range(729), 729]
    # Each of several images keeps its canvas in LLaVA-1.6, and a video is no second image.
    assert [layout.tiles for layout in NEXT.layouts([(336, 336), (640, 480)])] == [3, 5]
    assert [layout.tiles for layout in ONEVISION.layouts([(384, 384), 3])] == [2, 3]
    assert ONEVISION.tiles([images[0], images]).shape == (1 + 2 + 3, 384, 384, 3)


def merged(layout, features, newline) -> np.ndarray:
    """Visual tokens by a layout, as the model gathers them from features [tiles, patches, D]."""
    rows = np.concatenate([features.reshape(-1, features.shape[-1]), newline[None]])
    if layout.weight is None:
        return rows[layout.index]
    return np.einsum("tkd,tk->td", rows[layout.index], layout.weight.astype(float))


def original_merge(features, newline, size, canvas, tile, max_tiles, merge, rounded):
    """LLaVA-NeXT's merge of one image's features on maps in torch, by its rules."""
    torch = pytest.importorskip("torch")
    base, rest = torch.tensor(features[0]), torch.tensor(features[1:])
    if merge == "flat":
        return torch.cat([base, rest.flatten(0, 1)]).numpy()
    across, down, side = canvas[0] // tile, canvas[1] // tile, math.isqrt(len(base))
    grid = rest.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    if merge == "spatial_unpad":
        (width, height), (rows, columns) = size, grid.shape[1:]
        whole = (lambda x: int(round(x, 7))) if rounded else int
        if width / height > columns / rows:
            cut = (rows - whole(height * (columns / width))) // 2
            grid = grid[:, cut : rows - cut]
        else:
            cut = (columns - whole(width * (rows / height))) // 2
            grid = grid[:, :, cut : columns - cut]
        rows, columns = grid.shape[1:]
        ratio = math.sqrt(rows * columns / (max_tiles * side**2)) if max_tiles else 0
        if ratio > 1.1:
            target = [max(1, int(rows // ratio)), max(1, int(columns // ratio))]
            grid = torch.nn.functional.interpolate(grid[None], target, mode="bilinear")[0]
        end = torch.tensor(newline)[:, None, None].expand(-1, grid.shape[1], 1)
        grid = torch.cat([grid, end], dim=2)
    return torch.cat([base, grid.flatten(1, 2).T]).numpy()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 5), st.integers(0, 4), st.booleans(),
       st.sampled_from([None, "flat", "spatial", "spatial_unpad"]),
       st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_layouts_against_maps_in_torch(width, height, side, max_tiles, rounded, merge, grids):
    pinpoints = tuple((28 * across, 28 * down) for across, down in grids)
    processor = ImageProcessor(28, "anyres", side, pinpoints=pinpoints, max_tiles=max_tiles, merge=merge,
                               rule="transformers" if rounded else "original")
    best, canvas = (0, 0), None
    for wide, high in pinpoints:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if kept > best[0] or kept == best[0] and canvas and wide * high - kept < best[1]:
            best, canvas = (kept, wide * high - kept), (wide, high)
    if canvas is None:
        with pytest.raises(UserError, match=f"{width} x {height} pixels is too elongated for every pinpoint"):
            processor.layout(width, height)
        return
    layout, rng = processor.layout(width, height), np.random.default_rng(0)
    features, newline = rng.normal(size=(layout.tiles, side**2, 3)), rng.normal(size=3)
    expected = original_merge(features, newline, (width, height), canvas, 28, max_tiles, merge or "spatial_unpad",
                              rounded)
    np.testing.assert_allclose(merged(layout, features, newline), expected, atol=1e-5)
    assert layout.weight is None or processor.is_weighted


@pytest.mark.parametrize("newline", ["one_token", "grid", "frame", "no_token"])
@pytest.mark.parametrize("pool, side", [("bilinear", 27), ("bilinear", 24), ("average", 27), ("average", 6), (None, 3)])
def test_videos_against_torch(newline, pool, side):
    torch = pytest.importorskip("torch")
    functional, rng = torch.nn.functional, np.random.default_rng(0)
    processor = ImageProcessor(28, "pad", side, merge="spatial_unpad", video_pool=pool, video_newline=newline)
    [layout] = processor.layouts([3])
    features, end = rng.normal(size=(3, side**2, 4)), rng.normal(size=4)
    maps = torch.tensor(features).permute(0, 2, 1).reshape(3, 4, side, side)
    if pool == "average":
        maps = functional.avg_pool2d(maps, 2)
    elif pool:
        maps = functional.interpolate(maps, [math.ceil(side / 2)] * 2, mode="bilinear")
    rows = maps.permute(0, 2, 3, 1).numpy()  # [frames, rows, columns, D]
    expected = []
    for frame in rows:
        for row in frame:
            expected += [*row, end] if newline == "grid" else [*row]
        expected += [end] if newline == "frame" else []
    expected += [end] if newline == "one_token" else []
    assert layout.tiles == 3 and (layout.weight is not None) == (pool is not None) == processor.is_weighted
    np.testing.assert_allclose(merged(layout, features, end), expected, atol=1e-6)


def test_frames_are_prepared_as_the_tower_was_trained():
    frames = [Image.fromarray(noise(50, 30, 3, seed), "RGB") for seed in range(2)]
    for processor, plain in ((NEXT, ImageProcessor(336, "crop")), (ONEVISION, SIGLIP)):
        np.testing.assert_array_equal(processor.tiles([frames]), np.concatenate([plain(frame) for frame in frames]))
    assert len(ONEVISION.layouts([32])[0].index) == 32 * 196 + 1
    with pytest.raises(UserError, match="a video without frames"):
        ONEVISION.layouts([0])


def test_weights_of_a_sequence_with_and_without_shrinking():
    processor = ImageProcessor(28, "anyres", 2, pinpoints=((28, 28), (84, 84)), max_tiles=1)
    layouts = processor.layouts([(28, 28)]) + processor.layouts([(84, 84)])
    assert [layout.weight is None for layout in layouts] == [True, False]
    visual = processor.visual_tokens(layouts, 3, 20)
    index, weight = visual["visual_index"], visual["visual_weight"]
    first, newline = len(layouts[0].index), 20 * 4
    assert index.shape == weight.shape == (sum(len(layout.index) for layout in layouts), 4)
    assert index.dtype == np.int32 and weight.dtype == np.float32
    expected = [newline if i == 2 * 4 else i + 3 * 4 for i in layouts[0].index.tolist()]
    np.testing.assert_array_equal(index[:first], np.repeat(np.array(expected)[:, None], 4, axis=1))
    np.testing.assert_array_equal(weight[:first], [[1, 0, 0, 0]] * first)
    np.testing.assert_array_equal(weight[first:], layouts[1].weight)
    expected = np.where(layouts[1].index == 10 * 4, newline, layouts[1].index + 5 * 4)
    np.testing.assert_array_equal(index[first:], expected)
    for name, value in processor.no_visual_tokens((2, 3)).items():
        assert value.shape == (2, 3, 4) and (value == (-1 if name == "visual_index" else 0)).all()


def test_pinpoints_as_text():
    five = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    for text in (FIVE, str(list(five)), str([list(pair) for pair in five])):
        assert parse_pinpoints(text, 336) == five
    squares = parse_pinpoints("(1x1),...,(6x6)", 384)
    assert squares == tuple((384 * width, 384 * height) for width in range(1, 7) for height in range(1, 7))
    assert parse_pinpoints("(2x1),...,(3x2)", 10) == ((20, 10), (20, 20), (30, 10), (30, 20))
    assert parse_pinpoints("(1x1),(2x1),(6x6)", 384) == squares
    # Pixels of a smaller tower are no range of tiles.
    small = parse_pinpoints("(60x120),(120x60),(120x120)", 336)
    assert small == ((60, 120), (120, 60), (120, 120))
    for points in (small, parse_pinpoints("(33x336),(672x672)", 336)):
        with pytest.raises(UserError, match=r"pinpoint \d\d x \d+ is no multiple of the tile's 336 pixels"):
            ImageProcessor(336, "anyres", pinpoints=points)
    for text in ("[[336,672],", "((1x1),...,(6x6)", "", "big", "(336x672", "(336x672);(1x1)", "(1x1),...", "(0x336)",
                 "(3x3),...,(1x1)", "(1x1),...,(99999x99999)", "(1.5x2)"):
        with pytest.raises(UserError, match="^model.pinpoints .*give sizes in pixels such as"):
            parse_pinpoints(text, 336)


def test_modes_by_name_keep_what_they_need():
    assert (ONEVISION.max_tiles, ONEVISION.several, ONEVISION.pool, ONEVISION.mode_name) == (
        9, "pad", "bilinear", "anyres_max_9")
    assert ONEVISION.has_newline and ONEVISION.is_weighted and NEXT.has_newline and not NEXT.is_weighted
    crop = ONEVISION.with_mode("crop")
    assert crop.is_fixed and not crop.has_newline and not crop.is_weighted
    assert ONEVISION.with_mode("anyres_max_4").max_tiles == 4
    for mode in ("anyres_max_", "anyres_max_0", "square", "anyres_max_9x"):
        with pytest.raises(UserError, match="choose one of: crop, pad, resize, anyres, anyres_max_N"):
            NEXT.with_mode(mode)
    with pytest.raises(UserError, match="anyres needs pinpoints"):
        ImageProcessor().with_mode("anyres")


@pytest.mark.parametrize("fields, message", [
    ({"merge": "spatial_maxpool2x2"}, "merge type 'spatial_maxpool2x2' is not supported; flat, spatial, spatial_unpad"),
    ({"merge": "spatial_unpad_nobase"}, "merge type 'spatial_unpad_nobase' is not supported"),
    ({"max_tiles": 9}, "max_tiles is 9"), ({"rule": "round"}, "rule is 'round'"), ({"several": "crop"}, "several"),
    ({"video_pool": "max"}, "video_pool is 'max'"), ({"video_newline": "row"}, "video_newline is 'row'"),
    ({"mode": "anyres", "pinpoints": ((336 * 100, 336 * 100),)}, "more than"),
    ({"video_pool": "average", "class_token": True}, "class token")])
def test_invalid_processors_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor(**fields)
