import itertools
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.scene import Scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp("scenes"), train=150, test=60, unseen=40, seed=3)


def load(folder, split):
    return tuple(
        json.loads((folder / "annotations" / f"{part}_{split}.json").read_text())
        for part in ("captions", "instances")
    )


@pytest.mark.parametrize(("split", "count"), [("train", 150), ("test", 60), ("unseen", 40)])
def test_is_a_coco_data_set(folder, split, count):
    captions, instances = load(folder, split)
    assert captions["images"] == instances["images"] and len(captions["images"]) == count
    numbers = {image["id"] for image in captions["images"]}
    assert len(numbers) == count
    for image in captions["images"]:
        with Image.open(folder / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.mode == "RGB"
    assert sorted(caption["image_id"] for caption in captions["annotations"]) == sorted(list(numbers) * 5)
    assert {box["image_id"] for box in instances["annotations"]} == numbers
    known = {category["id"] for category in instances["categories"]}
    for box in instances["annotations"]:
        x, y, width, height = box["bbox"]
        assert box["category_id"] in known
        assert 0 <= x and 0 <= y and x + width <= scenes.SIZE + 0.1 and y + height <= scenes.SIZE + 0.1


def test_held_back_pairs_are_in_the_unseen_split_alone(folder):
    unseen = {f"{colour} {shape}" for colour, shape in scenes.UNSEEN}
    for split in ("train", "test"):
        captions, instances = load(folder, split)
        assert not unseen & {category["name"] for category in instances["categories"]}
        assert not any(pair in caption["caption"] for pair in unseen for caption in captions["annotations"])
    _, instances = load(folder, "unseen")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    with_unseen = {box["image_id"] for box in instances["annotations"] if names[box["category_id"]] in unseen}
    assert with_unseen == {image["id"] for image in instances["images"]}


def test_boxes_hold_the_pixels_of_their_colour():
    rng, noise = random.Random(5), np.random.default_rng(5)
    for _ in range(60):
        [thing] = scenes.sample(rng, most=1)
        pixels = np.asarray(scenes.render((thing,), rng, noise), np.float32)
        x, y, w, h = (round(value) for value in thing.box)
        inside = np.zeros(pixels.shape[:2], bool)
        inside[y : y + h, x : x + w] = True
        near = np.linalg.norm(pixels - np.float32(scenes.COLOURS[thing.colour]), axis=-1) < 75
        assert near[inside].mean() > 0.2, thing
        # The background never has a strong colour, so it is pixels of the object that are nearest to it.
        distance = np.linalg.norm(pixels - np.float32(scenes.COLOURS[thing.colour]), axis=-1)
        assert inside.ravel()[distance.argmin()], thing


def test_the_seed_decides_every_byte(tmp_path):
    def files(name, seed):
        folder = scenes.write(tmp_path / name, train=8, test=4, seed=seed)
        return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.*"))}

    first = files("a", 1)
    assert first == files("b", 1)
    assert first != files("c", 2)


def test_captions_tell_every_object(folder):
    rng = random.Random(2)
    for _ in range(50):
        objects = scenes.sample(rng, scenes.PAIRS)
        captions = scenes.captions(objects)
        assert len(captions) == len(set(captions)) == 5
        assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)
        for thing in objects:
            assert all(f"{thing.colour} {thing.shape}" in caption for caption in captions)
            assert f"{thing.size} {thing.colour} {thing.shape} at the {thing.position}" in captions[1].replace(
                "A ", "a "
            )


PICTURES = ((120, 120), (180, 60), (60, 180))


def test_larger_pictures_show_what_their_boxes_say():
    """Boxes of objects and signs against colours in the picture, sizes in pixels and the nine positions."""
    rng, noise = random.Random(8), np.random.default_rng(8)
    for _ in range(60):
        size = rng.choice(PICTURES)
        sign = scenes.sample_sign(rng, *size)
        objects = scenes.sample(rng, picture=size, sign=sign)
        picture = scenes.render(objects, rng, noise, size, sign)
        assert picture.size == size
        pixels = np.asarray(picture, np.float32)
        boxes = [(scenes.COLOURS[thing.colour], thing.box) for thing in objects]
        for colour, (x, y, w, h) in [*boxes, (scenes.COLOURS[sign.colour], sign.box)]:
            assert x >= 0 and y >= 0 and x + w <= size[0] + 0.1 and y + h <= size[1] + 0.1
            near = np.linalg.norm(pixels - np.float32(colour), axis=-1) < 75
            assert near[round(y) : round(y + h), round(x) : round(x + w)].mean() > 0.05, (objects, sign)
        context = Context("", "", (), tuple(box_of(name, box, size) for name, box in [
            *((f"{o.colour} {o.shape}", o.box) for o in objects), (sign.category, sign.box)]))
        found = Scene(context)
        assert found.signs == [(sign.colour, " ".join(sign.words))] and found.shapes
        assert [(o.name.size, o.name.colour, o.name.noun, o.position) for o in found.objects] == [
            (o.size, o.colour, o.shape, o.position) for o in objects]
        for thing in objects:
            assert (thing.box[2] < 0.26 * min(size)) == (thing.size == "small")
            assert thing.size == "large" or 12 <= thing.box[2] <= 14


def box_of(category, box, size):
    x, y, w, h = box
    return Box(category, x / size[0], y / size[1], (x + w) / size[0], (y + h) / size[1])


def test_signs_can_be_read_from_their_pixels():
    rng, noise = random.Random(9), np.random.default_rng(9)
    for _ in range(100):
        size = rng.choice(PICTURES)
        sign = scenes.sample_sign(rng, *size, length=3)
        pixels = np.asarray(scenes.render((), rng, noise, size, sign), np.float32)
        x, y, w, h = sign.box
        plate = pixels[round(y) + 3 : round(y + h) - 3, round(x) : round(x + w)]
        colour = np.linalg.norm(plate - np.float32(scenes.COLOURS[sign.colour]), axis=-1)
        drawn = colour < np.linalg.norm(plate - np.float32((30, 30, 40)), axis=-1)
        cells = np.split(drawn[:, 2:-2], (18, 38), axis=1)  # without the frame
        assert " ".join(map(read_glyph, cells)) == " ".join(sign.words)


def read_glyph(drawn):
    """The shape of a mask, from its middle, its corners and the points halfway between."""
    rows, columns = np.flatnonzero(drawn.sum(1) > 1), np.flatnonzero(drawn.sum(0) > 1)
    drawn = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = (length // 2 for length in drawn.shape)
    if not drawn[y - 1 : y + 1, x - 1 : x + 1].any():
        return "ring"
    top, bottom = drawn[1, [1, -2]].sum(), drawn[-2, [1, -2]].sum()
    if bottom == 2:
        return "triangle" if top == 0 else "square"
    between = drawn[[y // 2, y // 2, -y // 2, -y // 2], [x // 2, -x // 2, x // 2, -x // 2]]
    return "circle" if between.sum() > 2 else "cross"


def test_larger_pictures_have_sizes_and_signs(tmp_path):
    def write(name):
        folder = scenes.write(tmp_path / name, train=60, test=0, pictures=PICTURES, signs=0.5)
        return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.*"))}

    assert write("a") == write("b")
    _, instances = load(tmp_path / "a", "train")
    assert {(image["width"], image["height"]) for image in instances["images"]} == set(PICTURES)
    kinds = {category["id"]: category["supercategory"] for category in instances["categories"]}
    with_sign = [box["image_id"] for box in instances["annotations"] if kinds[box["category_id"]] == "sign"]
    assert len(with_sign) == len(set(with_sign)) and 15 <= len(with_sign) <= 45


def test_an_enlarged_split_has_the_same_scenes():
    for (objects, _, small), (again, _, large) in itertools.islice(
            zip(scenes.draw_split("test"), scenes.draw_split("test", enlarge=4), strict=True), 12):
        assert objects == again and (small.size, large.size) == ((60, 60), (240, 240))
        shrunk = np.asarray(large.reduce(4), float)
        # Noise differs: it is of single pixels in both, with a deviation of at most 8.
        assert np.abs(shrunk - np.asarray(small, float)).mean() < 8
