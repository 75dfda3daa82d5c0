"""The miniature's data, written by the rules teacher about the splits of `drawn_scenes.write`."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.annotations.context import AnnotationSource, Context, Contexts, open_contexts
from llava_jax.annotations.scene import Scene, coloured_name
from llava_jax.files import write_file, write_json_lines
from llava_jax.synthesize.rules.teacher import SHORT_TURNS, QuestionAnswer, RulesTeacher, kinds_of

LONG_SHARE = 0.5
"""Fraction of the conversations that end with a description or with reasoning."""


def open_split(folder: str | Path, split: str) -> Contexts:
    """Opens a split that `drawn_scenes.write` has written. Raises UserError if a file is missing."""
    captions, instances = (
        str(Path(folder) / "annotations" / f"{part}_{split}.json") for part in ("captions", "instances"))
    return open_contexts(AnnotationSource(captions, instances, names="file", prefix=f"{split}/"))


def write_captions(folder: str | Path, split: str, out_file: str | Path, *, seed: int = 0) -> int:
    """Writes stage 1: a record with one caption for every image. Returns the number of records."""
    rng, teacher, contexts = random.Random(f"{seed} captions {split}"), RulesTeacher(), open_split(folder, split)
    return _write_records(out_file, [(context, [teacher.caption(context, rng)]) for context in contexts])


def write_instructions(
    folder: str | Path, split: str, out_file: str | Path, *, turns: int = SHORT_TURNS, long: float = LONG_SHARE,
    korean: float = 0.0, kinds: Sequence[str] = (), seed: int = 0,
) -> int:
    """Writes stage 2: a conversation of short answers about every image. Returns the number of records.

    A fraction `long` of the conversations is half as long, and ends with a description or with reasoning. A fraction
    `korean` of the conversations is in Korean. A larger fraction has the Korean records of a smaller one.
    """
    contexts, records = open_split(folder, split), []
    teachers, pairs = {language: RulesTeacher(language) for language in ("en", "ko")}, _pairs(contexts)
    for context in contexts:
        scene, rng = Scene(context), random.Random(f"{seed} instructions {split} {context.id}")
        teacher = teachers["ko" if rng.random() < korean else "en"]
        last = None
        if rng.random() < long:
            last = teacher.reasoning(scene, rng) if rng.random() < 0.5 else teacher.description(scene, rng)
        asked = teacher.conversation(scene, rng, turns // 2 if last else turns, kinds, pairs)
        records.append((context, [*asked, last] if last else asked))
    return _write_records(out_file, records)


def write_questions(
    folder: str | Path, split: str, out_file: str | Path, *, per_image: int = 6, about: Sequence[str] = (),
    mark_small: bool = False, language: str = "en", kinds: Sequence[str] = (), seed: int = 0,
) -> int:
    """Writes the held-out test as JSON lines, and returns the number of questions.

    A line has question_id, image, text, answer and kind. Every image gets one question of each kind that its scene
    allows, `per_image` at most. If `about` is given, questions other than counting are about one of these categories.
    With `mark_small`, the kind of a question about small objects alone is "small colour" and the like.
    """
    contexts, teacher = open_split(folder, split), RulesTeacher(language)
    rng, pairs = random.Random(f"{seed} questions {split}"), _pairs(contexts)
    lines: list[dict[str, Any]] = []
    for context in contexts:
        scene = Scene(context)
        possible = kinds or kinds_of(scene)
        asked = [teacher.question(kind, scene, rng, pairs, () if kind == "count" else about)
                 for kind in rng.sample(possible, len(possible))]
        for one in [one for one in asked if one][:per_image]:
            small = "small " if mark_small and one.small else ""
            lines.append({"question_id": len(lines), "image": context.image, "text": one.question,
                          "answer": one.answer, "kind": small + one.kind})
    write_json_lines(str(out_file), lines)
    return len(lines)


def _pairs(contexts: Contexts) -> list[tuple[str, str]]:
    return [(name.colour, name.noun) for category in contexts.categories if (name := coloured_name(category))]


def _write_records(out_file: str | Path, records: Sequence[tuple[Context, list[QuestionAnswer]]]) -> int:
    """Writes records of LLaVA's JSON, with the image before the first question."""
    rows = []
    for number, (context, questions) in enumerate(records):
        turns = []
        for question in questions:
            turns.append({"from": "human", "value": ("" if turns else "<image>\n") + question.question})
            turns.append({"from": "gpt", "value": question.answer})
        rows.append({"id": f"{number:07d}", "image": context.image, "conversations": turns})
    write_file(str(out_file), json.dumps(rows, ensure_ascii=False))
    return len(rows)
