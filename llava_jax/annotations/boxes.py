"""Boxes of one image and of many images, and the choice of boxes that a teacher sees."""

import dataclasses
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.errors import UserError

DECIMALS = 3
"""Number of decimals of a box in a prompt."""
SUSPECT_OVERHANG, MAX_OVERHANG = 0.05, 0.5
"""Fractions of the image beyond its edge: a box that reaches further looks wrong, or is wrong."""
MAX_SUSPECT_SHARE = 0.3
"""Maximum fraction of a source's boxes that look wrong in one way. If there are more, the format is another one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """The region of an object: x1 < x2 and y1 < y2 in fractions of the image, from its upper left corner.

    A crowd is a region with several objects of the category, uncounted.
    """

    category: str
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False

    def line(self) -> str:
        """Returns `person: [0.63, 0.1, 1.0, 0.532]`, or `person (crowd): [...]` for a crowd."""
        corners = ", ".join(str(round(float(value), DECIMALS)) for value in (self.x1, self.y1, self.x2, self.y2))
        return f"{self.category}{' (crowd)' * self.crowd}: [{corners}]"


@dataclasses.dataclass
class BoxArrays:
    """Boxes of many images, as columns."""

    image: np.ndarray  # int64 [boxes]: index of the image, or its id
    category: np.ndarray  # int64 [boxes]
    corners: np.ndarray  # float64 [boxes, 4]: x1, y1, x2, y2 in fractions of the image
    crowd: np.ndarray  # bool [boxes]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, chosen: slice | np.ndarray) -> "BoxArrays":
        return BoxArrays(self.image[chosen], self.category[chosen], self.corners[chosen], self.crowd[chosen])

    @property
    def areas(self) -> np.ndarray:
        return (self.corners[:, 2:] - self.corners[:, :2]).prod(1)


class BoxCollector:
    """Collects boxes in little memory."""

    def __init__(self):
        self.image, self.category, self.corners, self.crowd = array("q"), array("q"), array("d"), array("b")

    def add(self, image: int, category: int, corners: Sequence[float], crowd: bool) -> None:
        self.image.append(image)
        self.category.append(category)
        self.corners.extend(corners)
        self.crowd.append(crowd)

    def to_arrays(self) -> BoxArrays:
        corners = np.array(self.corners, np.float64).reshape(-1, 4)
        return BoxArrays(np.array(self.image, np.int64), np.array(self.category, np.int64), corners,
                         np.array(self.crowd, bool))


@dataclasses.dataclass
class Annotations:
    """The content of a source's files: all images that have captions, in any order, and their boxes as annotated.

    Attributes:
      has_boxes: Whether the source gives boxes at all.
      notes: Counts of what was skipped or changed, by description.
      where, where_boxes: Functions from an image's index to its file and row, for messages.
      box_format: Format of boxes in the files, for messages.
    """

    files: list[str]
    has_boxes: bool
    ids: list[str]
    names: list[str]
    captions: list[tuple[str, ...]]
    categories: list[str]
    boxes: BoxArrays
    notes: Counter[str]
    where: Callable[[int], str]
    where_boxes: Callable[[int], str]
    box_format: str = "[x, y, width, height] in pixels"


def select_boxes(
    found: Annotations, notes: Counter[str], min_area: float = 0.0, max_boxes: int | None = None, crowds: bool = True
) -> BoxArrays:
    """Returns the boxes that a teacher sees, sorted by image and within an image as annotated.

    Args:
      notes: Counts of dropped and clipped boxes are added here.
      min_area: Minimum area, as a fraction of the image.
      max_boxes: Maximum number of boxes of an image. The largest ones are kept.
      crowds: Whether crowds are kept.

    Raises UserError with file and image if more than MAX_SUSPECT_SHARE of the boxes look wrong in the same way.
    """
    boxes = found.boxes

    def drop(dropped: np.ndarray, why: str) -> BoxArrays:
        add_note(notes, f"boxes dropped: {why}", dropped.sum())
        return boxes[~dropped]

    def refuse_many(wrong: np.ndarray, what: str) -> None:
        if wrong.sum() > MAX_SUSPECT_SHARE * len(boxes):
            first = int(np.argmax(wrong))
            where = found.where_boxes(int(boxes.image[first]))
            raise UserError(f"{where}: {found.categories[boxes.category[first]]} has a box {what}, as have "
                            f"{wrong.sum():,} of the source's {len(boxes):,}; boxes must be {found.box_format}")

    boxes = boxes[np.argsort(boxes.image, kind="stable")]
    overhang = np.maximum(-boxes.corners[:, :2], boxes.corners[:, 2:] - 1).max(1, initial=-1)
    refuse_many((boxes.corners[:, 2:] < boxes.corners[:, :2]).any(1), "of negative size, or with its corners swapped")
    refuse_many(overhang > SUSPECT_OVERHANG, "beyond the image's edge")
    boxes = drop(overhang > MAX_OVERHANG, "far outside the image")
    clipped = np.clip(boxes.corners, 0, 1)
    visible = np.abs(clipped - boxes.corners).max(1, initial=0) >= 0.5 * 10.0**-DECIMALS  # the prompt shows it
    add_note(notes, "boxes clipped at the image's edge", visible.sum())
    boxes.corners = clipped
    boxes = drop((clipped[:, 2:] <= clipped[:, :2]).any(1), "of zero size or outside the image")
    boxes = drop(_are_repeated(boxes), "given twice")
    if not crowds:
        boxes = drop(boxes.crowd, "crowds")
    if min_area:
        boxes = drop(boxes.areas < min_area, "too small")
    if max_boxes is not None:
        by_area = np.lexsort((-boxes.areas, boxes.image))  # by image, the largest first, stable
        rank = np.empty(len(boxes), np.int64)
        rank[by_area] = np.arange(len(boxes)) - np.searchsorted(boxes.image, boxes.image)
        boxes = drop(rank >= max_boxes, f"more than {max_boxes} in an image")
    return boxes


def add_note(notes: Counter[str], what: str, count: int) -> None:
    if count:
        notes[what] += int(count)


def _are_repeated(boxes: BoxArrays) -> np.ndarray:
    """Whether an earlier box of the same image equals each box."""
    columns = (*boxes.corners.T, boxes.crowd, boxes.category, boxes.image)
    order = np.lexsort(columns)  # stable, so the first of equal boxes stays first
    same = np.ones(max(0, len(boxes) - 1), bool)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    repeated = np.zeros(len(boxes), bool)
    repeated[order[1:][same]] = True
    return repeated
