"""Facts of a scene that can be stated or asked, in no particular language.

A fact names its key in the phrase tables (english.txt, korean.txt) and the values of its sentences.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from llava_jax.annotations.drawn_scenes import COLOURS, SHAPES
from llava_jax.annotations.scene import (
    CORNERS,
    MAX_COUNT,
    OBJECT,
    OPPOSITE,
    Count,
    Name,
    Position,
    Scene,
    SceneObject,
    Side,
    distance,
    larger,
    side,
)
from llava_jax.annotations.vocabulary import COCO

RARE = ("elephant", "zebra", "giraffe", "airplane", "train", "boat", "bear", "surfboard", "toilet", "pizza", "kite")
"""Categories of COCO that annotators do not overlook. Without box and caption, such an object is absent."""


@dataclass(frozen=True)
class Fact:
    """A fact. `values` maps fields of its phrases to a Name, Count, Position, Side, a tuple of these, or a caption."""

    key: str
    values: Mapping[str, Any]

    @property
    def names(self) -> set[Name]:
        """Names in the values, without sizes."""
        named = (value.name if isinstance(value, Count) else value for value in self.values.values())
        return {value.plain for value in named if isinstance(value, Name)}


def fact(key: str, **values: Any) -> Fact:
    return Fact(key, values)


def questions(scene: Scene, rng: random.Random) -> list[list[Fact]]:
    """Returns facts for conversations, in lists of similar facts. A conversation uses one of every list."""
    things = scene.objects
    found = [
        [*_totals(scene), *(fact("list", items=tuple(scene.counts)) for _ in range(2) if 1 < len(scene.counts) < 6)],
        [fact("count_one" if c.number == 1 else "count", n=c) for c in scene.groups],
        [fact("exists", a=t.name.plain, p=Position(t.position)) for t in scene.unique if t.position]
        + [fact("exists_many", n=c) for c in scene.counts if c.number > 1]
        + [fact("absent", a=name) for name in _absent(scene, rng)],
        [fact("where", a=t.name.plain, p=Position(t.position)) for t in scene.unique if t.position],
        [fact("what_at", n=Count(1, t.name), p=Position(t.position)) for t in things if _alone(t, scene)],
        [fact("all_at", n=c, p=Position(word)) for c, word in _together(scene)],
        [fact("larger", a=a.name.plain, b=b.name.plain) for a, b in scene.pairs if larger(a, b)],
        [fact("first", a=a.name.plain, b=b.name.plain, s=Side(word))
         for a, b, word in _sides(scene) if "-" not in word],
        [fact("caption", text=text) for text in scene.captions if not scene.shapes],
    ]  # fmt: skip
    relations = []
    for a, b, word in _sides(scene):
        names = {"a": a.name.plain, "b": b.name.plain, "s": Side(word)}
        relations.append(fact("side", **names))
        if "-" not in word:
            relations += [fact("side_yes", **names), fact("side_no", **names, w=Side(OPPOSITE[word]))]
    found += [relations, relations]
    if scene.shapes:
        found += [
            [fact("colour", a=Name(t.name.noun), c=t.name) for t in _single_by(things, "noun")],
            [fact("shape", a=Name("object", t.name.colour), b=Name(t.name.noun)) for t in _single_by(things, "colour")],
            [
                fact("same_colour" if a.name.colour == b.name.colour else "other_colour",
                     a=a.name.plain, b=b.name.plain, c=a.name, d=b.name)
                for a, b in scene.pairs
            ],
        ]  # fmt: skip
    return [facts for facts in found if facts]


def description(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Yields the facts of a detailed description in order: the scene, every object, and relations."""
    if not scene.shapes:
        for text in rng.sample(scene.captions, min(len(scene.captions), 1 if len(scene.counts) > 2 else 3)):
            yield fact("caption", text=text)
    openings = _totals(scene)
    if 1 < len(scene.counts) < 6:
        openings.append(fact("list", items=tuple(scene.counts)))
    if openings:
        yield rng.choice(openings)
    for name in scene.crowds:
        yield fact("crowd", n=Count(2, name))
    for count in scene.counts[:8]:
        things = [thing for thing in scene.objects if thing.name.plain == count.name]
        places = [Position(thing.position) for thing in things]
        if count.number == 1:
            yield (
                fact("thing", n=Count(1, things[0].name), a=things[0].name, p=places[0])
                if places[0].word
                else fact("something", n=count)
            )
        elif count.number <= 3 and all(place.word for place in places) and len(set(places)) == count.number:
            yield fact("group_at", n=count, places=tuple(places))
        else:
            together = [word for other, word in _together(scene) if other == count]
            yield fact("all_at", n=count, p=Position(together[0])) if together else fact("group", n=count)
    yield from rng.sample(more := list(_further(scene, rng)), min(len(more), rng.randint(4, 7)))
    if scene.shapes and rng.random() < 0.4:
        yield fact("nothing_else")


def inferences(scene: Scene) -> list[list[Fact]]:
    """Returns facts for reasoning, in lists of similar facts."""
    unique, groups = scene.unique, scene.groups
    total = Count(len(scene.objects), OBJECT)
    pairs = [(a, b) for a in groups for b in groups if a != b and not _overlap(a.name, b.name)]
    found = [
        [fact("remove", a=t.name.plain, n=total, m=Count(total.number - 1, OBJECT))
         for t in unique if scene.shapes and 1 < total.number <= MAX_COUNT],
        [fact("remove_one", n=c, m=Count(c.number - 1, c.name)) for c in groups if c.number > 1],
        [fact("add", n=c, k=Count(k, c.name), m=Count(c.number + k, c.name))
         for c in groups for k in (1, 2, 3) if c.number + k <= MAX_COUNT],
        [fact("more" if a.number > b.number else "equal", n=a, m=b, d=Count(abs(a.number - b.number), a.name))
         for a, b in pairs if a.number >= b.number],
        [_enough(a, b) for a, b in pairs if a.number + b.number > 2],
        [fact("mirror", a=t.name.plain, p=Position(t.position), q=Position(_flip(t.position, "left", "right")))
         for t in unique if t.across in ("left", "right") and t.down],
        [fact("upside_down", a=t.name.plain, p=Position(t.position), q=Position(_flip(t.position, "top", "bottom")))
         for t in unique if t.down in ("top", "bottom") and t.across],
        [fact("covered" if hidden else "open", a=t.name.plain, s=Side(half), o=Side(OPPOSITE[half]))
         for t in unique for half, hidden in _halves(t)],
        [fact("order", a=a.name.plain, b=b.name.plain, c=c.name.plain)
         for a, b, c in permutations(unique[:6], 3) if "left" in side(a, b) and "left" in side(b, c)],
        [fact("way", a=a.name.plain, b=b.name.plain, s=Side(word)) for b, a, word in _sides(scene)],
        [fact("nearest", a=a.name.plain, b=b.name.plain, c=c.name.plain)
         for a, b, c in permutations(unique[:6], 3) if 1.4 * distance(a, b) < distance(a, c)],
        [fact("look", a=a.name.plain, b=b.name.plain) for a, b in scene.pairs if larger(a, b)],
    ]  # fmt: skip
    if scene.shapes:
        found.append(list(_shared(scene)))
        found.append(list(_odd(scene)))
        if len(empty := _empty_corners(scene)) in (1, 2, 3):
            found.append([fact("corners", places=tuple(map(Position, empty)), n=Count(len(empty), Name("corner")))])
        counted = Counter(thing.across for thing in scene.objects)
        if "" not in counted and counted["left"] + counted["right"]:
            n, m = Count(counted["left"], OBJECT), Count(counted["right"], OBJECT)
            key = "balance" if n.number == m.number else "left_heavy" if n.number > m.number else "right_heavy"
            found.append([fact(key, n=n, m=m)])
    return [facts for facts in found if facts]


def _totals(scene: Scene) -> list[Fact]:
    if not scene.shapes:
        return []
    return [fact("total" if len(scene.objects) > 1 else "total_one", n=Count(len(scene.objects), OBJECT))]


def _further(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Yields facts that a description can add to the positions of the objects."""
    for pair in combinations(scene.unique, 2):
        a, b = rng.sample(pair, 2)
        names = {"a": a.name.plain, "b": b.name.plain}
        if word := side(a, b):
            yield fact("side", **names, s=Side(word))
        if larger(a, b):
            yield fact("larger", **names)
        if scene.shapes and a.name.colour == b.name.colour:
            yield fact("same_colour", **names, c=a.name)
        if scene.shapes and a.name.noun == b.name.noun:
            yield fact("same_shape", **names, n=Count(2, Name(a.name.noun)))
    for thing in scene.unique:
        if _area(thing) > 0.3:
            yield fact("fills", a=thing.name.plain)
        yield from (fact("half", a=thing.name.plain, s=Side(half)) for half, hidden in _halves(thing) if hidden)
    if scene.shapes:
        empty = _empty_corners(scene)
        yield from (fact("empty", p=Position(corner)) for corner in rng.sample(empty, min(len(empty), 3)))
        if len(colours := _colours(scene)) > 1:
            yield fact("colours", colours=colours)
        for count in scene.groups:
            if count.number > 1:
                yield fact("alike_colour" if count.name.colour else "alike_shape", n=count)
        missing = [noun for noun in SHAPES if noun not in {thing.name.noun for thing in scene.objects}]
        yield fact("missing", a=Name(rng.choice(missing)))
        for thing in scene.unique:
            for word in ("left", "right", "above", "below"):
                others = [other for other in scene.objects if other is not thing]
                if others and all(word in side(thing, other).split("-") for other in others):
                    yield fact("furthest", a=thing.name.plain, s=Side(word))


def _sides(scene: Scene) -> list[tuple[SceneObject, SceneObject, str]]:
    return [(a, b, word) for a, b in scene.pairs if (word := side(a, b))]


def _single_by(things: list[SceneObject], attribute: str) -> list[SceneObject]:
    counts = Counter(getattr(thing.name, attribute) for thing in things)
    return [thing for thing in things if counts[getattr(thing.name, attribute)] == 1]


def _alone(thing: SceneObject, scene: Scene) -> bool:
    """Whether this object is the only answer to "what is there?"."""
    clear = scene.shapes and thing.across and thing.down
    return bool(clear) and sum(other.position == thing.position for other in scene.objects) == 1


def _together(scene: Scene) -> Iterator[tuple[Count, str]]:
    """Yields groups whose objects are all on the same side."""
    for count in scene.counts:
        things = [thing for thing in scene.objects if thing.name.plain == count.name]
        if count.number > 1:
            for attribute, word, place in (
                ("across", "left", "left side"), ("across", "right", "right side"),
                ("down", "top", "upper part"), ("down", "bottom", "lower part"),
            ):  # fmt: skip
                if all(getattr(thing, attribute) == word for thing in things):
                    yield count, place


def _absent(scene: Scene, rng: random.Random) -> list[Name]:
    """Draws names of absent objects. Shapes share a word with a present object, because such questions are hard."""
    if not scene.shapes:
        text = " ".join(scene.captions).lower()
        shown = {count.name.noun for count in scene.counts} | {name.noun for name in scene.crowds}
        if not shown or not shown <= set(COCO):
            return []  # annotators have not looked for them
        near = {"airplane": "plane", "surfboard": "surf", "pizza": "slice"}
        names = [n for n in RARE if n not in shown and n not in text and near.get(n, n) not in text]
        return [Name(name) for name in rng.sample(names, min(2, len(names)))]
    present = {thing.name.plain for thing in scene.objects}
    near = [Name(noun, colour) for colour in COLOURS for noun in SHAPES]
    near = [n for n in near if n not in present and any(n.colour == p.colour or n.noun == p.noun for p in present)]
    return rng.sample(near, min(3, len(near)))


def _empty_corners(scene: Scene) -> list[str]:
    """Returns empty corners; none if some position is unclear."""
    if not all(thing.across and thing.down for thing in scene.objects):
        return []
    taken = {thing.position for thing in scene.objects}
    return [corner for corner in CORNERS if corner not in taken]


def _colours(scene: Scene) -> tuple[Name, ...]:
    return tuple(Name("object", colour) for colour in dict.fromkeys(thing.name.colour for thing in scene.objects))


def _area(thing: SceneObject) -> float:
    return (thing.box.x2 - thing.box.x1) * (thing.box.y2 - thing.box.y1)


def _overlap(a: Name, b: Name) -> bool:
    """Whether something could be both, as a red object can be a circle."""
    return "object" in (a.noun, b.noun) and not (a.colour and b.colour)


def _enough(a: Count, b: Count) -> Fact:
    if a.number == b.number:
        return fact("just_enough", n=a, m=b)
    key, more = ("enough", b) if a.number < b.number else ("too_few", a)
    return fact(key, n=a, m=b, d=Count(abs(a.number - b.number), more.name))


def _flip(place: str, one: str, other: str) -> str:
    return place.replace(one, "?").replace(other, one).replace("?", other)


def _halves(thing: SceneObject) -> Iterator[tuple[str, bool]]:
    """Yields halves of the image, and whether covering the half hides the object; none if it is in both halves."""
    if thing.box.x2 < 0.47 or thing.box.x1 > 0.53:
        yield from (("left", thing.box.x2 < 0.47), ("right", thing.box.x1 > 0.53))
    if thing.box.y2 < 0.47 or thing.box.y1 > 0.53:
        yield from (("top", thing.box.y2 < 0.47), ("bottom", thing.box.y1 > 0.53))


def _shared(scene: Scene) -> Iterator[Fact]:
    for a, b in combinations(scene.unique, 2):
        names = {"a": a.name.plain, "b": b.name.plain}
        if a.name.colour == b.name.colour:
            yield fact("share_colour", **names, c=a.name)
        elif a.name.noun == b.name.noun:
            yield fact("share_shape", **names, n=Count(2, Name(a.name.noun)))
        else:
            yield fact("share_nothing", **names, c=a.name, d=b.name, e=Name(a.name.noun), f=Name(b.name.noun))


def _odd(scene: Scene) -> Iterator[Fact]:
    """Yields the one object of another colour or shape than all other objects, which share theirs."""
    number = len(scene.objects)
    for attribute in ("colour", "noun"):
        counts = Counter(getattr(thing.name, attribute) for thing in scene.objects)
        if number > 2 and sorted(counts.values()) == [1, number - 1]:
            [odd] = [thing for thing in scene.objects if counts[getattr(thing.name, attribute)] == 1]
            rest = next(value for value, times in counts.items() if times > 1)
            if odd in scene.unique:
                name = Name("object", rest) if attribute == "colour" else Name(rest)
                yield fact(f"odd_{attribute}", a=odd.name.plain, n=Count(number - 1, name))
