"""Describes an image to a text-only teacher: captions, and boxes as `category: [x1, y1, x2, y2]`.

A language model without vision sees an image through these alone (Visual Instruction Tuning, section 3).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llava_jax.annotations.boxes import Annotations, Box, add_note, select_boxes
from llava_jax.annotations.readers import read_coco, read_rows
from llava_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Captions and boxes of one image.

    Attributes:
      id, image: Id and image file name of the record.
      captions: Captions without line breaks.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def captions_text(self) -> str:
        """The captions, one a line."""
        return "\n".join(self.captions)

    @property
    def text(self) -> str:
        """The captions, a blank line, and the boxes, one a line. Without boxes the captions alone."""
        if not self.boxes:
            return self.captions_text
        return "\n".join([self.captions_text, "", *(box.line() for box in self.boxes)])


@dataclasses.dataclass(frozen=True)
class AnnotationSource:
    """Files with captions and boxes (COCO's, or other data), and rules for the boxes to use."""

    captions: str = ""
    """COCO's captions_*.json, of 2014 or 2017."""
    instances: str = ""
    """COCO's instances_*.json of the same split. Conversations alone need no boxes."""
    data: str = ""
    """Data instead of COCO's files: JSON lines of {"image", "captions", "boxes", "width", "height"}, one per image, or
    a TFDS data set in ArrayRecord with the features of coco_captions, as FOLDER or FOLDER:SPLIT."""
    names: Literal["short", "file"] = "short"
    """Names of images: short changes COCO_train2014_000000033471.jpg to 000000033471.jpg, file keeps it."""
    prefix: str = ""
    """Prefix of the names of images, such as coco/train2017/."""
    min_box_area: float = 0.0
    """Minimum area of a box, as a fraction of the image."""
    max_boxes: int | None = None
    """Maximum number of boxes of an image. The largest ones are used."""
    min_boxes: int = 0
    """Minimum number of boxes of an image. Images with fewer are skipped."""
    crowd: Literal["keep", "drop"] = "keep"
    """Treatment of COCO's regions of many uncounted objects: keep, marked "(crowd)", or drop."""

    def __post_init__(self):
        if not 0 <= self.min_box_area < 1:
            raise UserError(f"min_box_area is {self.min_box_area:g}; it is a fraction of the image, from 0 to below 1")
        if self.max_boxes is not None and self.max_boxes < max(1, self.min_boxes):
            raise UserError(f"max_boxes is {self.max_boxes}; it must be at least 1 and not below min_boxes")
        if self.min_boxes < 0:
            raise UserError(f"min_boxes is {self.min_boxes}; it cannot be negative")
        if bool(self.data) == bool(self.captions or self.instances):
            raise UserError("name either COCO files (captions, instances) or data, a JSON lines file or TFDS folder")
        if not self.data and not self.captions:
            raise UserError(f"{self.instances}: boxes without captions; name the captions file of the same split too")


class Contexts(Sequence):
    """The images of a source, sorted by id (numbers by value). Each Context is made on access.

    Attributes:
      categories: Names that boxes can have.
      has_boxes: Whether the source gives boxes at all.
      notes: Counts of what was skipped or changed, by description.
      files: Paths of the files that were read.
    """

    def __init__(self, found: Annotations, source: AnnotationSource):
        self.categories, self.files = tuple(found.categories), tuple(found.files)
        self.has_boxes, self.notes = found.has_boxes, +found.notes  # + drops zero counts
        self._found, self._prefix = found, source.prefix
        self._boxes = select_boxes(found, self.notes, source.min_box_area, source.max_boxes, source.crowd == "keep")
        self._starts = np.searchsorted(self._boxes.image, np.arange(len(found.ids) + 1))
        counts = np.diff(self._starts)
        kept = counts >= source.min_boxes
        add_note(self.notes, f"images with fewer than {source.min_boxes} boxes skipped", (~kept).sum())
        if self.has_boxes:
            add_note(self.notes, "images without boxes", (kept & (counts == 0)).sum())
        self._order = sorted(np.flatnonzero(kept).tolist(), key=lambda image: _sort_key(found.ids[image]))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, found = self._order[index], self._found
        own = self._boxes[slice(*self._starts[image : image + 2])]
        boxes = zip(own.category.tolist(), own.corners.tolist(), own.crowd.tolist(), strict=True)
        return Context(
            found.ids[image],
            self._prefix + found.names[image],
            found.captions[image],
            tuple(Box(self.categories[category], *corners, crowd) for category, corners, crowd in boxes),
        )

    def where(self, index: int) -> str:
        """Returns file and row of an image, for messages."""
        return self._found.where(self._order[index])


def open_contexts(source: AnnotationSource) -> Contexts:
    """Reads captions and boxes of all images. Large COCO files are streamed, which needs little memory.

    Faults that data sets are known for are repaired, or their images skipped, and counted in `notes`. Raises UserError,
    one line, if a file is missing, empty or of another kind; if captions or boxes are of images that the file does not
    list; if the files are of different splits; for unknown categories; and if no image remains.
    """
    if source.data:
        found = read_rows(source.data, source.names)
    else:
        found = read_coco(source.captions, source.instances, source.names)
    if not found.ids:
        raise UserError(f"{found.files[0]}: no image has a caption")
    contexts = Contexts(found, source)
    if not contexts:
        kinds = "" if found.has_boxes else ", for the source gives none"
        raise UserError(f"{found.files[0]}: no image has {source.min_boxes} boxes{kinds}; lower min_boxes")
    return contexts


def _sort_key(name: str) -> tuple:
    return (0, int(name), name) if name.isdecimal() and len(name) < 20 else (1, 0, name)
