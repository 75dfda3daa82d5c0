"""Measures precision and recall of the check of answers against captions and boxes.

    python scripts/bench_evidence.py [--scenes 1000] [--show 5]
    python scripts/bench_evidence.py --labelled tests/synthesize/labelled_answers.json

In the first, the rules teacher answers about scenes, and about pictures of COCO's categories with made-up boxes. Each
answer is checked unchanged, and once more with one error: a number, left and right (or above and below) exchanged, an
absent object, or a colour. The second reads answers in free text that were labelled by hand.

Precision is the share of flagged answers that are wrong. Recall is the share of wrong answers that are flagged.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import Context
from llava_jax.synthesize import evidence, parse
from llava_jax.synthesize.rules import RulesTeacher

KINDS = ("conversation", "detail_description", "complex_reasoning")
SHAPES = tuple(f"{colour} {shape}" for colour, shape in scenes.PAIRS)
THINGS = ("person", "bicycle", "car", "bus", "boat", "traffic light", "bench", "bird", "cat", "dog", "horse", "sheep",
          "cow", "umbrella", "suitcase", "frisbee", "kite", "skateboard", "bottle", "cup", "knife", "bowl", "banana",
          "sandwich", "chair", "couch", "potted plant", "tv", "laptop", "cell phone", "clock", "vase")  # fmt: skip
NUMBERS = "one two three four five six seven eight nine ten".split()
OPPOSITE = {"left": "right", "above": "below", "higher up": "lower down", "upper": "lower", "top": "bottom"}
OPPOSITE |= {other: word for word, other in OPPOSITE.items()}
# Words that suppose, deny or conclude. A changed sentence with them would not contradict the picture.
NO_FACT = re.compile(r"\b(?:would|if|more|leaves|makes?|left over|(?:is|are) left|none?|not|nothing|empty|swaps?"
                     r"|changes?|counting|from|so|without|yes)\b", re.I)  # fmt: skip


def shapes(number: int, rng: random.Random) -> Context:
    objects = scenes.sample(rng)
    size = scenes.SIZE
    boxes = [
        Box(f"{o.colour} {o.shape}", x / size, y / size, (x + w) / size, (y + h) / size)
        for o in objects
        for x, y, w, h in [o.box]
    ]
    return Context(str(number), "", tuple(scenes.captions(objects)), tuple(boxes))


def things(number: int, rng: random.Random) -> Context:
    """Makes a context with two to seven boxes of up to five categories, which the caption does not mention."""
    boxes = []
    categories = rng.sample(THINGS, 5)
    for _ in range(rng.randint(2, 7)):
        width, height = rng.uniform(0.05, 0.5), rng.uniform(0.05, 0.5)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        boxes.append(Box(rng.choice(categories), x, y, x + width, y + height))
    return Context(str(number), "", ("A view of the place on an ordinary day.",), tuple(boxes))


# ---- one error: each function returns the changed sentence, or None if there is nothing to change ----


def wrong_count(sentence: str, context: Context, rng: random.Random) -> str | None:
    found = list(re.finditer(rf"\b(?:{'|'.join(NUMBERS[1:])})\b(?! of)", sentence, re.I))
    if not found:
        return None
    match = rng.choice(found)
    number = NUMBERS.index(match[0].lower())
    return _put(sentence, match, NUMBERS[number + rng.choice((-1, 1)) if number < 9 else 8])


def swapped(sentence: str, context: Context, rng: random.Random) -> str | None:
    words = [word for word in OPPOSITE if re.search(rf"\b{word}\b", sentence, re.I)]
    if not words:
        return None
    one = rng.choice(words)
    other = OPPOSITE[one]
    if re.search(rf"\b{other}\b", sentence, re.I):
        return None
    return re.sub(rf"\b{one}\b", lambda m: _like(m[0], other), sentence, flags=re.I)


def absent_object(sentence: str, context: Context, rng: random.Random) -> str | None:
    """Replaces the name of an object by that of an absent category (for shapes, by another shape)."""
    names = {box.category for box in context.boxes}
    nouns = {name.rpartition(" ")[2] for name in names}
    found = list(re.finditer(rf"\b(?:{'|'.join(sorted(names, key=len, reverse=True))})\b", sentence, re.I))
    absent = [c for c in (SHAPES if next(iter(names)) in SHAPES else THINGS) if c.rpartition(" ")[2] not in nouns]
    return _put(sentence, rng.choice(found), rng.choice(absent)) if found and absent else None


def wrong_colour(sentence: str, context: Context, rng: random.Random) -> str | None:
    found = list(re.finditer(rf"\b({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})\b", sentence, re.I))
    if not found:
        return None
    match = rng.choice(found)
    names = {box.category for box in context.boxes}
    colours = [colour for colour in scenes.COLOURS if f"{colour} {match[2].lower()}" not in names]
    return _put(sentence, match, f"{rng.choice(colours)} {match[2]}")


CORRUPTIONS = {
    "count": wrong_count,
    "left/right, above/below": swapped,
    "absent object": absent_object,
    "colour": wrong_colour,
}


def corrupt(
    turns: tuple[parse.Turn, ...], context: Context, how: Callable, rng: random.Random
) -> tuple[parse.Turn, ...] | None:
    """Returns the turns with one factual sentence of the answers changed, or None if there is no such sentence."""
    candidates = []
    for index, turn in enumerate(turns):
        if turn["from"] == "gpt":
            parts = re.split(r"(?<=[.!?])\s+", turn["value"])
            candidates += [(index, parts, at) for at, part in enumerate(parts) if not NO_FACT.search(part)]
    rng.shuffle(candidates)
    for index, parts, at in candidates:
        if changed := how(parts[at], context, rng):
            value = " ".join([*parts[:at], _articles(changed), *parts[at + 1 :]])
            return (*turns[:index], turns[index] | {"value": value}, *turns[index + 1 :])
    return None


def _put(sentence: str, match: re.Match, word: str) -> str:
    return sentence[: match.start()] + _like(match[0], word) + sentence[match.end() :]


def _like(model: str, word: str) -> str:
    return word.capitalize() if model[0].isupper() else word


def _articles(text: str) -> str:
    return re.sub(r"\b(a)n? (?=\w)", lambda m: f"{m[1]}{'n' * (text[m.end()] in 'aeiou')} ", text, flags=re.I)


# ---- figures ----


def answers(make: Callable, number: int, seed: int) -> Iterator[tuple[tuple[parse.Turn, ...], Context]]:
    rng, teacher = random.Random(seed), RulesTeacher(seed=seed)
    for index in range(number):
        context = make(index, rng)
        for kind in KINDS:
            try:
                yield parse.parse(kind, teacher.answer(kind, context), question="What do you see?"), context
            except parse.Reject:
                continue


def structured(make: Callable, categories: tuple[str, ...], number: int, seed: int, show: int = 0) -> dict[str, tuple]:
    """Returns precision, recall and number of wrong answers for each kind of error, if half of the answers are wrong.

    Prints some answers that were judged falsely.
    """
    rng, results = random.Random(f"{seed} corrupt"), {name: [0, 0] for name in CORRUPTIONS}
    clean = flagged = 0
    for turns, context in answers(make, number, seed):
        found = evidence.check(turns, context, categories).findings
        clean, flagged = clean + 1, flagged + bool(found)
        if found and show:
            print("right, but flagged:", *found, [turn["value"] for turn in turns], sep="\n    ")
        for name, how in CORRUPTIONS.items():
            if wrong := corrupt(turns, context, how, rng):
                caught = bool(evidence.check(wrong, context, categories).findings)
                results[name][0] += caught
                results[name][1] += 1
                if show and not caught and rng.random() < show / number / 4:
                    changed = [(b["value"], a["value"]) for a, b in zip(turns, wrong, strict=True) if a != b]
                    print(f"not flagged ({name}):", *changed[0], sep="\n    ")
    rate = flagged / clean
    everything = [sum(column) for column in zip(*results.values(), strict=True)]
    return {
        name: (recall / (recall + rate) if recall + rate else 1.0, recall, of)
        for name, (right, of) in {**results, "all": everything}.items()
        if of
        for recall in [right / of]
    }


def labelled(path: str | Path, show: bool = False) -> tuple[float, float, int, int]:
    """Returns precision, recall, number of wrong answers and number of all answers of a file.

    The file is [{captions, boxes, right, wrong}]. Boxes are [category, x1, y1, x2, y2]. Right and wrong are lists of
    answers, or of [question, answer].
    """
    flagged = caught = wrong = total = 0
    for image in json.loads(Path(path).read_text()):
        context = Context("", "", tuple(image["captions"]), tuple(Box(*box) for box in image["boxes"]))
        for is_wrong, texts in ((False, image["right"]), (True, image["wrong"])):
            for text in texts:
                question, answer = text if isinstance(text, list) else ("What do you see?", text)
                turns = ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
                found = evidence.check(turns, context, evidence.COCO).findings
                total, wrong = total + 1, wrong + is_wrong
                flagged, caught = flagged + bool(found), caught + (bool(found) and is_wrong)
                if show and bool(found) != is_wrong:
                    print("missed:" if is_wrong else "right, but flagged:", question, answer, *found, sep="\n    ")
    return caught / max(flagged, 1), caught / max(wrong, 1), wrong, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print about N answers that were missed")
    parser.add_argument("--labelled", metavar="FILE", help="JSON list of {captions, boxes, right, wrong}")
    args = parser.parse_args()
    if args.labelled:
        precision, recall, wrong, total = labelled(args.labelled, bool(args.show))
        print(f"free text: precision {precision:.1%}, recall {recall:.1%} ({wrong} wrong of {total} answers)")
        return
    for name, make, categories in (("scenes", shapes, SHAPES), ("COCO's categories", things, evidence.COCO)):
        for what, (precision, recall, of) in structured(make, categories, args.scenes, args.seed, args.show).items():
            print(f"{name:<18} {what:<24} precision {precision:6.1%}  recall {recall:6.1%}  ({of:,} wrong answers)")


if __name__ == "__main__":
    main()
