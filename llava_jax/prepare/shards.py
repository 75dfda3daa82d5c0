"""Rows as the ArrayRecord shards of a TFDS data set. What the worker processes of `prepare pack` do."""

import contextlib
import dataclasses
import io
import json
import os
from collections import Counter
from typing import Any

from PIL import Image

from llava_jax.data.records import BadRow, Record
from llava_jax.data.sources import Mixture
from llava_jax.data.tfds_rows import example_type
from llava_jax.errors import UserError
from llava_jax.files import read_json
from llava_jax.image_files import MAX_PIXELS, MissingImage, decoding, open_header, open_image, orientation, read_image
from llava_jax.images import prepare

SHOWN = 3  # bad rows of a shard that its note names


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What becomes of images: nothing, or if `size` is given the square of that size that the model sees of them."""

    size: int | None = None
    mode: str = "pad"
    format: str = "jpeg"
    quality: int = 95
    exif: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, content: bytes) -> bytes:
        """The image to store for an encoded image. UserError if it cannot be decoded.

        With a size, it is the tile of `images.prepare`, which preparing once more leaves as it is: PNG changes no
        pixel of what the model sees, JPEG what its quality says. (A smaller image without the padding would change
        more: the model's own padding cannot place it by fractions of a pixel.) An image that is not larger, or that
        would take more bytes, stays as it is. With `exif`, an image that is not upright is always written anew.
        """
        turned = self.exif and self._is_turned(content)
        if self.size is None and not turned:
            _check_image(content, self.max_pixels)
            return content
        image = open_image(content, self.exif, self.max_pixels)
        if self.size is not None and (max if self.mode == "pad" else min)(image.size) > self.size:
            image = Image.fromarray(prepare(image, self.size, self.mode)[0])
        elif not turned:
            return content
        file, options = io.BytesIO(), {"quality": self.quality, "subsampling": 0} if self.format == "jpeg" else {}
        image.save(file, self.format, exif=b"", **options)
        return file.getvalue() if turned else min(content, file.getvalue(), key=len)

    def _is_turned(self, content: bytes) -> bool:
        with decoding(f"image of {len(content)} bytes", content), open_header(content, self.max_pixels) as image:
            return orientation(image) != 1


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of a mixture, numbered through, as serialised tf.train.Examples."""

    mixture: Mixture
    encoding: Encoding

    def __len__(self) -> int:
        return self.mixture.starts[-1]

    def load(self, number: int) -> tuple[bytes, list[int], list[int]]:
        """A row's example, and how many bytes each of its images has as read and as kept. Raises BadRow."""
        source, index = self.mixture.locate(number)
        record = source[index]
        read = [self._read(image, record) for image in record.images]
        kept = [self._encode(content, image, record) for content, image in zip(read, record.images, strict=True)]
        try:
            return _serialise(record, kept), [len(image) for image in read], [len(image) for image in kept]
        except UnicodeEncodeError:
            raise BadRow("malformed", f"{record.source}: holds half of a UTF-16 pair, which is no character") from None

    def _encode(self, content: bytes, image: str | bytes, record: Record) -> bytes:
        try:
            return self.encoding(content)
        except UserError as error:
            name = "" if isinstance(image, bytes) else f"{image}: "
            raise BadRow("broken_image", f"{record.source}: {name}{error}") from None

    def _read(self, image: str | bytes, record: Record) -> bytes:
        try:
            return image if isinstance(image, bytes) else read_image(image, self.encoding.max_pixels)
        except MissingImage as error:
            raise BadRow("missing_image", f"{record.source}: {error}") from None
        except UserError as error:
            raise BadRow("broken_image", f"{record.source}: {error}") from None


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writes shards, and a note on each: what it holds, and what it leaves out. Small when pickled."""

    examples: Examples
    bounds: tuple[int, ...]  # the number of each shard's first row, and the number of rows
    files: tuple[str, ...]  # of each shard
    notes: tuple[str, ...]  # the file of the note on it

    def __call__(self, shard: int) -> dict[str, Any]:
        """Writes a shard without its bad rows, and then the note, which is returned. OSError if that is impossible."""
        from array_record.python.array_record_module import ArrayRecordWriter

        counts, bad, shown = Counter(rows=0, bytes=0, images=0, read=0, kept=0), Counter(), []
        begun = f"{self.notes[shard]}-{os.getpid()}"
        try:
            writer = ArrayRecordWriter(begun, "group_size:1")  # every row by itself, as TFDS has it
            for number in range(self.bounds[shard], self.bounds[shard + 1]):
                try:
                    example, read, kept = self.examples.load(number)
                except BadRow as row:
                    bad[row.reason] += 1
                    shown = [*shown, str(row)][:SHOWN]
                    continue
                writer.write(example)
                counts.update(rows=1, bytes=len(example), images=len(read), read=sum(read), kept=sum(kept))
            writer.close()
            note = {**counts, "size": os.path.getsize(begun), "bad": dict(sorted(bad.items())), "shown": shown}
            replace(begun, self.files[shard])
            write_json(self.notes[shard], note)
            return note
        except RuntimeError as error:  # ArrayRecord's only one
            raise OSError(str(error)) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(begun)

    def finished(self, shard: int) -> dict[str, Any] | None:
        """The note on a shard that has been written before and is still whole; a damaged note is none."""
        try:
            if not os.path.exists(self.notes[shard]):
                return None
            note = read_json(self.notes[shard])
            whole = _is_note(note) and os.path.getsize(self.files[shard]) == note["size"]
        except (UserError, FileNotFoundError):
            return None
        return note if whole else None


def _feature(kind: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **content}


def _dict(features: dict[str, Any]) -> dict[str, Any]:
    return _feature("features_dict.FeaturesDict", featuresDict={"features": features})


def _sequence(feature: dict[str, Any]) -> dict[str, Any]:
    return _feature("sequence_feature.Sequence", sequence={"feature": feature, "length": "-1"})


_text = _feature("text_feature.Text", text={})
_image = _feature("image_feature.Image", image={"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"})

_flag = _feature("scalar.Scalar", tensor={"shape": {}, "dtype": "bool", "encoding": "none"})

# features.json, as TFDS writes it. loss: whether a turn is learned.
FEATURES = _dict({
    "id": _text,
    "images": _sequence(_image),
    "conversations": _sequence(_dict({"from": _text, "value": _text, "loss": _flag})),
})  # fmt: skip


def _serialise(record: Record, images: list[bytes]) -> bytes:
    columns = {
        "id": [record.id.encode()],
        "images": images,
        "conversations/from": [turn["from"].encode() for turn in record.turns],
        "conversations/value": [turn["value"].encode() for turn in record.turns],
    }
    example = example_type()()
    for name, values in columns.items():
        example.features.feature[name].bytes_list.value.extend(values)  # also of nothing: TFDS wants the list
    learned = [int(turn["from"] == "gpt" and turn.get("loss", True)) for turn in record.turns]
    example.features.feature["conversations/loss"].int64_list.value.extend(learned)
    return example.SerializeToString(deterministic=True)


def _is_note(note: dict[str, Any]) -> bool:
    """Whether a note has the fields that `ShardWriter` writes, of their types."""
    bad, shown = note.get("bad"), note.get("shown")
    counts = [note.get(name) for name in ("rows", "bytes", "images", "read", "kept", "size")]
    return (isinstance(bad, dict) and isinstance(shown, list) and all(isinstance(line, str) for line in shown)
            and all(type(count) is int for count in (*counts, *bad.values())))


def _check_image(content: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """UserError if the image cannot be decoded."""
    with decoding(f"image of {len(content)} bytes", content), open_header(content, max_pixels) as image:
        if image.format == "JPEG":
            image.draft("L", (1, 1))  # an eighth as large: all of the file is read, in a third of the time
            image.load()
            return
    open_image(content, max_pixels=max_pixels)


def write_json(path: str, content: Any) -> None:
    """Writes the file whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    replace(f"{path}.part", path)


def replace(begun: str, path: str) -> None:
    """Gives a file its name once it has reached the disk, so that a power cut leaves no part under that name."""
    handle = os.open(begun, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(begun, path)
