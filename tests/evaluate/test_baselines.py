"""The baselines: pictures that belong to other questions, and pictures whose patches have changed places."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.evaluate.runner.baselines import images_of, shuffle
from llava_jax.evaluate.tasks.base import Question
from llava_jax.images import ImageProcessor


def config(size: int = 28, patch: int = 7, mode: str = "crop"):
    return SimpleNamespace(vision=SimpleNamespace(image_size=size, patch_size=patch), exif=False,
                           processor=ImageProcessor(size, mode))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def patches(tile: np.ndarray, patch: int) -> Counter:
    count = len(tile) // patch
    return Counter(tile[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].tobytes()
                   for y in range(count) for x in range(count))


@pytest.mark.parametrize(("side", "patch"), [(28, 7), (30, 7), (60, 10), (336, 14)])
def test_shuffling_keeps_every_patch_and_moves_most(side, patch):
    tile = noise(side, side)
    mixed, whole = shuffle(tile, patch), side // patch * patch
    assert patches(mixed, patch) == patches(tile, patch)
    moved = sum((tile[y : y + patch, x : x + patch] != mixed[y : y + patch, x : x + patch]).any()
                for y in range(0, whole, patch) for x in range(0, whole, patch))
    assert moved > 0.7 * (side // patch) ** 2
    np.testing.assert_array_equal(mixed[whole:], tile[whole:])
    np.testing.assert_array_equal(mixed[:, whole:], tile[:, whole:])
    np.testing.assert_array_equal(mixed, shuffle(tile, patch))


def test_pictures_are_shuffled_in_different_ways():
    numbers = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4), 7, 0), 7, 1)
    orders = set()
    for picture in range(20):
        tile = np.stack([numbers, np.full_like(numbers, picture), np.zeros_like(numbers)], -1)
        orders.add(shuffle(tile, 7)[::7, ::7, 0].tobytes())
    assert len(orders) == 20


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_the_tower_sees_the_shuffled_patches_and_no_others(mode, tmp_path):
    Image.fromarray(noise(40, 90)).save(tmp_path / "a.png")
    question = Question(0, "", (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()))
    pictures = images_of("shuffled", [question], config(mode=mode))(question)
    [tile] = ImageProcessor(28, mode)(Image.open(tmp_path / "a.png"))
    for picture in pictures:
        [seen] = ImageProcessor(28, mode)(picture)
        assert patches(seen, 7) == patches(tile, 7) and (seen != tile).any()
    assert len(pictures) == 2


def test_the_blind_see_each_a_picture_of_another_question():
    questions = [Question(n, "", images) for n, images in enumerate([("b",), ("a",), ("b",), (), ("c", "d"), (b"e",)])]
    show = images_of("blind", questions, config())
    seen = [show(question) for question in questions]
    assert all(theirs != question.images for question, theirs in zip(questions, seen, strict=True) if question.images)
    assert seen[0] == seen[2] and seen[3] == ()
    assert set(seen) == {question.images for question in questions}  # all pictures are shown, to other questions
    assert images_of("none", questions, config())(questions[4]) == ("c", "d")


def test_one_picture_alone_cannot_be_swapped():
    with pytest.raises(UserError, match="the same picture"):
        images_of("blind", [Question(0, "", ("a",)), Question(1, "", ("a",))], config())
