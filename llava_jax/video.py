"""Reads video clips on the host: which frames are sampled, known from a file's header, and their pixels.

Only PyAV (pip install 'llava_jax[video]') opens a file, and only formats of FORMATS in regular files on this machine.
"""

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.errors import UserError, user_path
from llava_jax.image_files import MAX_PIXELS, MissingImage, open_image

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
"""Endings of names that are videos where images and videos are named alike. A GIF there is an image."""

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,asf"
"""FFmpeg's formats that are opened. Playlists are not among them, because they name other files and addresses."""

MAX_FRAMES = 250_000
"""Maximum number of frames of a clip: more than two hours at 30 frames a second."""

MAX_SAMPLED = 4096
"""Maximum number of sampled frames of a clip."""

MAX_FRAME_PIXELS = 2**25
"""Maximum number of pixels of a frame (8K). A decoder may keep 16 frames."""

FOLDER_FPS = 2
"""Frames per second of a folder of frames, as the folders of LLaVA's video data have."""


class MissingPyAV(UserError):
    """Raised if PyAV is not installed, which no row can mend."""


@dataclass(frozen=True)
class Video:
    """A clip of a conversation: a video file, or a folder of frames as images, which are ordered by name."""

    path: str


@dataclass(frozen=True)
class VideoSampling:
    """Choice of a clip's frames, as LLaVA-NeXT's scripts choose them."""

    fps: float = 1.0
    """Number of frames that are sampled of each second."""
    frames: int = 32
    """Maximum number of frames of a clip. A clip with more gives this number, spread evenly. 0 is no maximum."""
    uniform: bool = False
    """Whether every clip gives `frames` frames, spread evenly (LLaVA's force_sample)."""
    time_text: bool = False
    """Whether a sentence before the question gives the length of the clip and the times of its frames (LLaVA-Video), in
    conversations about one video and no image."""

    def __post_init__(self):
        if not 0 < self.fps < 1e6:
            raise UserError(f"video.fps is {self.fps}: it must be above 0")
        if not 0 <= self.frames <= MAX_SAMPLED:
            raise UserError(f"video.frames is {self.frames}: it must be from 0 to {MAX_SAMPLED}")
        if self.uniform and not self.frames:
            raise UserError("video.uniform spreads video.frames frames, which is 0")


class SampledFrames(NamedTuple):
    """The frames of a clip that are sampled."""

    indices: tuple[int, ...]
    times: tuple[float, ...]
    """Time of each frame as the original writes it. It is in seconds if `fps` is 1 and the clip's rate is whole."""
    seconds: float
    """Length of the clip."""

    def add_times(self, question: str) -> str:
        """Returns a question about the clip with LLaVA-Video's sentence after the `<image>`, which goes to the front.

        A text without the mark is returned unchanged.
        """
        if "<image>" not in question:
            return question
        times = ",".join(f"{time:.2f}s" for time in self.times)
        return (f"<image>\nThe video lasts for {self.seconds:.2f} seconds, and {len(self.indices)} frames are "
                f"uniformly sampled from it. These frames are located at {times}.Please answer the following questions "
                f"related to this video.\n{question.replace('<image>', '')}")


def as_video(source: Any) -> Any:
    """Returns a `Video` for a path whose name ends as a video's; anything else unchanged."""
    is_path = isinstance(source, str | os.PathLike)
    return Video(os.fspath(source)) if is_path and os.fspath(source).lower().endswith(SUFFIXES) else source


def sample(count: int, rate: float, sampling: VideoSampling) -> SampledFrames:
    """Chooses frames of a clip of `count` frames, `rate` a second, as LLaVA-NeXT's scripts do.

    Frames 0, stride, 2 stride, ... with stride = round(rate / fps). If these are more than `frames`, or with `uniform`,
    linspace(0, count - 1, frames), rounded down.
    """
    stride = max(1, round(rate / sampling.fps))
    indices = range(0, count, stride)
    divisor: float = stride  # the original divides by the stride here, and by the rate below
    if sampling.uniform or 0 < sampling.frames < len(indices):
        indices, divisor = np.linspace(0, count - 1, sampling.frames, dtype=int).tolist(), rate
    return SampledFrames(tuple(indices), tuple(i / divisor for i in indices), count / rate)


def sampled_frames(video: Video, sampling: VideoSampling, max_pixels: int = MAX_PIXELS) -> SampledFrames:
    """Returns the frames of a clip that are sampled. Decodes none: they follow from the file's header or index.

    The packets of a container that does not count its frames (WebM, Matroska) are read and counted.

    Raises MissingImage if there is no such file, and UserError that names it if it cannot be read, or has too many
    frames or pixels. Errors of the machine are raised unchanged.
    """
    if os.path.isdir(video.path):
        count, rate = len(_frame_files(video)), FOLDER_FPS
    else:
        with _open(video, max_pixels) as (container, stream):
            count, rate = _count(container, stream), stream.average_rate or stream.guessed_rate or 0
    if rate <= 0:
        raise UserError(f"{video.path}: the video states no frame rate; convert it to MP4")
    sampled = sample(count, float(rate), sampling)
    if len(sampled.indices) > MAX_SAMPLED:
        raise UserError(f"{video.path}: {len(sampled.indices):,} sampled frames, more than the limit of "
                        f"{MAX_SAMPLED:,}; set video.frames")
    return sampled


def decode_frames(video: Video, indices: tuple[int, ...], max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yields the frames of ascending `indices` (which may repeat) as RGB images, one at a time in memory.

    A frame is rotated as the file's display matrix says, as decord does, which the original uses.

    Raises what `sampled_frames` raises, and UserError if the clip is damaged or has fewer frames than its header says.
    """
    if os.path.isdir(video.path):
        files = _frame_files(video)
        yield from (open_image(files[index], max_pixels=max_pixels) for index in indices)
        return
    with _open(video, max_pixels) as (container, stream):
        wanted, number = iter(indices), -1
        frames, image = container.decode(stream), None
        for index in wanted:
            for frame in itertools.islice(frames, index - number):
                number += 1
                if number == index:
                    image = _upright(frame)
            if number < index:
                raise UserError(f"{video.path}: {number + 1:,} frames of the video can be decoded, its header states "
                                f"{index + 1:,} or more; convert it again")
            yield image


def _frame_files(video: Video) -> list[str]:
    with user_path(video.path):
        files = sorted(entry.path for entry in os.scandir(video.path) if entry.is_file())
    if not 0 < len(files) <= MAX_FRAMES:
        raise UserError(f"{video.path}: a folder of {len(files):,} frames; it must have from 1 to {MAX_FRAMES:,}")
    return files


@contextlib.contextmanager
def _open(video: Video, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Opens a video file. Yields its container and video stream, and turns errors of FFmpeg into UserError."""
    try:
        import av
    except ImportError:
        raise MissingPyAV("videos need PyAV: pip install 'llava_jax[video]'") from None
    path = os.path.abspath(video.path)  # so that it starts with no protocol, such as concat:
    with user_path(video.path):
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingImage(f"{video.path}: no such video file") from None
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        what = "no regular file" if not stat.S_ISREG(status.st_mode) else "empty"
        raise UserError(f"{video.path}: the video cannot be read (it is {what})")
    limit = min(max_pixels, MAX_FRAME_PIXELS)
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        with av.open(path, options=options, metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                what = "no video" if stream is None else "a video of an unknown codec"
                raise UserError(f"{video.path}: the file has {what}")
            if stream.width * stream.height > limit:
                raise UserError(f"{video.path}: a video of {stream.width:,} x {stream.height:,} pixels, more than the "
                                f"limit of {limit:,} (max_pixels)")
            stream.codec_context.options = {"max_pixels": str(limit)}  # later frames may be larger than the first
            yield container, stream
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # FFmpeg reports damage as EIO too; a disk's error would be raised here again
            with open(path, "rb") as file:
                while file.read(2**20):
                    pass
        large = f", or frames of more than {limit:,} pixels" * (error.errno == errno.EINVAL)
        raise UserError(f"{video.path}: the video cannot be read ({error.strerror}{large})") from None


def _count(container: Any, stream: Any) -> int:
    """Returns the number of frames that decoding will give, as far as the file states it."""
    count, name = stream.frames, container.name
    if count == 0:
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        count = sum(1 for _ in itertools.islice(packets, MAX_FRAMES + 1))
    elif MAX_FRAMES >= len(stream.index_entries) >= count:  # MP4: an edit list may hide frames
        count = sum(not entry.is_discard for entry in stream.index_entries)
    if not 0 < count <= MAX_FRAMES:
        raise UserError(f"{name}: a video of {count:,} frames; it must have from 1 to {MAX_FRAMES:,}")
    return count


def _upright(frame: Any) -> Image.Image:
    """Returns a frame as an RGB image, rotated as the display matrix says, in steps of 90 degrees."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)
