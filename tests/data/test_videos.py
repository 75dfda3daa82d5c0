"""Rows with videos: laid out without decoding, decoded as tiles, packed; bad ones named."""

import sys

import clips
import numpy as np
import pytest
from PIL import Image
from pipeline_data import PROCESSOR, TOKENIZER, packed_rows, settings, write_file

from llava_jax.data.records import REASONS, BadRow
from llava_jax.errors import UserError
from llava_jax.images import ImageProcessor
from llava_jax.text.encode import IMAGE_TOKEN_ID, encode_conversation
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.video import Video, VideoSampling, decode_frames

ONEVISION = ImageProcessor(28, "anyres", patches=4, pinpoints=((28, 28), (56, 28), (28, 56)), max_tiles=9,
                           several="pad", mean=(0.5,) * 3, std=(0.5,) * 3)


def row(answer="A ball.", question="<image>\nWhat moves?", **media):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **media}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    clips.write(folder / "a.mp4", 30, 10)
    clips.write(folder / "b.webm", 60, 10, (32, 64), codec="libvpx")
    Image.new("RGB", (40, 30), "red").save(folder / "c.png")
    (folder / "broken.mp4").write_bytes(b"nothing" * 99)
    return folder


def spec(folder, rows, **changes):
    changes = {"sequence_length": 400, "tiles_per_sequence": 8, "processor": ONEVISION} | changes
    return settings(write_file(folder, rows), **changes)


def test_a_batch_has_the_sampled_frames(folder, monkeypatch):
    options = spec(folder, [row(video="a.mp4"), row("Two.", videos=["b.webm"], question="<video>So?")], shuffle=False,
                   epochs=1, video=VideoSampling(frames=4))
    with monkeypatch.context() as patch:  # packing decodes nothing
        patch.setattr("llava_jax.data.examples.decode_frames", None)
        first, second = options["spec"].text(0), options["spec"].text(1)
    assert (first.tokens == IMAGE_TOKEN_ID).sum() == 3 * 4 + 1  # 4 x 4 patches, halved; 3 frames; a newline
    assert (second.tokens == IMAGE_TOKEN_ID).sum() == 4 * 4 + 1
    [packed] = packed_rows(**options)
    indices = {"a.mp4": (0, 10, 20), "b.webm": (0, 19, 39, 59)}
    expected = [np.asarray(frame.resize((28, 28), Image.Resampling.BICUBIC)) for name, chosen in indices.items()
                for frame in decode_frames(Video(str(folder / name)), chosen)]
    order = [0, 1] if packed["tile_segment_ids"].tolist().count(1) == 3 else [1, 0]
    expected = [expected[:3], expected[3:]]
    np.testing.assert_array_equal(packed["tiles"][:7], [*expected[order[0]], *expected[order[1]]])
    assert packed["visual_index"].shape == (400, 4) and (packed["visual_index"] >= 0).any(1).sum() == 13 + 17


def test_without_pooling_a_frame_is_an_image(folder):
    options = spec(folder, [row(video="a.mp4")], processor=PROCESSOR)
    text = options["spec"].text(0)
    assert (text.tokens == IMAGE_TOKEN_ID).sum() == 3 * PROCESSOR.features_per_tile
    assert options["spec"].tiles(0).shape == (3, 14, 14, 3)


def test_images_beside_a_video(folder):
    rows = [row(image="c.png", video="a.mp4", question="<image>\n<video>\nSame?"),
            row(image=["c.png", "c.png"], video="a.mp4", question="<video><image><image>")]
    made = spec(folder, rows, tiles_per_sequence=20)["spec"]
    one = ONEVISION(Image.open(folder / "c.png"))
    np.testing.assert_array_equal(made.tiles(0)[: len(one)], one)  # one image keeps its mode
    assert len(made.tiles(0)) == len(one) + 3 and len(made.tiles(1)) == 3 + 2  # two are padded to a tile each
    for number, example in enumerate(map(made.text, range(2))):
        assert example.tiles == len(made.tiles(number))


def test_the_sentence_about_times_is_in_the_first_turn(folder):
    rows = [row(video="a.mp4"), row(image="c.png", video="a.mp4", question="<image>\n<video>\nSame?")]
    made = spec(folder, rows, video=VideoSampling(frames=2, uniform=True, time_text=True))["spec"]
    text = ("<image>\nThe video lasts for 3.00 seconds, and 2 frames are uniformly sampled from it. These frames are "
            "located at 0.00s,2.90s.Please answer the following questions related to this video.\n\nWhat moves?")
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A ball."}]
    expected = encode_conversation(turns, "vicuna_v1", Tokenizer.load(TOKENIZER), [2 * 4 + 1])
    np.testing.assert_array_equal(made.text(0).tokens, expected.tokens)
    np.testing.assert_array_equal(made.text(0).labels, expected.labels)
    assert len(made.text(1).tokens) < len(expected.tokens) + 60  # beside an image there is none


def test_bad_videos_are_named_or_counted(folder):
    clips.write(folder / "short.mp4", 12, 10)
    rows = [row(video="a.mp4"), row(video="none.mp4"), row(video="broken.mp4"), row(video="../a.mp4"),
            row(video="a.mp4", question="What?"), row(video="b.webm")]
    options = spec(folder, rows, tiles_per_sequence=5, shuffle=False, epochs=1)
    for number, reason, says in [(1, "missing_image", "none.mp4: no such video file"),
                                 (2, "broken_image", "broken.mp4"), (3, "outside_root", "../a.mp4"),
                                 (4, "image_count", "1 videos, but 0 times"), (5, "too_long", "6 tiles")]:
        with pytest.raises(BadRow) as raised:
            options["spec"].text(number)
        message = str(raised.value)
        assert raised.value.reason == reason and says in message and f"row {number + 1}" in message
        assert "\n" not in message
    skipping = spec(folder, rows, tiles_per_sequence=5, shuffle=False, epochs=1, bad_rows="skip")
    [packed] = packed_rows(**skipping)
    counts = dict(zip(REASONS, packed["skipped"].tolist(), strict=True))
    assert {name for name, count in counts.items() if count} == {
        "missing_image", "broken_image", "outside_root", "image_count", "too_long"}


def test_without_pyav_no_video_is_skipped(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    options = spec(folder, [row(), row(video="a.mp4")], bad_rows="skip", epochs=1)
    with pytest.raises(UserError, match="videos need PyAV") as raised:
        list(packed_rows(**options))
    assert not isinstance(raised.value, BadRow)


def test_a_clip_that_ends_early_is_bad_when_it_is_decoded(folder, monkeypatch):
    made = spec(folder, [row(video="a.mp4")], video=VideoSampling(fps=10, frames=0), tiles_per_sequence=99)["spec"]
    monkeypatch.setattr("llava_jax.video._count", lambda *_: 40)  # its header lies
    with pytest.raises(BadRow, match="30 frames of the video can be decoded, its header states") as raised:
        made.tiles(0)
    assert raised.value.reason == "broken_image"
