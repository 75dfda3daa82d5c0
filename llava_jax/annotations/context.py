"""What the teacher is told about an image: captions, and boxes as `category: [x1, y1, x2, y2]`.

A text-only language model sees an image through these alone (Visual Instruction Tuning, section 3).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from llava_jax.errors import UserError

DIGITS = 3  # decimals of a box as the teacher reads it
BEYOND, FAR = 0.05, 0.5  # of the image: how far a box reaches beyond its edge that looks wrong, and that is wrong
MANY = 0.3  # of a source's boxes; if more look wrong in the same way, they have another format


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """An object's place: x1 < x2 and y1 < y2 in fractions of the image from its upper left corner, not rounded.

    A crowd is a region that holds several objects of the category, uncounted.
    """

    category: str
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False

    def line(self) -> str:
        """`person: [0.63, 0.1, 1.0, 0.532]`; of a crowd, `person (crowd): [...]`."""
        places = ", ".join(str(round(float(place), DIGITS)) for place in (self.x1, self.y1, self.x2, self.y2))
        return f"{self.category}{' (crowd)' * self.crowd}: [{places}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """An image as the teacher sees it. `id` and `image` (a file's name) are those of the record to be made; captions
    are one line each."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def captions_text(self) -> str:
        """One caption a line."""
        return "\n".join(self.captions)

    @property
    def text(self) -> str:
        """The captions, a blank line, and one box a line in their order; without boxes the captions alone."""
        if not self.boxes:
            return self.captions_text
        return "\n".join([self.captions_text, "", *(box.line() for box in self.boxes)])


@dataclasses.dataclass(frozen=True)
class AnnotationSource:
    """Where captions and boxes come from: COCO files, or other data; and which boxes the teacher is told."""

    # COCO's captions_*.json, of 2014 or 2017
    captions: str = ""
    # COCO's instances_*.json of the same split; conversations alone can do without boxes
    instances: str = ""
    # Instead of these two: a file of JSON lines, one {"image", "captions", "boxes", "width", "height"} per image; or a
    # TFDS data set in ArrayRecord with the features of coco_captions, as FOLDER or FOLDER:SPLIT
    data: str = ""
    # Names of images: "short" makes COCO_train2014_000000033471.jpg 000000033471.jpg, "file" leaves them
    names: Literal["short", "file"] = "short"
    # Put before the names of images, such as coco/train2017/
    prefix: str = ""
    # Leave out boxes of less than this fraction of the image
    min_box_area: float = 0.0
    # Of more boxes than this, take the largest
    max_boxes: int | None = None
    # Skip images with fewer boxes than this
    min_boxes: int = 0
    # Regions that hold many objects uncounted, as COCO has them: keep, marked "(crowd)", or drop
    crowd: Literal["keep", "drop"] = "keep"

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
    """The images of a source in the order of their ids (numbers by value); each Context is made when asked for.

    categories: the names that boxes can have. boxed: whether the source gives boxes at all. notes: what was left out
    or changed, counted. files: the paths that were read.
    """

    def __init__(self, gathered: "Gathered", source: AnnotationSource):
        self.categories, self.files = tuple(gathered.categories), tuple(gathered.files)
        self.boxed, self.notes = gathered.boxed, +gathered.notes  # + leaves out what is 0
        self._gathered, self._prefix = gathered, source.prefix
        self._boxes = _select(gathered, source, self.notes)
        self._starts = np.searchsorted(self._boxes.image, np.arange(len(gathered.ids) + 1))
        counts = np.diff(self._starts)
        kept = counts >= source.min_boxes
        _note(self.notes, f"images with fewer than {source.min_boxes} boxes skipped", (~kept).sum())
        if self.boxed:
            _note(self.notes, "images without boxes", (kept & (counts == 0)).sum())
        self._order = sorted(np.flatnonzero(kept).tolist(), key=lambda image: _order(gathered.ids[image]))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, known = self._order[index], self._gathered
        own = self._boxes[slice(*self._starts[image : image + 2])]
        boxes = zip(own.category.tolist(), own.place.tolist(), own.crowd.tolist(), strict=True)
        return Context(
            known.ids[image],
            self._prefix + known.names[image],
            known.captions[image],
            tuple(Box(self.categories[category], *place, crowd) for category, place, crowd in boxes),
        )

    def where(self, index: int) -> str:
        """File and place of an image, for messages."""
        return self._gathered.where(self._order[index])


def open_contexts(source: AnnotationSource) -> Contexts:
    """Reads the captions and boxes of all images; big COCO files as streams, which needs little memory.

    Raises UserError, one line, for a file that is missing, empty or of another kind; captions or
    boxes of images that the file does not list; files of different splits; unknown categories; and where no image is
    left. Single faults that data sets are known for are mended, or their images skipped, and counted in `notes`.
    """
    from llava_jax.annotations import context_files

    if source.data:
        gathered = context_files.read_data(source.data, source.names)
    else:
        gathered = context_files.read_coco(source.captions, source.instances, source.names)
    if not gathered.ids:
        raise UserError(f"{gathered.files[0]}: no image has a caption")
    contexts = Contexts(gathered, source)
    if not contexts:
        kinds = "" if gathered.boxed else ", for the source gives none"
        raise UserError(f"{gathered.files[0]}: no image has {source.min_boxes} boxes{kinds}; lower min_boxes")
    return contexts


@dataclasses.dataclass
class Boxes:
    """Boxes of many images."""

    image: np.ndarray  # int64 [boxes]: number of the image
    category: np.ndarray  # int64 [boxes]
    place: np.ndarray  # float64 [boxes, 4]: x1, y1, x2, y2 in fractions
    crowd: np.ndarray  # bool [boxes]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Boxes":
        return Boxes(self.image[chosen], self.category[chosen], self.place[chosen], self.crowd[chosen])


@dataclasses.dataclass
class Gathered:
    """What a reader found: the images that have captions, in any order, and their boxes as annotated."""

    files: list[str]
    boxed: bool
    ids: list[str]
    names: list[str]
    captions: list[tuple[str, ...]]
    categories: list[str]
    boxes: Boxes
    notes: Counter[str]
    where: Callable[[int], str]  # of an image's number
    where_boxes: Callable[[int], str]
    format: str = "[x, y, width, height] in pixels"  # of the boxes in the file


def _select(gathered: Gathered, source: AnnotationSource, notes: Counter[str]) -> Boxes:
    """The boxes that the teacher is told, image by image and within an image as annotated.

    Raises UserError that names file and image if more than MANY of the boxes cannot be meant.
    """
    boxes = gathered.boxes

    def drop(dropped: np.ndarray, why: str) -> Boxes:
        _note(notes, f"boxes dropped: {why}", dropped.sum())
        return boxes[~dropped]

    def refuse_many(wrong: np.ndarray, what: str) -> None:
        if wrong.sum() > MANY * len(boxes):
            first = int(np.argmax(wrong))
            where = gathered.where_boxes(int(boxes.image[first]))
            raise UserError(f"{where}: {gathered.categories[boxes.category[first]]} has a box {what}, as have "
                            f"{wrong.sum():,} of the source's {len(boxes):,}; boxes must be {gathered.format}")

    boxes = boxes[np.argsort(boxes.image, kind="stable")]
    beyond = np.maximum(-boxes.place[:, :2], boxes.place[:, 2:] - 1).max(1, initial=-1)
    refuse_many((boxes.place[:, 2:] < boxes.place[:, :2]).any(1), "of negative size, or with its corners swapped")
    refuse_many(beyond > BEYOND, "beyond the image's edge")
    boxes = drop(beyond > FAR, "far outside the image")
    clipped = np.clip(boxes.place, 0, 1)
    seen = np.abs(clipped - boxes.place).max(1, initial=0) >= 0.5 * 10.0**-DIGITS  # what a teacher can see
    _note(notes, "boxes clipped at the image's edge", seen.sum())
    boxes.place = clipped
    boxes = drop((clipped[:, 2:] <= clipped[:, :2]).any(1), "of zero size or outside the image")
    boxes = drop(_repeated(boxes), "given twice")
    if source.crowd == "drop":
        boxes = drop(boxes.crowd, "crowds")
    if source.min_box_area:
        boxes = drop(_areas(boxes) < source.min_box_area, "too small")
    if source.max_boxes is not None:
        by_area = np.lexsort((-_areas(boxes), boxes.image))  # image by image, the largest first, stable
        rank = np.empty(len(boxes), np.int64)
        rank[by_area] = np.arange(len(boxes)) - np.searchsorted(boxes.image, boxes.image)
        boxes = drop(rank >= source.max_boxes, f"more than {source.max_boxes} in an image")
    return boxes


def _areas(boxes: Boxes) -> np.ndarray:
    return (boxes.place[:, 2:] - boxes.place[:, :2]).prod(1)


def _repeated(boxes: Boxes) -> np.ndarray:
    """Whether an earlier box of the same image is the same."""
    columns = (*boxes.place.T, boxes.crowd, boxes.category, boxes.image)
    order = np.lexsort(columns)  # stable: of the same ones, the first stays first
    same = np.ones(max(0, len(boxes) - 1), bool)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    repeated = np.zeros(len(boxes), bool)
    repeated[order[1:][same]] = True
    return repeated


def _order(name: str) -> tuple:
    return (0, int(name), name) if name.isdecimal() and len(name) < 20 else (1, 0, name)


def _note(notes: Counter[str], what: str, count: int) -> None:
    if count:
        notes[what] += int(count)
