import json
import random

import numpy as np
import pytest
from PIL import Image

from llava_jax.annotations import drawn_scenes as scenes


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
        for thing in objects:
            assert all(f"{thing.colour} {thing.shape}" in caption for caption in captions)
            assert f"{thing.size} {thing.colour} {thing.shape} at the {thing.position}" in captions[1].replace(
                "A ", "a "
            )
