"""Videos: sampled frames against a second implementation, pixels against PyAV, and files that must be refused."""

import errno
import os
import sys
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_jax.errors import UserError
from llava_jax.image_files import MissingImage
from llava_jax.video import Video, VideoSampling, as_video, decode_frames, sample, sampled_frames

KINDS = [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.webm", "libvpx"), ("a.mkv", "mpeg4"), ("a.gif", "gif")]


def expected(count, rate, fps, upbound, force):
    """Frames and times as LLaVA-NeXT's description has them, frame by frame."""
    stride = max(1, round(rate / fps))
    chosen = [i for i in range(count) if i % stride == 0]
    if not (upbound and (len(chosen) > upbound or force)):
        return chosen, [i / stride for i in chosen]
    step = (count - 1) / (upbound - 1) if upbound > 1 else 0
    chosen = [int(np.float64(step) * i) if i < upbound - 1 or upbound == 1 else count - 1 for i in range(upbound)]
    return chosen, [i / rate for i in chosen]


@given(st.integers(1, 4000), st.sampled_from([1.0, 10.0, 12.5, 23.976, 25.0, 30.0]), st.sampled_from([0.5, 1.0, 2.0]),
       st.sampled_from([0, 1, 8, 32, 64]), st.booleans())
def test_sampled_frames(count, rate, fps, upbound, force):
    force = force and upbound > 0
    sampled = sample(count, rate, VideoSampling(fps, upbound, force))
    indices, times = expected(count, rate, fps, upbound, force)
    assert list(sampled.indices) == indices and sampled.times == pytest.approx(times)
    assert sampled.seconds == pytest.approx(count / rate)


@pytest.mark.parametrize("name, codec", KINDS)
def test_frames_are_known_before_decoding_and_decoded_as_pyav_does(tmp_path, monkeypatch, name, codec):
    video = Video(clips.write(tmp_path / name, codec=codec))
    with av.open(video.path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", None)  # nothing is decoded
        sampled = sampled_frames(video, VideoSampling(fps=2, frames=7))
    assert sampled.indices == tuple(np.linspace(0, 49, 7).astype(int)) and sampled.seconds == 5
    read = [np.asarray(image) for image in decode_frames(video, sampled.indices)]
    np.testing.assert_array_equal(read, [decoded[i] for i in sampled.indices])
    repeated = [np.asarray(image) for image in decode_frames(video, (3, 3, 9))]
    np.testing.assert_array_equal(repeated, [decoded[i] for i in (3, 3, 9)])


@pytest.mark.parametrize("degrees, turns", [(90, 1), (180, 2), (-90, 3)])
def test_a_rotated_video_is_upright(tmp_path, degrees, turns):
    video = Video(clips.write(tmp_path / "a.mp4", 2, rotation=degrees))
    plain = Video(clips.write(tmp_path / "b.mp4", 2))
    [turned], [frame] = decode_frames(video, (1,)), decode_frames(plain, (1,))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(frame), turns))


def test_a_folder_of_frames(tmp_path):
    images = clips.frames(9)
    for number, frame in enumerate(images):
        Image.fromarray(frame).save(tmp_path / f"{number:03}.png")
    sampled = sampled_frames(Video(str(tmp_path)), VideoSampling())
    assert sampled.indices == (0, 2, 4, 6, 8) and sampled.seconds == 4.5
    read = [np.asarray(image) for image in decode_frames(Video(str(tmp_path)), sampled.indices)]
    np.testing.assert_array_equal(read, images[::2])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="a folder of 0 frames"):
        sampled_frames(Video(str(empty)), VideoSampling())


def test_the_sentence_about_times():
    sampled = sample(100, 10, VideoSampling(frames=3, uniform=True, time_text=True))
    assert sampled.add_times("Why?") == "Why?"
    assert sampled.add_times("<image>\nWhy?") == (
        "<image>\nThe video lasts for 10.00 seconds, and 3 frames are uniformly sampled from it. These frames are "
        "located at 0.00s,4.90s,9.90s.Please answer the following questions related to this video.\n\nWhy?")


def refused(video, *says, kind=UserError, **limits):
    with pytest.raises(kind) as raised:
        list(decode_frames(video, sampled_frames(video, VideoSampling(fps=100), **limits).indices, **limits))
    message = str(raised.value)
    assert video.path in message and "\n" not in message and all(part in message for part in says), message


def test_files_that_cannot_be_read(tmp_path):
    whole = clips.write(tmp_path / "a.mp4")
    content = open(whole, "rb").read()
    refused(Video(str(tmp_path / "none.mp4")), "no such video file", kind=MissingImage)
    files = {"empty.mp4": b"", "text.mp4": b"hello" * 99, "page.mp4": b"<!doctype html>" * 9, "cut.mp4": content[:2000],
             "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:5,\n{whole}\n#EXT-X-ENDLIST\n".encode(),
             "concat.mp4": f"ffconcat version 1.0\nfile '{whole}'\n".encode(), "image.mp4": b"\xff\xd8\xff" * 100}
    for name, found in files.items():
        (tmp_path / name).write_bytes(found)
        refused(Video(str(tmp_path / name)), "the video cannot be read")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(Video(str(tmp_path / "pipe.mp4")), "no regular file")
    refused(Video(whole), "64 x 48 pixels, more than the limit of 1,000", max_pixels=1000)


def test_frames_that_grow_beyond_the_limit(tmp_path):
    paths = [clips.write(tmp_path / "small.ts", 4, codec="libx264"),
             clips.write(tmp_path / "large.ts", 4, size=(256, 192), codec="libx264")]
    (tmp_path / "grows.ts").write_bytes(b"".join(Path(path).read_bytes() for path in paths))
    video = Video(str(tmp_path / "grows.ts"))  # its header states 64 x 48
    assert len(list(decode_frames(video, tuple(range(8))))) == 8
    refused(video, "the video cannot be read", max_pixels=10_000)
    with pytest.raises(UserError, match="no file can have this name"):
        sampled_frames(Video("a\0.mp4"), VideoSampling())


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_damage_is_decoded_or_named(tmp_path, name, codec):
    """9,000 such files of eight kinds, by hand, gave nothing else and took 62 MB."""
    content, rng = Path(clips.write(tmp_path / name, 8, codec=codec)).read_bytes(), np.random.default_rng(0)
    video, named = Video(str(tmp_path / name)), 0
    for _ in range(40):
        damaged = bytearray(content)
        cut, put = ((4, 4), (2, 2), (0, 5), (5, 0))[rng.integers(4)]
        for at in rng.integers(0, len(content) if rng.integers(2) else 800, 2).tolist():
            damaged[at : at + cut] = rng.bytes(put)
        Path(video.path).write_bytes(damaged)
        try:
            sampled = sampled_frames(video, VideoSampling(fps=100))
            assert len(list(decode_frames(video, sampled.indices))) == len(sampled.indices)
        except UserError as error:
            named += 1
            assert str(error).startswith(video.path) and "\n" not in str(error)
    assert 0 < named < 40


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    """FFmpeg reports both as EIO."""
    path = clips.write(tmp_path / "a.mp4", 2)
    fault = OSError(errno.EIO, "Input/output error", path)

    def fail(*_, **__):
        raise av.error.OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr("av.open", fail)
    refused(Video(path), "the video cannot be read (Input/output error)")

    def broken(*_):
        raise fault

    monkeypatch.setattr("llava_jax.video.open", broken, raising=False)
    with pytest.raises(OSError) as raised:
        sampled_frames(Video(path), VideoSampling())
    assert raised.value is fault


def test_a_sound_file_has_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    refused(Video(str(tmp_path / "a.mp4")), "the file has no video")


def test_a_header_that_tells_of_more_frames_is_named(tmp_path):
    """The sample table of an MP4 with its last samples pointing past the end."""
    path = tmp_path / "a.mp4"
    clips.write(path)
    content = path.read_bytes()
    start = content.index(b"mdat") - 4
    size = int.from_bytes(content[start : start + 4], "big")
    if content.index(b"moov") > start:  # the samples come first: blank those of the second half
        middle = start + 8 + size // 2
        path.write_bytes(content[:middle] + bytes(start + size - middle) + content[start + size :])
    with pytest.raises(UserError, match="of the video can be decoded, its header states|the video cannot be read"):
        list(decode_frames(Video(str(path)), sampled_frames(Video(str(path)), VideoSampling(fps=100)).indices))


def test_limits(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.webm", codec="libvpx")
    monkeypatch.setattr("llava_jax.video.MAX_FRAMES", 40)
    refused(Video(path), "a video of 41 frames; it must have from 1 to 40")
    monkeypatch.setattr("llava_jax.video.MAX_FRAMES", 50)
    monkeypatch.setattr("llava_jax.video.MAX_SAMPLED", 30)
    with pytest.raises(UserError, match="a.webm: 50 sampled frames, more than the limit of 30; set"):
        sampled_frames(Video(path), VideoSampling(fps=100, frames=0))


@pytest.mark.parametrize("settings, says", [({"fps": 0}, "video.fps is 0"), ({"frames": -1}, "video.frames is -1"),
                                            ({"frames": 0, "uniform": True}, "video.uniform spreads")])
def test_settings(settings, says):
    with pytest.raises(UserError, match=says):
        VideoSampling(**settings)


def test_names_of_videos():
    assert as_video("a/b.MP4") == Video("a/b.MP4") and as_video("a.gif") == "a.gif"
    assert as_video(b"mp4") == b"mp4" and as_video(Video("x")) == Video("x")


def test_without_pyav(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"videos need PyAV: pip install 'llava_jax\[video\]'"):
        sampled_frames(Video(path), VideoSampling())
