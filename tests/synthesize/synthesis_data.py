"""A few images as JSON lines, settings that ask about them, and answers put into a log by hand."""

import json
import re
from pathlib import Path

from llava_jax.annotations.context import AnnotationSource
from llava_jax.endpoint.log import AnswerLog
from llava_jax.endpoint.request import Response
from llava_jax.synthesize.prompts import KINDS
from llava_jax.synthesize.synthesis import Synthesis, SynthesisSettings

ANIMALS = ("dog", "cat", "horse", "sheep", "cow", "bear", "zebra", "giraffe", "elephant", "bird")


def write_images(folder: Path, count: int = 10) -> Path:
    """Image i: an animal at the left and a chair at the right, with two captions that say so."""
    rows = []
    for i in range(count):
        animal = ANIMALS[i % len(ANIMALS)]
        rows.append({
            "id": f"{i:06d}", "image": f"{i:06d}.jpg", "width": 100, "height": 80,
            "captions": [f"A {animal} stands to the left of a chair.", f"Room {i} with a {animal} and a chair."],
            "boxes": [{"category": animal, "bbox": [5, 20, 30, 40]}, {"category": "chair", "bbox": [60, 20, 25, 50]}],
        })
    path = folder / "images.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_prompts(folder: Path) -> Path:
    """Short prompts with one example per kind, in the original's layout."""
    for kind in KINDS:
        place = folder / "prompts" / kind
        place.mkdir(parents=True, exist_ok=True)
        (place / "system_message.txt").write_text(f"Write a {kind}.")
        (place / "000_caps.txt").write_text("A cup on a table.")
        (place / "000_conv.txt").write_text("Question:\nWhat stands on the table?\n===\nAnswer:\nA cup stands on it.")
    (folder / "prompts" / "detail_description" / "questions.txt").write_text("Describe it.\nWhat is there to see?\n")
    return folder / "prompts"


def make_synthesis(folder: Path, images: int = 10, **settings) -> Synthesis:
    source = AnnotationSource(data=str(write_images(folder, images)))
    (folder / "out").mkdir(exist_ok=True)
    options = {"out": str(folder / "out"), "model": "teacher", "prompts": str(write_prompts(folder))}
    return Synthesis(SynthesisSettings(source, **options | settings))


def write_answer(kind: str, image: str, animal: str, number: int = 0) -> str:
    """Text that is accepted for a task; of another number, another text."""
    colour = ("calm", "alert", "sleepy", "curious", "playful")[number % 5]
    if kind == "detail_description":
        return (f"In room {image} a {colour} {animal} stands on the left side of the image. To its right there is a "
                f"chair, which takes up much of the right half. The {animal} seems to look towards the chair, and "
                "nothing else draws attention in this quiet scene.")
    question = {"conversation": "Which animal is in the picture?",
                "complex_reasoning": "What might the animal do in the next minutes, and why?"}[kind]
    answer = (f"The animal in room {image} is a {colour} {animal}. It stands to the left of a chair and may walk over "
              "to it, because there is little else in the room that could hold its interest for long, and animals "
              "tend to explore what is new to them.")
    return f"Question:\n{question}\n===\nAnswer:\n{answer}"


def good_answer(task, number: int = 0) -> str:
    return write_answer(task.kind, task.context.id, task.context.boxes[0].category, number)


def answer_messages(messages: list[dict[str, str]]) -> str:
    """What a teacher makes of the prompts and images here."""
    kind = re.fullmatch(r"Write a (\w+)\.", messages[0]["content"])[1]
    room, animal = re.search(r"Room (\d+) with a (\w+)", messages[-1]["content"]).groups()
    return write_answer(kind, room, animal)


def reply(text: str, finish_reason: str = "stop", **fields) -> Response:
    return Response(**{"text": text, "finish_reason": finish_reason, "prompt_tokens": 100, "cached_tokens": 60,
                    "completion_tokens": 20, "model": "teacher-2026", "fingerprint": "fp", "created": 1_790_000_000,
                    **fields})


def fill(log: AnswerLog, task, *texts: str) -> None:
    """The answers to a task's first, second, ... attempt."""
    for attempt, text in enumerate(texts):
        log.append(task.key(attempt), reply(text))
