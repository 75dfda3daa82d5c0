"""Short answers about scenes of coloured shapes, and the miniature's data made of them.

The miniature's language backbone was trained on these texts. Their wording and the order of the random draws must stay.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from llava_jax.annotations.context import AnnotationSource, Context, Contexts, open_contexts
from llava_jax.annotations.scene import Name, Scene, SceneObject, coloured_name, side
from llava_jax.annotations.vocabulary import NUMBERS, plural
from llava_jax.synthesize.rules.phrases import PhraseTable

KINDS = ("colour", "shape", "count", "position", "relation", "existence")
DETAIL_SHARE = 0.15
"""Fraction of the miniature's conversations that end with a detailed description or with reasoning."""

_PHRASES = PhraseTable("en")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question and its answer.

    Attributes:
      kind: One of KINDS, "sign", "caption", "detail" or "reasoning".
      about: Names of the objects that the question is about.
      small: Whether the question is about small objects alone.
    """

    kind: str
    question: str
    answer: str
    about: tuple[str, ...] = ()
    small: bool = False


def ask(kind: str, scene: Scene, rng: random.Random, categories: Sequence[str]) -> QuestionAnswer | None:
    """Draws a question of one of the scene's `kinds`. Returns None if the scene allows none."""
    match kind:
        case "sign":
            colour, text = rng.choice(scene.signs)
            return _short("sign", a=colour, b=text)
        case "colour" | "shape":
            return _ask_attribute(kind, scene, rng)
        case "count":
            return _ask_count(scene, rng, categories)
        case "position":
            return _ask_position(scene, rng)
        case "relation":
            return _ask_relation(scene, rng)
    return _ask_existence(scene, rng, categories)


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """Returns KINDS, and "sign" if the scene has a sign."""
    return (*KINDS, "sign") if scene.signs else KINDS


def conversation(scene: Scene, rng: random.Random, categories: Sequence[str], turns: int) -> list[QuestionAnswer]:
    """Draws up to `turns` different short questions about a scene. The kinds take turns."""
    asked: dict[str, QuestionAnswer] = {}
    kinds = rng.sample(kinds := kinds_of(scene), len(kinds))
    for attempt in range(4 * turns):
        if question := ask(kinds[attempt % len(kinds)], scene, rng, categories):
            asked.setdefault(question.question, question)
        if len(asked) == turns:
            break
    drawn = list(asked.values())
    rng.shuffle(drawn)
    return drawn


def caption(context: Context, rng: random.Random) -> QuestionAnswer:
    """Draws a question for a caption, and one of the captions."""
    question, _ = _PHRASES.fill("caption", rng, text="")
    return QuestionAnswer("caption", question, rng.choice(context.captions))


def detail(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """Describes a scene in detail: the number of objects, the position of every object, and one relation."""
    text = [_say_total(scene)] + [_answer("object", a=o.name, p=o.position) for o in scene.objects]
    if pairs := _aligned_pairs(scene):
        a, b = rng.choice(pairs)
        word = side(a, b)
        text.append(_answer("beside" if word in ("left", "right") else "over", a=a.name.plain, b=b.name.plain, s=word))
    return QuestionAnswer("detail", *_PHRASES.fill("detail", rng, text=" ".join(text)))


def reasoning(scene: Scene, rng: random.Random) -> QuestionAnswer | None:
    """Draws a question whose answer takes a comparison or an inference and explains it."""
    options = []
    if len(scene.unique) >= 2:
        a, b = rng.sample(scene.unique, 2)
        names = {"a": a.name.plain, "b": b.name.plain}
        if a.name.noun == b.name.noun:
            options.append(_PHRASES.fill("same_shape", rng, **names, c=plural(a.name.noun)))
        else:
            options.append(_PHRASES.fill("other_shape", rng, **names, c=a.name.noun, d=b.name.noun))
        if a.name.size != b.name.size:
            larger = a if a.name.size == "large" else b
            options.append(_PHRASES.fill("larger", rng, **names, c=larger.name.plain))
        if a.down != b.down:
            high, low = sorted((a, b), key=lambda thing: thing.y)
            options.append(
                _PHRASES.fill("higher", rng, **names, c=high.name.plain, p=high.position, q=low.position))
    if scene.unique:
        removed = rng.choice(scene.unique).name.plain
        remaining = len(scene.objects) - 1
        options.append(_PHRASES.fill(
            "without", rng, a=removed, total=_say_total(scene).rstrip("."), n=NUMBERS[remaining],
            verb="is" if remaining == 1 else "are"))
    return QuestionAnswer("reasoning", *rng.choice(options)) if options else None


def _ask_attribute(kind: str, scene: Scene, rng: random.Random) -> QuestionAnswer:
    thing, other = rng.choice(scene.objects), {"colour": "noun", "shape": "colour"}[kind]
    phrase = _refer(thing, scene, rng, ((other,), ("size", other)), f"object at the {thing.position}")
    answer = thing.name.colour if kind == "colour" else thing.name.noun
    return _short(kind, thing, a=phrase, b=answer)


def _refer(
    thing: SceneObject, scene: Scene, rng: random.Random, ways: Sequence[tuple[str, ...]], fallback: str
) -> str:
    """Draws words that no other object matches: the attributes of one of `ways`, or the fallback."""
    def values(other: SceneObject, way: tuple[str, ...]) -> list[str]:
        return [getattr(other.name, attribute) for attribute in way]

    usable = [way for way in ways
              if sum(values(other, way) == values(thing, way) for other in scene.objects) == 1]
    if not usable or rng.random() < 0.4:
        return fallback
    way = rng.choice(usable)
    return " ".join(values(thing, way)) + ("" if "noun" in way else " object")


def _ask_count(scene: Scene, rng: random.Random, categories: Sequence[str]) -> QuestionAnswer:
    """Counts all objects, those of a colour or those of a shape. The answer is drawn first, so that none prevails."""
    options: dict[int, list[str]] = {len(scene.objects): ["objects"] * 2}
    for count in scene.groups:
        options.setdefault(count.number, []).append(plural(str(count.name)))
    if rng.random() < 0.5:
        colour, noun = rng.choice(categories).split(" ")
        shown = {str(count.name) for count in scene.groups}
        none = [plural(name) for name in (f"{colour} object", noun) if name not in shown]
        options |= {0: none} if none else {}
    number = rng.choice(sorted(options))
    return _short("count", a=rng.choice(options[number]), b=NUMBERS[number])


def _ask_position(scene: Scene, rng: random.Random) -> QuestionAnswer | None:
    if not scene.unique:
        return None
    thing = rng.choice(scene.unique)
    phrase = _refer(thing, scene, rng, (("noun",), ("colour",)), str(thing.name.plain))
    return _short("position", thing, a=phrase, b=thing.position)


def _ask_relation(scene: Scene, rng: random.Random) -> QuestionAnswer | None:
    """Asks only about objects in one row or column, for which a single side is right."""
    pairs = _aligned_pairs(scene)
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return _short("relation", a, b, a=a.name.plain, b=b.name.plain, s=side(a, b))


def _ask_existence(scene: Scene, rng: random.Random, categories: Sequence[str]) -> QuestionAnswer:
    """Draws yes and no equally often. A "no" mostly combines the colour of one object and the shape of another."""
    present = {str(thing.name.plain) for thing in scene.objects}
    if rng.random() < 0.5:
        name = rng.choice(sorted(present))
        return QuestionAnswer("existence", *_PHRASES.fill("existence", rng, a=name, b="yes"), (name,))
    words = {word for name in present for word in name.split(" ")}
    shares = {name: sum(word in words for word in name.split(" ")) for name in categories if name not in present}
    hardest = [name for name, share in shares.items() if share == max(shares.values())]
    hard = [name for name, share in shares.items() if share]
    name = rng.choice(hardest if rng.random() < 0.5 else hard)
    return QuestionAnswer("existence", *_PHRASES.fill("existence", rng, a=name, b="no"), (name,))


def _short(kind: str, *about: SceneObject, **texts: str | Name) -> QuestionAnswer:
    names = tuple(str(thing.name.plain) for thing in about)
    small = bool(about) and all(thing.name.size == "small" for thing in about)
    return QuestionAnswer(kind, *_PHRASES.fill(kind, **texts), names, small)


def _answer(key: str, **texts: str | Name) -> str:
    return _PHRASES.fill(key, **texts)[1]


def _say_total(scene: Scene) -> str:
    number = len(scene.objects)
    return _answer("total_one" if number == 1 else "total", n=NUMBERS[number])


def _aligned_pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject]]:
    """Returns ordered pairs of unique objects in one row or in one column, for which a single side is right."""
    return [(a, b) for a, b in permutations(scene.unique, 2)
            if (a.down == b.down) != (a.across == b.across) and side(a, b) in ("left", "right", "above", "below")]


def open_split(folder: str | Path, split: str) -> Contexts:
    """Opens a split that `drawn_scenes.write` has written. Raises UserError if a file is missing."""
    captions, instances = (
        str(Path(folder) / "annotations" / f"{part}_{split}.json") for part in ("captions", "instances"))
    return open_contexts(AnnotationSource(captions, instances, names="file", prefix=f"{split}/"))


def write_captions(folder: str | Path, split: str, out_file: str | Path, *, seed: int = 0) -> int:
    """Writes stage 1: a record with one caption for every image. Returns the number of records."""
    rng = random.Random(f"{seed} captions {split}")
    contexts = open_split(folder, split)
    return _write_records(out_file, contexts, ([caption(context, rng)] for context in contexts))


def write_instructions(
    folder: str | Path, split: str, out_file: str | Path, *, turns: int = 10, long: float = DETAIL_SHARE, seed: int = 0
) -> int:
    """Writes stage 2: a conversation of short answers about every image. Returns the number of records.

    A fraction `long` of the conversations is half as long, and ends with a detailed description or with reasoning.
    """
    rng = random.Random(f"{seed} instructions {split}")
    contexts = open_split(folder, split)

    def draw(scene: Scene) -> list[QuestionAnswer]:
        questions = conversation(scene, rng, _shape_names(contexts), turns)
        if rng.random() >= long:
            return questions
        last = reasoning(scene, rng) if rng.random() < 0.5 else detail(scene, rng)
        return [*questions[: turns // 2], *([last] if last else [])]

    return _write_records(out_file, contexts, (draw(Scene(context)) for context in contexts))


def write_questions(
    folder: str | Path, split: str, out_file: str | Path, *, per_image: int = 6, about: Sequence[str] = (),
    mark_small: bool = False, seed: int = 0,
) -> int:
    """Writes the held-out test as JSON lines, and returns the number of questions.

    A line has question_id, image, text, answer and kind. Every image gets one question of each kind that its scene
    allows, `per_image` at most. If `about` is given, questions other than counting are about one of these categories.
    With `mark_small`, the kind of a question about small objects alone is "small colour" and the like.
    """
    contexts = open_split(folder, split)
    rng = random.Random(f"{seed} questions {split}")
    lines: list[dict[str, Any]] = []
    for context in contexts:
        scene = Scene(context)
        for kind in rng.sample(kinds := kinds_of(scene), len(kinds))[:per_image]:
            is_free = not about or kind == "count"
            for _ in range(1 if is_free else 30):
                question = ask(kind, scene, rng, _shape_names(contexts))
                if question and (is_free or set(about) & set(question.about)):
                    small = "small " if mark_small and question.small else ""
                    lines.append({"question_id": len(lines), "image": context.image, "text": question.question,
                                  "answer": question.answer, "kind": small + kind})
                    break
    Path(out_file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _shape_names(contexts: Contexts) -> tuple[str, ...]:
    return tuple(name for name in contexts.categories if coloured_name(name))


def _write_records(out_file: str | Path, contexts: Contexts, drawn: Any) -> int:
    """Writes records of LLaVA's JSON, with the image before the first question."""
    records = []
    for number, (context, questions) in enumerate(zip(contexts, drawn, strict=True)):
        turns = []
        for question in questions:
            turns.append({"from": "human", "value": ("" if turns else "<image>\n") + question.question})
            turns.append({"from": "gpt", "value": question.answer})
        records.append({"id": f"{number:07d}", "image": context.image, "conversations": turns})
    Path(out_file).write_text(json.dumps(records))
    return len(records)
