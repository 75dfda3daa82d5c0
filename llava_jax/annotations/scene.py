"""What boxes say for certain: names, counts, places and relations, each with a margin on the side of silence."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from llava_jax.annotations.context import Box, Context
from llava_jax.annotations.drawn_scenes import COLOURS, SHAPES

LARGE = 0.265
"""A box whose longer side is at least this part of the image's side is a large object."""
MOST = 10
"""Above this annotators mark crowds instead of counting, so no larger number is claimed."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")

_THIRDS = ((0.0, 0.30), (0.40, 0.60), (0.70, 1.0))
_ACROSS, _DOWN = ("left", "centre", "right"), ("top", "centre", "bottom")


@dataclass(frozen=True)
class Name:
    """What something is called, in no language yet: a noun ("dog", "circle", "object"), its colour and size."""

    noun: str
    colour: str = ""
    size: str = ""

    @property
    def plain(self) -> "Name":
        return replace(self, size="")


OBJECT = Name("object")


@dataclass(frozen=True)
class Count:
    number: int
    name: Name


@dataclass(frozen=True)
class Position:
    """One of nine or of four halves, as `SceneObject.place` has it."""

    word: str


@dataclass(frozen=True)
class Side:
    """Where one thing is, seen from another, as `side` has it."""

    word: str


@dataclass(frozen=True)
class SceneObject:
    name: Name
    box: Box

    @property
    def x(self) -> float:
        return (self.box.x1 + self.box.x2) / 2

    @property
    def y(self) -> float:
        return (self.box.y1 + self.box.y2) / 2

    @property
    def across(self) -> str:
        """left, centre or right; empty where the centre is near a border of the thirds or the box is wide."""
        return _third(self.x, self.box.x2 - self.box.x1, _ACROSS)

    @property
    def down(self) -> str:
        return _third(self.y, self.box.y2 - self.box.y1, _DOWN)

    @property
    def place(self) -> str:
        """One of nine ("top-left", "top", ..., "centre"); "left side", "upper part", ... where only one direction is
        clear; empty where none is."""
        if self.across and self.down:
            return "-".join(word for word in (self.down, self.across) if word != "centre") or "centre"
        sides = {"left": "left side", "right": "right side", "top": "upper part", "bottom": "lower part"}
        return sides.get(self.across or self.down, "")


class Scene:
    """A context's boxes. `shapes`: all of it is the embedded data set's coloured shapes, where the boxes are all that
    there is; elsewhere there may be more in the picture than what has a box."""

    def __init__(self, context: Context):
        names = [coloured_name(box.category) for box in context.boxes]
        self.shapes = bool(names) and all(names) and not any(box.crowd for box in context.boxes)
        if not self.shapes:
            names = [Name(box.category) for box in context.boxes]
        self.captions = context.captions
        counts = Counter(name.plain for name in names)
        crowded = {name.plain for name, box in zip(names, context.boxes, strict=True) if box.crowd}
        self.crowds = [name for name, number in counts.items() if name in crowded or number > MOST]
        self.things = [
            SceneObject(name if not self.shapes else replace(name, size=_size(box)), box)
            for name, box in zip(names, context.boxes, strict=True)
            if name.plain not in self.crowds
        ]

    @cached_property
    def counts(self) -> list[Count]:
        """How many of each name, in the order of the boxes."""
        counted = Counter(thing.name.plain for thing in self.things)
        return [Count(number, name) for name, number in counted.items()]

    @cached_property
    def groups(self) -> list[Count]:
        """`counts`, and for coloured shapes those of each colour and of each shape."""
        if not self.shapes:
            return self.counts
        colours = Counter(thing.name.colour for thing in self.things)
        nouns = Counter(thing.name.noun for thing in self.things)
        return (
            [Count(number, Name("object", colour)) for colour, number in colours.items()]
            + [Count(number, Name(noun)) for noun, number in nouns.items()]
        )

    @cached_property
    def single(self) -> list[SceneObject]:
        """Things whose name is theirs alone."""
        once = {count.name for count in self.counts if count.number == 1}
        return [thing for thing in self.things if thing.name.plain in once]

    @cached_property
    def pairs(self) -> list[tuple[SceneObject, SceneObject]]:
        return [pair for a, b in combinations(self.single, 2) for pair in ((a, b), (b, a))]


def side(a: SceneObject, b: SceneObject) -> str:
    """Where `a` clearly is, seen from `b`: left, right, above, below, "above-left", ...; empty where it is unclear."""
    across = "left" if _before(a, b, "x") else "right" if _before(b, a, "x") else ""
    down = "above" if _before(a, b, "y") else "below" if _before(b, a, "y") else ""
    return "-".join(word for word in (down, across) if word)


def larger(a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` takes up clearly more of the picture, and is longer too."""
    (width, height), (other_width, other_height) = (
        (thing.box.x2 - thing.box.x1, thing.box.y2 - thing.box.y1) for thing in (a, b)
    )
    longer = max(width, height) >= 1.2 * max(other_width, other_height)
    return longer and width * height >= 1.45 * other_width * other_height


def distance(a: SceneObject, b: SceneObject) -> float:
    return ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5


def coloured_name(category: str) -> Name | None:
    """Of the embedded data set's shapes ("red circle"); None for other categories."""
    colour, _, noun = category.partition(" ")
    return Name(noun, colour) if colour in COLOURS and noun in SHAPES else None


def _before(a: SceneObject, b: SceneObject, axis: str) -> bool:
    """Whether `a` is left of (above) `b`: by its centre, with boxes that hardly overlap in this direction."""
    begin, end = axis + "1", axis + "2"
    overlap = getattr(a.box, end) - getattr(b.box, begin)
    shorter = min(getattr(thing.box, end) - getattr(thing.box, begin) for thing in (a, b))
    return getattr(b, axis) - getattr(a, axis) > 0.1 and overlap <= 0.2 * shorter


def _third(centre: float, length: float, words: tuple[str, str, str]) -> str:
    if length > 0.6:
        return ""
    return next((word for word, (low, high) in zip(words, _THIRDS, strict=True) if low <= centre <= high), "")


def _size(box: Box) -> str:
    return "large" if max(box.x2 - box.x1, box.y2 - box.y1) >= LARGE else "small"
