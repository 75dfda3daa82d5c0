"""Reads from boxes what is certain: names, counts, positions and relations. A margin excludes unclear cases."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.annotations.drawn_scenes import COLOURS, SHAPES, read_sign

LARGE = 0.265
"""Minimum length of a large object's longer side, as a fraction of the image's side."""
MAX_COUNT = 10
"""Maximum number that is claimed, because annotators mark larger numbers of objects as crowds."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")

_THIRDS = ((0.0, 0.30), (0.40, 0.60), (0.70, 1.0))
_ACROSS, _DOWN = ("left", "centre", "right"), ("top", "centre", "bottom")


@dataclass(frozen=True)
class Name:
    """Names an object in no particular language: a noun ("dog", "circle", "object"), a colour and a size.

    `at` is a word of `SceneObject.position`, for "object at the top-left".
    """

    noun: str
    colour: str = ""
    size: str = ""
    at: str = ""

    @cached_property
    def plain(self) -> "Name":
        return replace(self, size="") if self.size else self

    def covers(self, other: "Name") -> bool:
        """Whether an object named `other` can be called so. Does not compare positions."""
        return (self.noun in ("object", other.noun) and self.colour in ("", other.colour)
                and self.size in ("", other.size))

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.noun) if word)


OBJECT = Name("object")


@dataclass(frozen=True)
class Count:
    """Says how many objects have a name."""

    number: int
    name: Name


@dataclass(frozen=True)
class Position:
    """A ninth or a half of the image, as a word of `SceneObject.position`."""

    word: str


@dataclass(frozen=True)
class Side:
    """The direction from one object to another, as a word that `side` returns."""

    word: str


@dataclass(frozen=True)
class SceneObject:
    """An object that a box shows."""

    name: Name
    box: Box

    @cached_property
    def x(self) -> float:
        return (self.box.x1 + self.box.x2) / 2

    @cached_property
    def y(self) -> float:
        return (self.box.y1 + self.box.y2) / 2

    @cached_property
    def across(self) -> str:
        """left, centre or right. Empty if the centre is near a border of the thirds, or if the box is wide."""
        return _third(self.x, self.box.x2 - self.box.x1, _ACROSS)

    @cached_property
    def down(self) -> str:
        """top, centre or bottom. Empty if the centre is near a border of the thirds, or if the box is high."""
        return _third(self.y, self.box.y2 - self.box.y1, _DOWN)

    @cached_property
    def position(self) -> str:
        """One of nine words such as "top-left" or "centre"; a half such as "left side" if one direction is unclear.

        Empty if both directions are unclear.
        """
        if self.across and self.down:
            return "-".join(word for word in (self.down, self.across) if word != "centre") or "centre"
        halves = {"left": "left side", "right": "right side", "top": "upper part", "bottom": "lower part"}
        return halves.get(self.across or self.down, "")


class Scene:
    """The objects of a context's boxes.

    Attributes:
      shapes: Whether all boxes are coloured shapes of the drawn scenes. The boxes are then all that the image shows.
        Photographs may show more than what has a box.
      objects: Objects that can be counted, in the order of the boxes.
      crowds: Names of objects that are too many to count.
      signs: (colour, text) of drawn signs, which are no objects.
    """

    def __init__(self, context: Context):
        self.signs = [sign for box in context.boxes if (sign := read_sign(box.category))]
        boxes = [box for box in context.boxes if not read_sign(box.category)]
        names = [coloured_name(box.category) for box in boxes]
        self.shapes = bool(names) and all(names) and not any(box.crowd for box in boxes)
        if not self.shapes:
            names = [Name(box.category) for box in boxes]
        self.captions = context.captions
        counts = Counter(names)
        crowded = {name for name, box in zip(names, boxes, strict=True) if box.crowd}
        self.crowds = [name for name, number in counts.items() if name in crowded or number > MAX_COUNT]
        self.objects = [
            SceneObject(replace(name, size=_size(box)) if self.shapes else name, box)
            for name, box in zip(names, boxes, strict=True)
            if name not in self.crowds
        ]

    @cached_property
    def counts(self) -> list[Count]:
        """Number of objects by name, in the order of the boxes."""
        counted = Counter(thing.name.plain for thing in self.objects)
        return [Count(number, name) for name, number in counted.items()]

    @cached_property
    def groups(self) -> list[Count]:
        """`counts`; for coloured shapes the numbers by colour and by shape."""
        if not self.shapes:
            return self.counts
        colours = Counter(Name("object", thing.name.colour) for thing in self.objects)
        nouns = Counter(Name(thing.name.noun) for thing in self.objects)
        return [Count(number, name) for counted in (colours, nouns) for name, number in counted.items()]

    @cached_property
    def unique(self) -> list[SceneObject]:
        """Objects whose name no other object has."""
        once = {count.name for count in self.counts if count.number == 1}
        return [thing for thing in self.objects if thing.name.plain in once]

    @cached_property
    def pairs(self) -> list[tuple[SceneObject, SceneObject]]:
        """Ordered pairs of unique objects."""
        return [pair for a, b in combinations(self.unique, 2) for pair in ((a, b), (b, a))]

    @cached_property
    def sides(self) -> list[tuple[SceneObject, SceneObject, str]]:
        """Ordered pairs of unique objects whose `side` is clear, with that side."""
        return [(a, b, word) for a, b in self.pairs if (word := side(a, b))]

    @cached_property
    def middles(self) -> list[tuple[SceneObject, SceneObject, SceneObject, bool]]:
        """Unique objects c, a, b for which it is clear whether c `is_between` a and b, and whether it is."""
        three = [(c, a, b) for things in combinations(self.unique[:6], 3)
                 for c, a, b in (things, (things[1], things[0], things[2]), things[::-1])]
        return [(c, a, b, inside) for c, a, b in three if (inside := is_between(c, a, b)) is not None]

    @cached_property
    def rows(self) -> list[tuple[SceneObject, SceneObject, SceneObject]]:
        """Three unique objects each, of which each is clearly left of the next."""
        ordered = sorted(self.unique[:6], key=lambda thing: thing.x)
        return [(a, b, c) for a, b, c in combinations(ordered, 3) if "left" in side(a, b) and "left" in side(b, c)]


def side(a: SceneObject, b: SceneObject) -> str:
    """Returns where `a` clearly is relative to `b`: left, right, above, below, "above-left", ...; "" if unclear."""
    across = "left" if _is_before(a, b, "x") else "right" if _is_before(b, a, "x") else ""
    down = "above" if _is_before(a, b, "y") else "below" if _is_before(b, a, "y") else ""
    return "-".join(word for word in (down, across) if word)


def is_between(c: SceneObject, a: SceneObject, b: SceneObject) -> bool | None:
    """Whether `c` is near the middle of the line from `a` to `b`. None if it is neither there nor clearly elsewhere."""
    x, y = b.x - a.x, b.y - a.y
    square = x * x + y * y
    if square < 0.3**2:
        return None
    along = ((c.x - a.x) * x + (c.y - a.y) * y) / square
    off = abs((c.x - a.x) * y - (c.y - a.y) * x) / square
    if not -0.15 < along < 1.15 or off > 0.4:
        return False
    near = 0.25 <= along <= 0.75 and off <= 0.15
    return True if near and side(a, c) and side(a, c) == side(c, b) else None


def larger(a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` covers clearly more of the image than `b`, and is longer too."""
    (width, height), (other_width, other_height) = (
        (thing.box.x2 - thing.box.x1, thing.box.y2 - thing.box.y1) for thing in (a, b)
    )
    longer = max(width, height) >= 1.2 * max(other_width, other_height)
    return longer and width * height >= 1.45 * other_width * other_height


def distance(a: SceneObject, b: SceneObject) -> float:
    return ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5


def coloured_name(category: str) -> Name | None:
    """Returns the name of a drawn scene's shape ("red circle"), or None for another category."""
    colour, _, noun = category.partition(" ")
    return Name(noun, colour) if colour in COLOURS and noun in SHAPES else None


def _is_before(a: SceneObject, b: SceneObject, axis: str) -> bool:
    """Whether `a` is left of (above) `b`: by its centre, with boxes that hardly overlap in this direction."""
    start, end = axis + "1", axis + "2"
    overlap = getattr(a.box, end) - getattr(b.box, start)
    shorter = min(getattr(thing.box, end) - getattr(thing.box, start) for thing in (a, b))
    return getattr(b, axis) - getattr(a, axis) > 0.1 and overlap <= 0.2 * shorter


def _third(centre: float, length: float, words: tuple[str, str, str]) -> str:
    if length > 0.6:
        return ""
    return next((word for word, (low, high) in zip(words, _THIRDS, strict=True) if low <= centre <= high), "")


def _size(box: Box) -> str:
    return "large" if max(box.x2 - box.x1, box.y2 - box.y1) >= LARGE else "small"
