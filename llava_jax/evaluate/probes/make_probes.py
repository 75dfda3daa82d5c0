"""The questions of the probes, made from boxes so that nothing but the picture answers them.

They come in sets: each set has every one of its possible answers once. Of most kinds a set is one text, asked of
several pictures (the dog is left of the cat in one, right of it in the other), so nobody who knows the text alone does
better than guessing. Where one picture has to serve, its texts differ in the places of their words alone.
"""

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from llava_jax.annotations.context import AnnotationSource, Context, open_contexts
from llava_jax.annotations.scene import OBJECT, Count, Name, Scene, SceneObject, side
from llava_jax.errors import UserError
from llava_jax.evaluate.probes.words import LANGUAGES, NUMBERS, say
from llava_jax.files import atomic_write, make_folder

FILE = "probes.jsonl"
KINDS = ("left/right", "above/below", "inside", "between", "counting", "binding")
SMALLEST = 0.005
"""Nothing is asked of boxes that are a smaller part of the picture: a tower of 24 x 24 patches hardly sees them."""


@dataclass(frozen=True)
class ProbesData:
    """Makes the questions of the probes `spatial` and `multilingual` from boxes, as OUT/probes.jsonl."""

    out: str
    """folder for probes.jsonl; the pictures' names are relative to it, or to what --image-root says later"""
    captions: str = ""
    """COCO's captions_*.json, of which the list of pictures is used"""
    instances: str = ""
    """COCO's instances_*.json of the same split"""
    data: str = ""
    """instead: JSON lines of {image, captions, boxes, width, height}, or a TFDS data set like coco_captions"""
    prefix: str = ""
    """put before the names of pictures, such as val2017/"""
    each: int = 500
    """questions of each kind, at most"""
    seed: int = 0
    """of the draws: which pictures meet in a set, and which sets are taken"""

    def run(self) -> int:
        contexts = open_contexts(AnnotationSource(captions=self.captions, instances=self.instances, data=self.data,
                                        prefix=self.prefix, names="file"))
        if not contexts.has_boxes:
            raise UserError(f"{contexts.files[0]}: the probes are made from boxes, and the source gives none")
        counts = write(contexts, self.out, self.each, self.seed)
        print(", ".join(f"{kind} {count:,}" for kind, count in counts.items()) + f" questions in {self.out}/{FILE}")
        return 0


@dataclass(frozen=True)
class Ask:
    """A question of one picture. `key` says what is asked, `values` are the names in it."""

    kind: str
    key: str
    values: Mapping[str, Name | Count]
    answer: str
    choices: tuple[str, ...]
    image: str


def write(contexts: Iterable[Context], folder: str, each: int, seed: int = 0) -> dict[str, int]:
    """Writes `folder`/probes.jsonl; returns the number of questions of each kind that it has.

    A line: {question_id, image, text, answer, choices, category, set} and, where all names have Korean words, the same
    of the Korean question in `ko`: {text, answer, choices}. UserError if the boxes allow no question.
    """
    sets = make(contexts, each, seed)
    if not any(sets.values()):
        raise UserError("the boxes allow no question: no two pictures of them differ in one answer alone")
    lines = []
    for kind, found in sets.items():
        for number, asks in enumerate(found):
            for ask in asks:
                said = {language: say(language, ask.key, ask.values, ask.answer, ask.choices) for language in LANGUAGES}
                line = {"question_id": len(lines), "image": ask.image, **said["en"], "category": kind,
                        "set": f"{kind} {number}"}
                lines.append(line | {language: row for language, row in said.items() if row and language != "en"})
    make_folder(folder)
    with atomic_write(os.path.join(folder, FILE)) as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return {kind: sum(map(len, found)) for kind, found in sets.items() if found}


def make(contexts: Iterable[Context], each: int, seed: int = 0) -> dict[str, list[list[Ask]]]:
    """Sets of questions by kind, together not more than `each` questions of a kind.

    `together` holds, by kind, sets that are taken or left together, for only together they have a text both ways.
    """
    draw = random.Random(seed)
    by_text: dict[str, dict[Any, dict[str, list[Ask]]]] = {kind: {} for kind in KINDS}
    together: dict[str, list[list[list[Ask]]]] = {kind: [] for kind in KINDS}
    crossed: dict[Any, dict[Any, list[list[Ask]]]] = defaultdict(lambda: defaultdict(list))
    for context in contexts:
        scene = Scene(context)
        for ask in (*sides(scene, context.image), *insides(scene, context.image), *counts(scene, context.image)):
            text = tuple(ask.values.items())
            by_text[ask.kind].setdefault(text, {}).setdefault(ask.answer, []).append(ask)
        together["between"] += ([asks] for asks in betweens(scene, context.image, draw))
        for asks in bindings(scene, context.image):
            yes, no = (ask.values["a"] for ask in asks)
            crossed[frozenset((yes, no))][yes].append(asks)
    for kind, texts in by_text.items():
        for answers in texts.values():
            together[kind] += ([asks] for asks in _one_of_each(answers, kind, draw))
    for ways in crossed.values():
        if len(ways) == 2:
            together["binding"] += _meet(list(ways.values()), draw)
    return {kind: _some(found, each, draw) for kind, found in together.items()}


# ---- what a scene's boxes answer ----


def sides(scene: Scene, image: str) -> Iterator[Ask]:
    """On which side of b is a? Where only one direction is clear."""
    for a, b in scene.pairs:
        word = side(a, b)
        for kind in ("left/right", "above/below"):
            if word in kind.split("/") and _seen(a, b):
                yield Ask(kind, "side", {"a": a.name.plain, "b": b.name.plain}, word, tuple(kind.split("/")), image)


def insides(scene: Scene, image: str) -> Iterator[Ask]:
    """Is a's box within b's? No is said of boxes that do not touch."""
    for a, b in scene.pairs:
        box, other = a.box, b.box
        within = other.x1 <= box.x1 and box.x2 <= other.x2 and other.y1 <= box.y1 and box.y2 <= other.y2
        apart = box.x2 < other.x1 or other.x2 < box.x1 or box.y2 < other.y1 or other.y2 < box.y1
        if (within or apart) and _seen(a, b):
            yield Ask("inside", "inside", {"a": a.name.plain, "b": b.name.plain}, "yes" if within else "no",
                      ("yes", "no"), image)


def betweens(scene: Scene, image: str, draw: random.Random) -> Iterator[list[Ask]]:
    """Is the middle one of three things in a line between the others? Is an outer one?"""
    for a, c, b in permutations(scene.unique[:8], 3):
        if scene.unique.index(a) < scene.unique.index(b) and _between(c, a, b) and _seen(a, b, c):
            names = [thing.name.plain for thing in draw.sample((a, b), 2)]
            middle, outer, other = c.name.plain, *names
            yes, no = {"c": middle, "a": outer, "b": other}, {"c": outer, "a": middle, "b": other}
            yield [Ask("between", "between", values, answer, ("yes", "no"), image)
                   for values, answer in ((yes, "yes"), (no, "no"))]


def counts(scene: Scene, image: str) -> Iterator[Ask]:
    """How many are there? None is not asked for, for that is a question of existence."""
    groups = [*scene.groups, *([Count(len(scene.objects), OBJECT)] if scene.shapes else [])]
    for count in groups:
        counted = [thing for thing in scene.objects if _is(thing.name, count.name)]
        if 1 <= count.number <= len(NUMBERS) and _seen(*counted):
            number = NUMBERS[count.number - 1]
            yield Ask("counting", "count", {"n": Count(2, count.name)}, number, NUMBERS, image)


def bindings(scene: Scene, image: str) -> Iterator[list[Ask]]:
    """Beside a blue square: is there a red circle? Is there a red square? The first is there, and nothing like the
    second, nor a blue circle."""
    names = list(dict.fromkeys(thing.name.plain for thing in scene.objects if _seen(thing)))
    there = {thing.name.plain for thing in scene.objects} | set(scene.crowds)
    for one, other in permutations(names, 2):
        crossed = _cross(one, other), _cross(other, one)
        if all(crossed) and not there & set(crossed):
            yield [Ask("binding", "exists", {"a": name}, answer, ("yes", "no"), image)
                   for name, answer in ((one, "yes"), (crossed[0], "no"))]


def _between(c: SceneObject, a: SceneObject, b: SceneObject) -> bool:
    """Whether `c` stands on the way from `a` to `b`, near its middle and its line."""
    x, y = b.x - a.x, b.y - a.y
    length = (x * x + y * y) ** 0.5
    if side(a, c) != side(c, b) or not side(a, c) or length < 0.3:
        return False
    along = ((c.x - a.x) * x + (c.y - a.y) * y) / length**2
    off = abs((c.x - a.x) * y - (c.y - a.y) * x) / length**2
    return 0.25 <= along <= 0.75 and off <= 0.15


def _seen(*things: SceneObject) -> bool:
    return all((t.box.x2 - t.box.x1) * (t.box.y2 - t.box.y1) >= SMALLEST for t in things)


def _is(name: Name, group: Name) -> bool:
    return group.colour in ("", name.colour) and group.noun in ("object", name.noun)


def _cross(one: Name, other: Name) -> Name | None:
    """A red square, of a red circle and a blue square; nothing if they share a word, or one of them has but one."""
    (first, noun), (second, its) = map(_words, (one, other))
    if not (noun and its) or first == second or noun == its:
        return None
    return Name(its, first) if one.colour else Name(f"{first} {its}")


def _words(name: Name) -> tuple[str, str]:
    """Colour and noun, or the two words of a category."""
    if name.colour:
        return name.colour, name.noun
    first, _, second = name.noun.partition(" ")
    return first, second


# ---- from questions to sets ----


def _one_of_each(answers: Mapping[str, list[Ask]], kind: str, draw: random.Random) -> list[list[Ask]]:
    """Sets of one text: a picture for each answer. Of numbers those are asked for that leave most questions."""
    by_number = sorted(answers.values(), key=len, reverse=True)
    if kind == "counting":
        sizes = [count * len(asks) for count, asks in enumerate(by_number, 1)][1:]
        by_number = by_number[: sizes.index(max(sizes)) + 2] if sizes else []
        choices = tuple(number for number in NUMBERS if any(asks[0].answer == number for asks in by_number))
    else:
        choices = by_number[0][0].choices
    if len(by_number) < len(choices) or len(choices) < 2:
        return []
    found = _meet(by_number, draw)
    return [[Ask(ask.kind, ask.key, ask.values, ask.answer, choices, ask.image) for ask in asks] for asks in found]


def _meet(groups: Sequence[list], draw: random.Random) -> list[list]:
    """One of each group at a time, while all have one."""
    return [list(asks) for asks in zip(*(draw.sample(group, len(group)) for group in groups), strict=False)]


def _some(together: Sequence[list[list[Ask]]], each: int, draw: random.Random) -> list[list[Ask]]:
    taken: list[list[Ask]] = []
    count = 0
    for sets in draw.sample(together, len(together)):
        size = sum(map(len, sets))
        if count + size <= each:
            taken += sets
            count += size
    return taken
