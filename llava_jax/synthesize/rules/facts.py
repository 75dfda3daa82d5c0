"""Facts of a scene that can be stated or asked, in no particular language.

A fact names its key in the phrase tables (english.txt, korean.txt) and the values of its sentences.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, permutations, zip_longest
from typing import Any

from llava_jax.annotations.drawn_scenes import COLOURS, PAIRS, SHAPES
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
Pairs = Sequence[tuple[str, str]]
"""Colours and shapes."""


@dataclass(frozen=True)
class Fact:
    """A fact. `values` maps fields of its phrases to a Name, Count, Position, Side, a tuple of these, or a caption.

    `about` has the names of the objects that a question is about. They have a size where the answer needs a look at
    these objects alone.
    """

    key: str
    values: Mapping[str, Any]
    about: tuple[Name, ...] = ()

    @property
    def names(self) -> set[Name]:
        """Names in the values, without sizes."""
        named = (value.name if isinstance(value, Count) else value for value in self.values.values())
        return {value.plain for value in named if isinstance(value, Name)}


def fact(key: str, *about: Name, **values: Any) -> Fact:
    return Fact(key, values, about)


def questions(scene: Scene, rng: random.Random, pairs: Pairs = PAIRS) -> dict[str, list[list[Fact]]]:
    """Returns facts to ask about, by kind of question.

    The facts of a kind are grouped by their answers where one answer would prevail otherwise. A question draws a group
    first and then a fact of it. A "no" names only coloured shapes of `pairs`.
    """
    things = scene.objects
    located = [(t, Position(t.position)) for t in scene.unique if t.position]
    together = [fact("all_at", n=count, p=Position(word)) for count, word in _together(scene)]
    found = {
        "list": [[fact("list", items=tuple(scene.counts))]] if 1 < len(scene.counts) < 6 else [],
        "count": _counts(scene, rng),
        "existence": _existence(scene, rng, pairs),
        "position": [[fact("where", t.name, a=name, p=place) for t, place in located
                      for name in (t.name.plain, *_refer(t, scene, ("noun",), ("colour",)))]],
        "what_at": [[fact("what_at", n=Count(1, t.name), p=Position(t.position)) for t in things if _alone(t, scene)]],
        "all_at": [together],
        "larger": [[fact("larger", a=a.name.plain, b=b.name.plain) for a, b in scene.pairs if larger(a, b)]],
        "half": [[fact("half_yes" if inside else "half_no", a=t.name.plain, s=Side(half), o=Side(OPPOSITE[half]))
                  for t in scene.unique for half, inside in _halves(t)]],
        "caption": [[fact("caption", text=text) for text in scene.captions if not scene.shapes]],
        "sign": [[fact("sign", a=Name("sign", colour), w=tuple(Name(noun) for noun in text.split(" ")))
                  for colour, text in scene.signs]],
    } | _relations(scene) | _three(scene, rng)  # fmt: skip
    if scene.shapes:
        found |= {
            "colour": [[fact("colour", t.name, a=name, c=t.name) for t in things
                        for name in _refer(t, scene, ("noun",), ("size", "noun"), at=True)]],
            "shape": [[fact("shape", t.name, a=name, b=Name(t.name.noun)) for t in things
                       for name in _refer(t, scene, ("colour",), ("size", "colour"), at=True)]],
        }  # fmt: skip
        alike = [one for pair in scene.pairs for one in _alike(*pair)]
        for what in ("colour", "shape"):
            found[f"same_{what}"] = [[one for one in alike if one.key == f"{key}_{what}"] for key in ("same", "other")]
    return {kind: groups for kind, lists in found.items() if (groups := [facts for facts in lists if facts])}


def _counts(scene: Scene, rng: random.Random) -> list[list[Fact]]:
    """Returns a group of facts for every number of objects, and in half of the cases one for none."""
    by_number: dict[int, list[Fact]] = {}
    if scene.shapes:
        if rng.random() < 0.5:
            shown = {count.name for count in scene.groups}
            absent = [Name("object", colour) for colour in COLOURS] + [Name(noun) for noun in SHAPES]
            by_number[0] = [fact("count_none", n=Count(0, name)) for name in absent if name not in shown]
        by_number[len(scene.objects)] = 2 * _totals(scene)
    for count in scene.groups:
        by_number.setdefault(count.number, []).append(fact("count_one" if count.number == 1 else "count", n=count))
    return list(by_number.values())


def _existence(scene: Scene, rng: random.Random, pairs: Pairs) -> list[list[Fact]]:
    """Returns groups with as many "yes" as "no". The hardest "no" combines words of two objects."""
    shown = [fact("exists", t.name.plain, a=t.name.plain, p=Position(t.position)) for t in scene.unique if t.position]
    shown += [fact("exists_many", count.name, n=count) for count in scene.counts if count.number > 1]
    if not scene.shapes:
        return [shown, [fact("absent", name, a=name) for name in _absent(scene, rng)]]
    names = {count.name for count in scene.counts}
    colours, nouns = {name.colour for name in names}, {name.noun for name in names}
    by_words: dict[int, list[Fact]] = {}
    for colour, noun in pairs:
        words = (colour in colours) + (noun in nouns)
        if words and (name := Name(noun, colour)) not in names:
            by_words.setdefault(words, []).append(fact("absent", name, a=name))
    if not by_words:
        return [shown]
    return [shown, shown, by_words[max(by_words)], sum(by_words.values(), [])]


def _relations(scene: Scene) -> dict[str, list[list[Fact]]]:
    """Returns facts about two objects. A "relation" has a single side, so that one word answers."""
    relations, directions, first = [], [], []
    for a, b, word in scene.sides:
        names = {"a": a.name.plain, "b": b.name.plain, "s": Side(word)}
        is_straight = "-" not in word
        (relations if is_straight else directions).append(fact("side", a.name, b.name, **names))
        if is_straight:
            directions += [fact("side_yes", **names), fact("side_no", **names, w=Side(OPPOSITE[word]))]
            first.append(fact("first", **names))
    return {"relation": [relations], "direction": [directions], "first": [first]}


def _three(scene: Scene, rng: random.Random) -> dict[str, list[list[Fact]]]:
    """Returns facts about three objects: one between two, and their order. "Yes" is as frequent as "no".

    Scenes without an object between two are left out in two of three cases, which balances the answers.
    """
    middle, beside, ordered, mixed = [], [], [], []
    for c, *ends, inside in scene.middles:
        a, b = rng.sample(ends, 2)
        names = {"c": c.name.plain, "a": a.name.plain, "b": b.name.plain}
        (middle if inside else beside).append(fact("between" if inside else "not_between", *names.values(), **names))
    for row in scene.rows:
        names = [thing.name.plain for thing in row]
        ordered.append(fact("order", *names, **dict(zip("abc", names, strict=True))))
        for wrong in list(permutations(names))[1:]:
            values = dict(zip("abc", wrong, strict=True)) | dict(zip("def", names, strict=True))
            mixed.append(fact("not_order", *names, **values))
    between = [middle, middle, middle, beside, beside] if middle else [beside] if 3 * rng.random() < 1 else []
    return {"between": between, "order": [ordered, mixed]}


def _refer(thing: SceneObject, scene: Scene, *ways: tuple[str, ...], at: bool = False) -> list[Name]:
    """Returns names that fit no other object: some attributes, and the position if `at`."""
    words = [{word: getattr(thing.name, word) for word in way} for way in ways if scene.shapes]
    names = [Name(**{"noun": "object"} | values) for values in words]
    names = [name for name in names if sum(name.covers(other.name) for other in scene.objects) == 1]
    return names + [Name("object", at=thing.position)] * (at and _alone(thing, scene))


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
    one_by_one = scene.shapes and all(thing.position for thing in scene.objects) and rng.random() < 0.5
    yield from map(_thing, scene.objects) if one_by_one else _grouped(scene)
    ends = scene.shapes and rng.random() < 0.4
    least, most = (max(1, 3 - len(scene.counts)), 3 - ends) if scene.shapes else (4, 7)
    yield from _draw_mixed(list(_further(scene, rng)), rng.randint(least, most), rng)
    if ends:
        yield fact("nothing_else")


def _thing(thing: SceneObject) -> Fact:
    return fact("thing", n=Count(1, thing.name), a=thing.name, p=Position(thing.position))


def _grouped(scene: Scene) -> Iterator[Fact]:
    """Yields facts that name every object, those of one name together."""
    for count in scene.counts[:8]:
        things = [thing for thing in scene.objects if thing.name.plain == count.name]
        places = [Position(thing.position) for thing in things]
        if count.number == 1:
            yield _thing(things[0]) if places[0].word else fact("something", n=count)
        elif count.number <= 3 and all(place.word for place in places) and len(set(places)) == count.number:
            yield fact("group_at", n=count, places=tuple(places))
        else:
            together = [word for other, word in _together(scene) if other == count]
            yield fact("all_at", n=count, p=Position(together[0])) if together else fact("group", n=count)


def _draw_mixed(facts: list[Fact], number: int, rng: random.Random) -> list[Fact]:
    """Draws up to `number` facts, and repeats a key only after every other key was drawn."""
    by_key: dict[str, list[Fact]] = {}
    for one in rng.sample(facts, len(facts)):
        by_key.setdefault(one.key, []).append(one)
    rounds = zip_longest(*rng.sample(list(by_key.values()), len(by_key)))
    return [one for one in chain.from_iterable(rounds) if one][:number]


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
        [fact("sort", a=a.name.plain, b=b.name.plain, c=c.name.plain) for a, b, c in scene.rows],
        [fact("pass", a=a.name.plain, b=b.name.plain, c=c.name.plain) for c, a, b, inside in scene.middles if inside],
        [fact("way", a=a.name.plain, b=b.name.plain, s=Side(word)) for b, a, word in scene.sides],
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
        if "" not in counted and counted["left"] and counted["right"]:
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
    for c, a, b, inside in scene.middles:
        if inside:
            yield fact("between", c=c.name.plain, a=a.name.plain, b=b.name.plain)
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
        yield from (fact("missing", a=Name(noun)) for noun in rng.sample(missing, min(1, len(missing))))
        for thing in scene.unique:
            for word in ("left", "right", "above", "below"):
                others = [other for other in scene.objects if other is not thing]
                if others and all(word in side(thing, other).split("-") for other in others):
                    yield fact("furthest", a=thing.name.plain, s=Side(word))


def _alike(a: SceneObject, b: SceneObject) -> Iterator[Fact]:
    """Yields whether two coloured shapes have the same colour, and whether they have the same shape."""
    names = {"a": a.name.plain, "b": b.name.plain}
    yield fact("same_colour" if a.name.colour == b.name.colour else "other_colour", **names, c=a.name, d=b.name)
    shapes = {"n": Count(2, Name(a.name.noun)), "e": Name(a.name.noun), "f": Name(b.name.noun)}
    yield fact("same_shape" if a.name.noun == b.name.noun else "other_shape", **names, **shapes)


def _alone(thing: SceneObject, scene: Scene) -> bool:
    """Whether this object is the only answer to "what is there?". What is at the top-left is at the top, too."""
    if not (scene.shapes and thing.across and thing.down):
        return False
    word = thing.position
    if word in OPPOSITE:
        return sum(word in (other.across, other.down) for other in scene.objects) == 1
    return sum(word == other.position for other in scene.objects) == 1


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
    """Draws names of objects that a photograph does not show."""
    text = " ".join(scene.captions).lower()
    shown = {count.name.noun for count in scene.counts} | {name.noun for name in scene.crowds}
    if not shown or not shown <= set(COCO):
        return []  # annotators have not looked for them
    near = {"airplane": "plane", "surfboard": "surf", "pizza": "slice"}
    names = [n for n in RARE if n not in shown and n not in text and near.get(n, n) not in text]
    return [Name(name) for name in rng.sample(names, min(2, len(names)))]


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
