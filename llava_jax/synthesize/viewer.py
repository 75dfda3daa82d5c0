"""The page of `synthesize view`: images with boxes, captions, answers and verdicts."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.annotations.boxes import Box
from llava_jax.pages import page
from llava_jax.pages.thumbnails import Thumbnail, load_thumbnail
from llava_jax.synthesize.synthesis import Outcome, SynthesisTask

KIND_NAMES = {"conversation": "conversation", "detail_description": "detailed description",
              "complex_reasoning": "complex reasoning"}
MAX_IMAGE_SIDE = 640
MAX_TEXT_LENGTH = 20_000
"""Number of characters shown of an answer that could not be parsed."""

MAX_LABELLED_BOXES = 40
"""Number of boxes up to which their names are written on the image. More names would hide it."""


class ViewedSample(NamedTuple):
    """A task with its outcome so far."""

    task: SynthesisTask
    outcome: Outcome


def render_page(title: str, about: Mapping[str, str], samples: Sequence[ViewedSample], image_root: str,
                language: str) -> str:
    """Renders the page. Images are those inside `image_root`; without it, boxes are drawn in a blank square."""
    cards = [_card(sample, image_root) for sample in samples]
    return page.render("synthesize/viewer.html", title=title, about=about, cards=cards, language=language)


def _card(sample: ViewedSample, image_root: str) -> dict[str, Any]:
    task, outcome = sample
    boxes = task.context.boxes
    uses_boxes = boxes and (task.kind != "conversation" or task.synthesis.settings.teacher == "rules")
    thumbnail = Thumbnail(problem="boxes in a square: no --image-root was given")
    if image_root:
        thumbnail = load_thumbnail(os.path.join(image_root, task.context.image), image_root, MAX_IMAGE_SIDE)
    unparsed = ""
    if outcome.verdict and not outcome.verdict.turns:
        text = outcome.answers[-1][1].text
        unparsed = f"{text[:MAX_TEXT_LENGTH]} ..." if len(text) > MAX_TEXT_LENGTH else text
    return {"kind": KIND_NAMES[task.kind], "context": task.context, "outcome": outcome, "thumbnail": thumbnail,
            "teacher_input": "captions and boxes" if uses_boxes else "captions", "unparsed": unparsed,
            "hues": _hues(boxes), "labelled": len(boxes) <= MAX_LABELLED_BOXES,
            "drawn_boxes": [(box, _position(box)) for box in sorted(boxes, key=_area, reverse=True)]}


def _position(box: Box) -> str:
    return f"left:{box.x1:.2%};top:{box.y1:.2%};width:{box.x2 - box.x1:.2%};height:{box.y2 - box.y1:.2%}"


def _area(box: Box) -> float:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def _hues(boxes: Sequence[Box]) -> dict[str, int]:
    """Chooses a hue in degrees for each category; consecutive categories get distant hues."""
    return {category: 137 * i % 360 for i, category in enumerate(dict.fromkeys(box.category for box in boxes))}
