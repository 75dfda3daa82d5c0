"""Makes the questions of the probes from boxes, so that only the image answers them.

Questions form sets, and each set has every possible answer once. Most sets are one text about several images: the dog
is left of the cat in one image, right of it in another. So a model that reads only the text does not beat guessing. If
a set has a single image, its texts differ only in the order of their words.
"""

import dataclasses
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from llava_jax.annotations.context import AnnotationSource, Context, open_contexts
from llava_jax.annotations.scene import OBJECT, Count, Name, Scene, SceneObject, is_between, side
from llava_jax.errors import UserError
from llava_jax.evaluate.probes.wording import LANGUAGES, NUMBERS, wording
from llava_jax.files import make_folder, write_json_lines

FILE = "probes.jsonl"
KINDS = ("left/right", "above/below", "inside", "between", "order", "counting", "binding")
MIN_BOX_AREA = 0.005
"""Minimum share of the image that a box must cover, because 24 x 24 patches hardly show smaller objects."""


@dataclass(frozen=True)
class ProbesData:
    """Makes the questions of the probes `spatial` and `multilingual` from boxes, as OUT/probes.jsonl."""

    out: str
    """Folder for probes.jsonl; the names of images are relative to it, or later to --image-root."""
    captions: str = ""
    """COCO's captions_*.json, for the list of images."""
    instances: str = ""
    """COCO's instances_*.json of the same split."""
    data: str = ""
    """Data instead of COCO's files: JSON lines of {image, captions, boxes, width, height}, or a TFDS data set like
    coco_captions."""
    prefix: str = ""
    """Prefix of the names of images, such as val2017/."""
    each: int = 500
    """Maximum number of questions of each kind."""
    seed: int = 0
    """Random seed for the images that form a set, and for the choice of sets."""

    def run(self) -> int:
        contexts = open_contexts(AnnotationSource(captions=self.captions, instances=self.instances, data=self.data,
                                        prefix=self.prefix, names="file"))
        if not contexts.has_boxes:
            raise UserError(f"{contexts.files[0]}: the probes are made from boxes, and the source gives none")
        counts = write_probes(contexts, self.out, self.each, self.seed)
        print(", ".join(f"{kind} {count:,}" for kind, count in counts.items()) + f" questions in {self.out}/{FILE}")
        return 0


@dataclass(frozen=True)
class ProbeQuestion:
    """A question about one image. `key` selects the text, `values` are the names in it."""

    kind: str
    key: str
    values: Mapping[str, Name | Count]
    answer: str
    choices: tuple[str, ...]
    image: str


def write_probes(contexts: Iterable[Context], folder: str, each: int, seed: int = 0) -> dict[str, int]:
    """Writes `folder`/probes.jsonl. Returns the number of its questions of each kind.

    A line has {question_id, image, text, answer, choices, category, set} and, if all names have Korean words, the
    Korean question as `ko`: {text, answer, choices}. Raises UserError if the boxes allow no question.
    """
    sets = make_sets(contexts, each, seed)
    if not any(sets.values()):
        raise UserError("the boxes allow no question: no two pictures of them differ in one answer alone")
    lines = []
    for kind, found in sets.items():
        for number, asks in enumerate(found):
            for ask in asks:
                wordings = {language: wording(language, ask.key, ask.values, ask.answer, ask.choices)
                            for language in LANGUAGES}
                line = {"question_id": len(lines), "image": ask.image, **wordings.pop("en"), "category": kind,
                        "set": f"{kind} {number}"}
                lines.append(line | {language: row for language, row in wordings.items() if row})
    make_folder(folder)
    write_json_lines(os.path.join(folder, FILE), lines)
    return {kind: sum(map(len, found)) for kind, found in sets.items() if found}


def make_sets(contexts: Iterable[Context], each: int, seed: int = 0) -> dict[str, list[list[ProbeQuestion]]]:
    """Returns sets of questions by kind, with at most `each` questions of a kind.

    `together` has, by kind, groups of sets that are chosen together, because only the group has every text with
    each answer.
    """
    draw = random.Random(seed)
    by_text: dict[str, dict[Any, dict[str, list[ProbeQuestion]]]] = {kind: {} for kind in KINDS}
    together: dict[str, list[list[list[ProbeQuestion]]]] = {kind: [] for kind in KINDS}
    crossed: dict[Any, dict[Any, list[list[ProbeQuestion]]]] = defaultdict(lambda: defaultdict(list))
    for context in contexts:
        scene = Scene(context)
        for ask in (*sides(scene, context.image), *insides(scene, context.image), *counts(scene, context.image)):
            text = tuple(ask.values.items())
            by_text[ask.kind].setdefault(text, {}).setdefault(ask.answer, []).append(ask)
        together["between"] += ([asks] for asks in betweens(scene, context.image, draw))
        together["order"] += ([asks] for asks in orders(scene, context.image, draw))
        for asks in bindings(scene, context.image):
            yes, no = (ask.values["a"] for ask in asks)
            crossed[frozenset((yes, no))][yes].append(asks)
    for kind, texts in by_text.items():
        for answers in texts.values():
            together[kind] += ([asks] for asks in _one_of_each(answers, kind, draw))
    for directions in crossed.values():
        if len(directions) == 2:
            together["binding"] += _zip_random(list(directions.values()), draw)
    return {kind: _choose(found, each, draw) for kind, found in together.items()}


# ---- questions that a scene's boxes answer ----


def sides(scene: Scene, image: str) -> Iterator[ProbeQuestion]:
    """Yields "On which side of b is a?" for pairs with one clear direction."""
    for a, b in scene.pairs:
        word = side(a, b)
        for kind in ("left/right", "above/below"):
            if word in kind.split("/") and _are_large(a, b):
                names = {"a": a.name.plain, "b": b.name.plain}
                yield ProbeQuestion(kind, "side", names, word, tuple(kind.split("/")), image)


def insides(scene: Scene, image: str) -> Iterator[ProbeQuestion]:
    """Yields "Is a within b?" for boxes inside another (yes) and boxes that do not touch (no)."""
    for a, b in scene.pairs:
        box, other = a.box, b.box
        within = other.x1 <= box.x1 and box.x2 <= other.x2 and other.y1 <= box.y1 and box.y2 <= other.y2
        disjoint = box.x2 < other.x1 or other.x2 < box.x1 or box.y2 < other.y1 or other.y2 < box.y1
        if (within or disjoint) and _are_large(a, b):
            yield ProbeQuestion("inside", "inside", {"a": a.name.plain, "b": b.name.plain}, "yes" if within else "no",
                      ("yes", "no"), image)


def betweens(scene: Scene, image: str, draw: random.Random) -> Iterator[list[ProbeQuestion]]:
    """Yields two questions about three objects in a line: is the middle one between the others, is an outer one?"""
    for a, c, b in permutations(scene.unique[:8], 3):
        if scene.unique.index(a) < scene.unique.index(b) and is_between(c, a, b) and _are_large(a, b, c):
            names = [thing.name.plain for thing in draw.sample((a, b), 2)]
            middle, outer, other = c.name.plain, *names
            yes, no = {"c": middle, "a": outer, "b": other}, {"c": outer, "a": middle, "b": other}
            yield [ProbeQuestion("between", "between", values, answer, ("yes", "no"), image)
                   for values, answer in ((yes, "yes"), (no, "no"))]


def orders(scene: Scene, image: str, draw: random.Random) -> Iterator[list[ProbeQuestion]]:
    """Yields two questions about three objects: is this their order from left to right, is another?"""
    for row in scene.rows:
        if _are_large(*row):
            names = tuple(thing.name.plain for thing in row)
            wrong = draw.choice([other for other in permutations(names) if other != names])
            yield [ProbeQuestion("order", "order", dict(zip("abc", order, strict=True)), answer, ("yes", "no"), image)
                   for order, answer in ((names, "yes"), (wrong, "no"))]


def counts(scene: Scene, image: str) -> Iterator[ProbeQuestion]:
    """Yields "How many are there?" for one to four objects. Zero would be a question of existence."""
    groups = [*scene.groups, *([Count(len(scene.objects), OBJECT)] if scene.shapes else [])]
    for count in groups:
        counted = [thing for thing in scene.objects if count.name.covers(thing.name)]
        if 1 <= count.number <= len(NUMBERS) and _are_large(*counted):
            number = NUMBERS[count.number - 1]
            yield ProbeQuestion("counting", "count", {"n": Count(2, count.name)}, number, NUMBERS, image)


def bindings(scene: Scene, image: str) -> Iterator[list[ProbeQuestion]]:
    """Yields "Is there a red circle?" (yes) and "Is there a red square?" (no) for images with a blue square.

    The image has no red square and no blue circle."""
    names = list(dict.fromkeys(thing.name.plain for thing in scene.objects if _are_large(thing)))
    there = {thing.name.plain for thing in scene.objects} | set(scene.crowds)
    for one, other in permutations(names, 2):
        crossed = _cross(one, other), _cross(other, one)
        if all(crossed) and not there & set(crossed):
            yield [ProbeQuestion("binding", "exists", {"a": name}, answer, ("yes", "no"), image)
                   for name, answer in ((one, "yes"), (crossed[0], "no"))]


def _are_large(*things: SceneObject) -> bool:
    return all((t.box.x2 - t.box.x1) * (t.box.y2 - t.box.y1) >= MIN_BOX_AREA for t in things)


def _cross(one: Name, other: Name) -> Name | None:
    """Returns "red square" for a red circle and a blue square, None if they share a word or one has one word."""
    (first, noun), (second, its) = map(_words, (one, other))
    if not (noun and its) or first == second or noun == its:
        return None
    return Name(its, first) if one.colour else Name(f"{first} {its}")


def _words(name: Name) -> tuple[str, str]:
    """Returns colour and noun, or the two words of a category."""
    if name.colour:
        return name.colour, name.noun
    first, _, second = name.noun.partition(" ")
    return first, second


# ---- from questions to sets ----


def _one_of_each(answers: Mapping[str, list[ProbeQuestion]], kind: str, draw: random.Random
                 ) -> list[list[ProbeQuestion]]:
    """Returns sets of one text with an image for each answer. For counting, it uses the numbers with most questions."""
    by_number = sorted(answers.values(), key=len, reverse=True)
    if kind == "counting":
        sizes = [count * len(asks) for count, asks in enumerate(by_number, 1)][1:]
        by_number = by_number[: sizes.index(max(sizes)) + 2] if sizes else []
        choices = tuple(number for number in NUMBERS if any(asks[0].answer == number for asks in by_number))
    else:
        choices = by_number[0][0].choices
    if len(by_number) < len(choices) or len(choices) < 2:
        return []
    return [[dataclasses.replace(ask, choices=choices) for ask in asks] for asks in _zip_random(by_number, draw)]


def _zip_random(groups: Sequence[list], draw: random.Random) -> list[list]:
    """Returns lists with one random item of each group, as long as all groups have one."""
    return [list(asks) for asks in zip(*(draw.sample(group, len(group)) for group in groups), strict=False)]


def _choose(together: Sequence[list[list[ProbeQuestion]]], each: int, draw: random.Random) -> list[list[ProbeQuestion]]:
    chosen: list[list[ProbeQuestion]] = []
    count = 0
    for sets in draw.sample(together, len(together)):
        size = sum(map(len, sets))
        if count + size <= each:
            chosen += sets
            count += size
    return chosen
