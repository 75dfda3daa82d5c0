"""Turns a record's number into its tokens and tiles, in worker processes. Imports neither Grain nor JAX."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from llava_jax.data.records import BadRow, Record
from llava_jax.data.sources import Mixture
from llava_jax.errors import UserError
from llava_jax.image_files import MAX_PIXELS, MissingImage, image_size, open_image
from llava_jax.images import ImageProcessor, Layout, Media
from llava_jax.text.encode import ImageCount, NoSupervisedTokens, TooLong, encode_conversation
from llava_jax.text.templates import Template
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.video import MissingPyAV, Video, VideoSampling, decode_frames, sampled_frames


class EncodedRecord(NamedTuple):
    """A record's conversation as tokens and labels (`Example`), and its images.

    `media` has the sizes of images and the numbers of frames of videos. `ImageProcessor.layouts` computes the layouts
    again where a batch is built, because a window of layouts with weights would take gigabytes.
    """

    tokens: Int32[np.ndarray, "T"]
    labels: Int32[np.ndarray, "T"]
    media: tuple[Media, ...]
    tiles: int  # number of tiles of all images


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The records, and all settings by which they become tokens and tiles. Can be pickled.

    A record that cannot be used raises BadRow, with one line that names file and row.
    """

    mixture: Mixture
    tokenizer: Tokenizer
    template: Template
    processor: ImageProcessor
    sequence_length: int
    """Number of tokens of a packed sequence."""
    tiles_per_sequence: int
    """Number of tiles of a packed sequence."""
    context: int | None = None
    """Largest number of tokens of a conversation, if the model's context is shorter than a sequence."""
    exif: bool = False
    """Whether images are rotated as their EXIF orientation says."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image or a frame."""
    video: VideoSampling = VideoSampling()
    """Frames that are sampled of a video."""
    bad_rows: Literal["error", "skip"] = "error"
    """Whether a record that cannot be used is an error, or is left out and counted."""

    def __call__(self, what: Literal["lengths", "texts", "tiles", "examples"], numbers: Sequence[int]) -> list:
        """Returns `length`, `text`, `tiles` or `example` of records; the reason of a bad one if they are skipped."""
        load = {"lengths": self.length, "texts": self.text, "tiles": self.tiles, "examples": self.example}[what]
        results = []
        for number in numbers:
            try:
                results.append(load(number))
            except BadRow as bad:
                if self.bad_rows == "error":
                    raise
                results.append(bad.reason)
        return results

    def text(self, number: int) -> EncodedRecord:
        """Encodes the conversation of a record. Opens no image, but reads their sizes where the layout needs them."""
        return self._encode(self._record(number))

    def tiles(self, number: int) -> UInt8[np.ndarray, "tiles size size 3"]:
        """Decodes the images of a record and returns their tiles."""
        return self._decode(self._record(number))

    def length(self, number: int) -> tuple[int, int]:
        """Returns the numbers of tokens and tiles of a record."""
        text = self.text(number)
        return len(text.tokens), text.tiles

    def example(self, number: int) -> tuple[EncodedRecord, UInt8[np.ndarray, "tiles size size 3"]]:
        """Returns `text` and `tiles` of a record, which is read once."""
        record = self._record(number)
        return self._encode(record), self._decode(record)

    def lay_out(self, number: int) -> tuple[Record, tuple[Media, ...], list[Layout]]:
        """Returns a record as the model gets it, with its images and videos laid out (`lay_out`)."""
        return self._lay_out(self._record(number))

    def _record(self, number: int) -> Record:
        source, index = self.mixture.locate(number)
        return source[index]

    def _lay_out(self, record: Record) -> tuple[Record, tuple[Media, ...], list[Layout]]:
        return lay_out(record, self.processor, self.exif, self.max_pixels, self.video)

    def _encode(self, record: Record) -> EncodedRecord:
        record, media, layouts = self._lay_out(record)
        tiles = sum(layout.tiles for layout in layouts)
        if tiles > self.tiles_per_sequence:
            message = f"{tiles} tiles do not fit into the {self.tiles_per_sequence} of a sequence"
            raise BadRow("too_long", f"{record.source}: {message}; raise data.tiles_per_sequence")
        max_length, limit = min((self.sequence_length, "data.sequence_length"),
                                (self.context or math.inf, "the model's context"))
        try:
            counts = [len(layout.index) for layout in layouts]
            example = encode_conversation(record.turns, self.template, self.tokenizer, counts, max_length=max_length)
        except NoSupervisedTokens as error:
            raise BadRow("no_supervised_tokens", f"{record.source}: {error}") from None
        except TooLong as error:
            raise BadRow("too_long", f"{record.source}: {error} ({limit})") from None
        except ImageCount as error:  # an <image> is in a turn that is left out
            raise BadRow("image_count", f"{record.source}: {error}") from None
        except UserError as error:
            raise BadRow("malformed", f"{record.source}: {error}") from None
        return EncodedRecord(*example, media, tiles)

    def _decode(self, record: Record) -> UInt8[np.ndarray, "tiles size size 3"]:
        tiles = [self.processor.tiles(())]
        processor = self.processor.for_images(sum(not isinstance(image, Video) for image in record.images))
        for image, size in zip(record.images, _stored_sizes(record, processor, self.exif), strict=True):
            with _named(record):
                if isinstance(image, Video):  # frame by frame, because a tile is smaller
                    sampled = sampled_frames(image, self.video, self.max_pixels)
                    frames = decode_frames(image, sampled.indices, self.max_pixels)
                    tiles += [self.processor.tiles([[frame]]) for frame in frames]
                    continue
                opened = open_image(image, self.exif, self.max_pixels)
                if size not in (None, opened.size):  # its layout would be another
                    raise UserError(f"the image's size is {opened.size}, but image_widths and image_heights say {size}")
                tiles.append(processor.tiles([opened]))
        return np.concatenate(tiles)


def lay_out(record: Record, processor: ImageProcessor, exif: bool, max_pixels: int, video: VideoSampling
            ) -> tuple[Record, tuple[Media, ...], list[Layout]]:
    """Returns a record, with the sentence about its clip if `video.time_text`, and its images and videos laid out.

    The second value has the sizes of images and the numbers of frames, as `ImageProcessor.layouts` expects them, the
    third the layouts. Decodes nothing: reads the headers of videos, and those of images where the layout needs a size;
    other sizes are (1, 1). Raises BadRow, also for an image that has no layout.
    """
    media, num_images = [], sum(not isinstance(image, Video) for image in record.images)
    is_fixed = processor.for_images(num_images).is_fixed
    with _named(record):
        for image, size in zip(record.images, _stored_sizes(record, processor, exif), strict=True):
            if isinstance(image, Video):
                sampled = sampled_frames(image, video, max_pixels)
                media.append(len(sampled.indices))
                if video.time_text and len(record.images) == 1:
                    turns = tuple(turn | {"value": sampled.add_times(turn["value"])} for turn in record.turns)
                    record = dataclasses.replace(record, turns=turns)
            else:
                media.append((1, 1) if is_fixed else size or image_size(image, exif, max_pixels))
        return record, tuple(media), processor.layouts(media)


def _stored_sizes(record: Record, processor: ImageProcessor, exif: bool) -> Sequence[tuple[int, int] | None]:
    # Stored sizes are those before a rotation, so `exif` needs the header.
    usable = record.image_sizes and not exif and not processor.is_fixed
    return record.image_sizes if usable else [None] * len(record.images)


@contextlib.contextmanager
def _named(record: Record) -> Iterator[None]:
    """Turns an image's UserError into a BadRow that names the record."""
    try:
        yield
    except MissingPyAV:  # not to be skipped with every video
        raise
    except MissingImage as error:
        raise BadRow("missing_image", f"{record.source}: {error}") from None
    except UserError as error:
        raise BadRow("broken_image", f"{record.source}: {error}") from None
