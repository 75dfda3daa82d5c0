"""A rule-based teacher: instruction data from captions and boxes.

It stands in for GPT-4 of the paper (Visual Instruction Tuning, section 3), which never saw the picture either:
all that it reads is what a COCO data set says of an image, its captions and its boxes with their categories
("red circle"). It writes the paper's three kinds of record (conversation, detailed description, complex
reasoning) in LLaVA's JSON format, the image-caption pairs of stage 1, and the questions of the held-out test,
each labelled with its kind.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_jax.annotations.scene import LARGE
from llava_jax.files import read_json

KINDS = ("colour", "shape", "count", "position", "relation", "existence")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class GridObject:
    """One object as its box and category tell it; `row` and `column` of the 3 x 3 grid hold the box's centre."""

    colour: str
    shape: str
    size: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """One hyphenated word: "top-left", "top", ..., "centre"."""
        return "-".join(word for word in (_ROWS[self.row], _COLUMNS[self.column]) if word) or "centre"


@dataclass(frozen=True)
class QuestionAnswer:
    """`about`: the names of the objects that the question speaks of."""

    kind: str
    question: str
    answer: str
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotation:
    """What COCO says of one image."""

    image: str
    captions: tuple[str, ...]
    things: tuple[GridObject, ...]


def read_box(category: str, box: Sequence[float], width: float, height: float) -> GridObject:
    """A `GridObject` from a category ("red circle") and a COCO box [x, y, width, height] in pixels."""
    colour, _, shape = category.partition(" ")
    x, y, w, h = box
    size = "large" if max(w / width, h / height) >= LARGE else "small"
    return GridObject(
        colour,
        shape,
        size,
        row=min(int(3 * (y + h / 2) / height), 2),
        column=min(int(3 * (x + w / 2) / width), 2),
    )


def read_coco(folder: str | Path, split: str) -> tuple[list[Annotation], tuple[str, ...]]:
    """The annotations of a split in order of image id, and the names of its categories.

    Reads `folder/annotations/{captions,instances}_SPLIT.json`. Raises UserError where one is missing.
    """
    folder = Path(folder)
    captions, instances = (
        read_json(folder / "annotations" / f"{part}_{split}.json") for part in ("captions", "instances"))
    names = {category["id"]: category["name"] for category in instances["categories"]}
    images = {image["id"]: image for image in captions["images"]}
    texts: dict[int, list[str]] = {number: [] for number in images}
    things: dict[int, list[GridObject]] = {number: [] for number in images}
    for caption in captions["annotations"]:
        texts[caption["image_id"]].append(caption["caption"])
    for instance in instances["annotations"]:
        image = images[instance["image_id"]]
        things[image["id"]].append(
            read_box(names[instance["category_id"]], instance["bbox"], image["width"], image["height"])
        )
    annotations = [
        Annotation(f"{split}/{images[number]['file_name']}", tuple(texts[number]), tuple(things[number]))
        for number in sorted(images)
    ]
    return annotations, tuple(names.values())


# ---- short questions, by kind: each returns every question that it can ask, or one drawn at random ----


def _unique(things: Sequence[GridObject], key: Callable) -> list[GridObject]:
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def colour(things: Sequence[GridObject], rng: random.Random) -> QuestionAnswer:
    """By the shape where only one object has it, otherwise by the place."""
    subject = rng.choice(things)
    phrase = _phrase(
        subject, things, rng, (("shape",), ("size", "shape")), fallback=f"object at the {subject.place}"
    )
    return QuestionAnswer("colour", f"What colour is the {phrase}?", subject.colour, (subject.name,))


def shape(things: Sequence[GridObject], rng: random.Random) -> QuestionAnswer:
    """By the colour where only one object has it, otherwise by the place."""
    subject = rng.choice(things)
    phrase = _phrase(
        subject, things, rng, (("colour",), ("size", "colour")), fallback=f"object at the {subject.place}"
    )
    return QuestionAnswer("shape", f"What shape is the {phrase}?", subject.shape, (subject.name,))


def _phrase(
    subject: GridObject, things: Sequence[GridObject], rng: random.Random, ways: Sequence[tuple], fallback: str
) -> str:
    """Words that fit `subject` alone: one of `ways` (attributes to name) that is unique, or the fallback."""
    usable = [
        way
        for way in ways
        if sum(all(getattr(thing, a) == getattr(subject, a) for a in way) for thing in things) == 1
    ]
    if not usable or rng.random() < 0.4:
        return fallback
    way = rng.choice(usable)
    return " ".join(getattr(subject, attribute) for attribute in way) + ("" if "shape" in way else " object")


def count(things: Sequence[GridObject], rng: random.Random, categories: Sequence[str]) -> QuestionAnswer:
    """All objects, those of a colour or those of a shape; the answer is drawn first, so that none prevails."""
    colours, shapes = Counter(thing.colour for thing in things), Counter(thing.shape for thing in things)
    options: dict[int, list[str]] = {len(things): ["objects"] * 2}
    for word, number in colours.items():
        options.setdefault(number, []).append(f"{word} objects")
    for word, number in shapes.items():
        options.setdefault(number, []).append(_plural(word))
    if rng.random() < 0.5:
        absent = rng.choice([name.split(" ") for name in categories])
        none = [f"{absent[0]} objects"] * (absent[0] not in colours) + [_plural(absent[1])] * (
            absent[1] not in shapes
        )
        options |= {0: none} if none else {}
    answer = rng.choice(sorted(options))
    return QuestionAnswer("count", f"How many {rng.choice(options[answer])} are there?", NUMBERS[answer])


def _plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def position(things: Sequence[GridObject], rng: random.Random) -> QuestionAnswer | None:
    """Only of an object that its colour and shape tell from all others."""
    named = _unique(things, lambda thing: thing.name)
    if not named:
        return None
    subject = rng.choice(named)
    phrase = _phrase(subject, things, rng, (("shape",), ("colour",)), fallback=subject.name)
    return QuestionAnswer("position", f"Where is the {phrase}?", subject.place, (subject.name,))


def relation(things: Sequence[GridObject], rng: random.Random) -> QuestionAnswer | None:
    """Only of two objects in one row or in one column, where a single answer is right."""
    named = _unique(things, lambda thing: thing.name)
    pairs = [(a, b) for a in named for b in named if a != b and (a.row == b.row) != (a.column == b.column)]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return QuestionAnswer("relation", f"On which side of the {b.name} is the {a.name}?", side(a, b), (a.name, b.name))


def side(a: GridObject, b: GridObject) -> str:
    """Where `a` is, seen from `b`, which shares its row or column."""
    if a.row == b.row:
        return "left" if a.column < b.column else "right"
    return "above" if a.row < b.row else "below"


def existence(things: Sequence[GridObject], rng: random.Random, categories: Sequence[str]) -> QuestionAnswer:
    """Yes and no alike often; a "no" names mostly the colour of one object and the shape of another."""
    present = {thing.name for thing in things}
    if rng.random() < 0.5:
        name = rng.choice(sorted(present))
        return QuestionAnswer("existence", f"Is there a {name}?", "yes", (name,))
    absent = [name for name in categories if name not in present]
    shares = [
        sum(
            word in (getattr(thing, field) for thing in things)
            for word, field in zip(name.split(" "), ("colour", "shape"), strict=True)
        )
        for name in absent
    ]
    hardest = [name for name, share in zip(absent, shares, strict=True) if share == max(shares)]
    hard = [name for name, share in zip(absent, shares, strict=True) if share]
    name = rng.choice(hardest if rng.random() < 0.5 else hard)
    return QuestionAnswer("existence", f"Is there a {name}?", "no", (name,))


def ask(
    kind: str, things: Sequence[GridObject], rng: random.Random, categories: Sequence[str]
) -> QuestionAnswer | None:
    """A question of this kind, or None where the scene allows none."""
    if kind in ("count", "existence"):
        return {"count": count, "existence": existence}[kind](things, rng, categories)
    return {"colour": colour, "shape": shape, "position": position, "relation": relation}[kind](things, rng)


# ---- records ----


def conversation(
    things: Sequence[GridObject], rng: random.Random, categories: Sequence[str], turns: int
) -> list[QuestionAnswer]:
    """Different short questions about one scene: the kinds take turns, those of several objects where there are
    some.
    """
    asked: dict[str, QuestionAnswer] = {}
    kinds = rng.sample(KINDS, len(KINDS))
    for attempt in range(4 * turns):
        question = ask(kinds[attempt % len(kinds)], things, rng, categories)
        if question:
            asked.setdefault(question.question, question)
        if len(asked) == turns:
            break
    found = list(asked.values())
    rng.shuffle(found)
    return found


def detail(annotation: Annotation, rng: random.Random) -> QuestionAnswer:
    """A detailed description: how many objects, what each is and where, and what stands beside what."""
    things = annotation.things
    number = "is one object" if len(things) == 1 else f"are {NUMBERS[len(things)]} objects"
    text = [f"There {number}."] + [f"A {thing.size} {thing.name} is at the {thing.place}." for thing in things]
    named = _unique(things, lambda thing: thing.name)
    pairs = [(a, b) for a in named for b in named if a != b and (a.row == b.row) != (a.column == b.column)]
    if pairs:
        text.append(_relation_sentence(*rng.choice(pairs)))
    return QuestionAnswer(
        "detail",
        rng.choice(("Describe the picture in detail.", "What do you see? Tell me everything.")),
        " ".join(text),
    )


def _relation_sentence(a: GridObject, b: GridObject) -> str:
    word = side(a, b)
    return f"The {a.name} is {word if word in ('above', 'below') else f'{word} of'} the {b.name}."


def caption(annotation: Annotation, rng: random.Random) -> QuestionAnswer:
    return QuestionAnswer(
        "caption",
        rng.choice(("Describe the picture.", "What is in the picture?")),
        rng.choice(annotation.captions),
    )


def reasoning(things: Sequence[GridObject], rng: random.Random) -> QuestionAnswer | None:
    """A question whose answer takes a comparison or an inference, and says how it is reached."""
    named = _unique(things, lambda thing: thing.name)
    options = []
    if len(named) >= 2:
        a, b = rng.sample(named, 2)
        same = a.shape == b.shape
        options.append(
            (
                f"Do the {a.name} and the {b.name} have the same shape?",
                f"Yes, because both are {_plural(a.shape)}."
                if same
                else f"No, because one is a {a.shape} and the other a {b.shape}.",
            )
        )
        larger = a if a.size == "large" else b
        if a.size != b.size:
            options.append(
                (
                    f"Which is larger, the {a.name} or the {b.name}?",
                    f"The {larger.name}, because it is large and the other is small.",
                )
            )
        if a.row != b.row:
            higher, lower = sorted((a, b), key=lambda thing: thing.row)
            options.append(
                (
                    f"Which is higher, the {a.name} or the {b.name}?",
                    f"The {higher.name}, because it is at the {higher.place} and the other at the {lower.place}.",
                )
            )
    if named:
        gone = rng.choice(named)
        left = len(things) - 1
        options.append(
            (
                f"How many objects are left without the {gone.name}?",
                f"There {'is one object' if len(things) == 1 else f'are {NUMBERS[len(things)]} objects'}, so "
                f"without it {NUMBERS[left]} {'is' if left == 1 else 'are'} left.",
            )
        )
    return QuestionAnswer("reasoning", *rng.choice(options)) if options else None


def record(number: int, annotation: Annotation, questions: Sequence[QuestionAnswer]) -> dict:
    """One record of LLaVA's JSON; the picture stands before the first question."""
    turns = []
    for index, question in enumerate(questions):
        turns.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + question.question})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": f"{number:07d}", "image": annotation.image, "conversations": turns}


def write_captions(coco: str | Path, split: str, out_file: str | Path, *, seed: int = 0) -> int:
    """Stage 1: one record per image, one of its captions. Returns the number of records."""
    annotations, _ = read_coco(coco, split)
    rng = random.Random(f"{seed} captions {split}")
    records = [record(i, annotation, [caption(annotation, rng)]) for i, annotation in enumerate(annotations)]
    Path(out_file).write_text(json.dumps(records))
    return len(records)


def write_instructions(
    coco: str | Path, split: str, out_file: str | Path, *, turns: int = 10, long: float = 0.15, seed: int = 0
) -> int:
    """Stage 2: a conversation of short answers about each image; for the part `long` of the images it ends with
    a detailed description or with reasoning. Returns the number of records."""
    annotations, categories = read_coco(coco, split)
    rng = random.Random(f"{seed} instructions {split}")
    records = []
    for i, annotation in enumerate(annotations):
        questions = conversation(annotation.things, rng, categories, turns)
        if rng.random() < long:
            extra = reasoning(annotation.things, rng) if rng.random() < 0.5 else detail(annotation, rng)
            questions = [*questions[: turns // 2], *([extra] if extra else [])]
        records.append(record(i, annotation, questions))
    Path(out_file).write_text(json.dumps(records))
    return len(records)


def write_questions(
    coco: str | Path,
    split: str,
    out_file: str | Path,
    *,
    per_image: int = 6,
    about: Sequence[str] = (),
    seed: int = 0,
) -> int:
    """The held-out test: JSON lines of {question_id, image, text, answer, kind}; one question of each kind per
    image where the scene allows it, at most `per_image`. `about`: where given, only questions that speak of one
    of these categories (counting aside). Returns the number of questions."""
    annotations, categories = read_coco(coco, split)
    rng = random.Random(f"{seed} questions {split}")
    lines = []
    for annotation in annotations:
        for kind in rng.sample(KINDS, len(KINDS))[:per_image]:
            for _ in range(30 if about and kind != "count" else 1):
                question = ask(kind, annotation.things, rng, categories)
                if question and (not about or kind == "count" or set(about) & set(question.about)):
                    break
            else:
                question = None
            if question:
                lines.append(
                    {
                        "question_id": len(lines),
                        "image": annotation.image,
                        "text": question.question,
                        "answer": question.answer,
                        "kind": kind,
                    }
                )
    Path(out_file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)
