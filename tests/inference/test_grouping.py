import random
import threading
from collections import defaultdict

import pytest
from PIL import Image

from llava_jax.inference.grouping import PREFETCHED_BATCHES, group_batches, image_opener


def test_every_row_comes_once_with_its_kind():
    rng = random.Random(0)
    for count in (0, 1, 7, 40, 200):
        rows = [(rng.choice("abc"), number) for number in range(count)]
        kinds = {number: kind for kind, number in rows}
        found, sizes = list(group_batches(iter(rows), 8)), defaultdict(list)
        assert sorted(number for batch, _ in found for number in batch) == list(range(count))
        for batch, size in found:
            assert len({kinds[number] for number in batch}) == 1 and batch == sorted(batch)
            sizes[kinds[batch[0]]].append((len(batch), size))
        for kind, pairs in sizes.items():
            of_kind = sum(other == kind for other in kinds.values())
            assert [length for length, _ in pairs] == [8] * (of_kind // 8) + [of_kind % 8] * (of_kind % 8 > 0)
            # Filled up to eight rows, if there was a batch of eight.
            assert {size for _, size in pairs} == ({8} if of_kind >= 8 else {of_kind})


def test_rows_are_read_some_batches_ahead_and_no_further():
    read = []
    rows = ((0, read.append(number)) for number in range(1000))
    next(group_batches(rows, 4))
    assert len(read) == 4 * (PREFETCHED_BATCHES + 1)


def test_after_an_error_images_are_not_opened():
    hold, opened = threading.Event(), []
    with pytest.raises(KeyError), image_opener(lambda images: (hold.wait(10), opened.append(images))) as submit:
        for number in range(100):
            submit([str(number)])
        hold.set()
        raise KeyError
    assert len(opened) < 100


def test_an_image_that_follows_itself_is_opened_once():
    opened, picture = [], Image.new("RGB", (2, 2))
    with image_opener(lambda images: opened.append(images)) as submit:
        for images in (["a"], ["a"], ("a",), ["b"], [b"a"], ["a", "b"], ["a"], [], [picture], [picture]):
            submit(images).result()
    assert opened == [("a",), ("b",), (b"a",), ("a", "b"), (), [picture], [picture]]
