"""Sequences of images whose numbers of tiles and visual tokens depend on their sizes, against layouts one by one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_data import SIZE, SLOTS, packed_rows, settings, write_file

from llava_jax.data.records import BadRow
from llava_jax.images import ImageProcessor
from llava_jax.text.encode import IMAGE_TOKEN_ID

ANYRES = ImageProcessor(SIZE, "anyres", 2, pinpoints=((28, 14), (14, 28), (28, 28)))


def sized_rows(folder: Path, sizes: list[tuple[int, int]], **fields) -> list[dict]:
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\n" * len(sizes) + "What is here?"}, {"from": "gpt", "value": "It."}]
    return [{"images": [f"{number}.png" for number in range(len(sizes))], "conversations": turns, **fields}]


def test_tiles_of_several_sizes_are_counted_and_indexed(tmp_path):
    """Two conversations of images with other numbers of tiles and tokens, against layouts one by one."""
    sizes = [(40, 20), (20, 44)]
    rows = sized_rows(tmp_path, sizes) + sized_rows(tmp_path, sizes[:1])
    source = write_file(tmp_path, rows)
    [row] = packed_rows(**settings(source, processor=ANYRES, sequence_length=400,
                                   tiles_per_sequence=12, shuffle=False, epochs=1))
    expected, tiles, slot = [], [], 0
    for size, red in [(sizes[0], 0), (sizes[1], 1), (sizes[0], 0)]:
        count, index, _ = ANYRES.layout(*size)
        expected += [12 * 4 if feature == count * 4 else feature + slot * 4 for feature in index.tolist()]
        tiles += list(ANYRES(Image.new("RGB", size, (red, 0, 0))))
        slot += count
    assert slot == 9 and row["tile_segment_ids"].tolist() == [1] * 6 + [2] * 3 + [0] * 3
    visual = row["tokens"] == IMAGE_TOKEN_ID
    assert row["visual_index"][visual].tolist() == expected and (row["visual_index"][~visual] == -1).all()
    np.testing.assert_array_equal(row["tiles"][:slot], tiles)
    with pytest.raises(BadRow, match="6 tiles do not fit into the 5 of a sequence"):
        next(packed_rows(**settings(source, processor=ANYRES, tiles_per_sequence=5)))


def test_stored_sizes_spare_the_headers_and_must_be_true(tmp_path, monkeypatch):
    rows = sized_rows(tmp_path, [(40, 20)], image_widths=[40], image_heights=[20])
    options = settings(write_file(tmp_path, rows), processor=ANYRES, epochs=1)
    monkeypatch.setattr("llava_jax.data.examples.image_size", lambda *_: 1 / 0)
    [row] = packed_rows(**options)
    assert (row["tokens"] == IMAGE_TOKEN_ID).sum() == len(ANYRES.layout(40, 20).index)
    rows[0]["image_widths"] = [41]
    with pytest.raises(BadRow, match=r"size is \(40, 20\), but image_widths and image_heights say \(41, 20\)"):
        next(packed_rows(**settings(write_file(tmp_path, rows, "wrong.json"), processor=ANYRES, epochs=1)))


def test_layouts_are_those_of_the_turned_image(tmp_path):
    rows = sized_rows(tmp_path, [(40, 20)])
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "0.png", exif=tags)
    for exif, size in ((False, (40, 20)), (True, (20, 40))):
        [row] = packed_rows(**settings(write_file(tmp_path, rows), processor=ANYRES, exif=exif, epochs=1))
        visual = row["visual_index"][row["tokens"] == IMAGE_TOKEN_ID].tolist()
        assert visual == ANYRES.visual_tokens([ANYRES.layout(*size)], 0, SLOTS)["visual_index"].tolist()


def test_an_image_that_no_pinpoint_fits_is_a_bad_row(tmp_path):
    source = write_file(tmp_path, sized_rows(tmp_path, [(1, 4000)]))
    with pytest.raises(BadRow, match="data.json, row 1.*1 x 4000 pixels is too elongated for every pinpoint.*crop it"):
        next(packed_rows(**settings(source, processor=ANYRES)))


def test_several_images_of_onevision_are_one_tile_each(tmp_path, monkeypatch):
    """Their layouts need no size, so no header is read; and a batch counts images, not tiles."""
    processor = ANYRES.with_mode("anyres_max_2")
    rows = sized_rows(tmp_path, [(40, 20), (20, 60)])
    [alone] = packed_rows(**settings(write_file(tmp_path, [{**rows[0], "images": ["0.png"], "conversations": [
        {"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "It."}]}], "alone.json"),
        processor=processor, epochs=1))
    assert alone["images"] == 1 and (alone["tile_segment_ids"] > 0).sum() == 3
    monkeypatch.setattr("llava_jax.data.examples.image_size", lambda *_: 1 / 0)
    [row] = packed_rows(**settings(write_file(tmp_path, rows), processor=processor, epochs=1))
    assert row["images"] == 2 and (row["tile_segment_ids"] > 0).sum() == 2
    padded = [Image.new("RGB", size, (red, 0, 0)) for red, size in enumerate([(40, 20), (20, 60)])]
    expected = np.concatenate([ImageProcessor(SIZE, "pad")(image) for image in padded])
    np.testing.assert_array_equal(row["tiles"][:2], expected)
    tokens = row["visual_index"][row["tokens"] == IMAGE_TOKEN_ID]
    newline = SLOTS * 4
    assert tokens[:, 0].tolist() == [0, 1, 2, 3, newline, 4, 5, 6, 7, newline]
