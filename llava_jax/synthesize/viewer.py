"""Samples of a synthesis as one HTML page: image and boxes, captions, answer and verdict."""

import base64
import html
import io
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava_jax.annotations.context import Box
from llava_jax.errors import UserError
from llava_jax.image_files import open_image
from llava_jax.synthesize.synthesis import Outcome, Task, Verdict

LONGEST_SIDE = 640  # pixels of a picture in the page
LONGEST_TEXT = 20_000  # characters shown of an answer that could not be read
LABELLED = 40  # boxes of an image that get their names written on them; more would hide it
KIND_NAMES = {"conversation": "conversation", "detail_description": "detailed description",
              "complex_reasoning": "complex reasoning"}


class Sample(NamedTuple):
    """A task and where it stands."""

    task: Task
    outcome: Outcome


def write_page(title: str, about: Mapping[str, str], samples: Sequence[Sample], image_root: str, language: str) -> str:
    """The page: the names and values of `about`, then the samples. Images are those of `image_root`, as far as there
    are any; it needs nothing besides itself."""
    facts = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in about.items())
    cards = "\n".join(_card(number, sample, image_root, language) for number, sample in enumerate(samples, 1))
    body = f"<h1>{_text(title)}</h1>\n<div class='facts'>{facts}</div>\n{cards or '<p>Nothing to show.</p>'}"
    page = Path(__file__).with_name("viewer_page.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(title=_text(title), body=body)


def _card(number: int, sample: Sample, image_root: str, language: str) -> str:
    task, outcome = sample
    context, verdict = task.context, outcome.verdict
    colours = _colours(context.boxes)
    boxes = "".join(f"<li><i style='--hue:{colours[box.category]}'></i>{_text(box.line())}</li>"
                    for box in context.boxes)
    captions = "".join(f"<li>{_text(caption)}</li>" for caption in context.captions)
    shown = task.kind != "conversation" or task.synthesis.settings.teacher == "rules"
    sees = "captions and boxes" if shown and context.boxes else "captions"
    return "\n".join([
        f"<article class='card' id='sample-{number}'>",
        f"<h2>{number}. {KIND_NAMES[task.kind]} <span class='quiet'>id {_text(context.id)}</span></h2>",
        f"<p class='verdict'>{_verdict(outcome)}</p>",
        "<div class='body'><div class='evidence'>",
        _picture(context.image, context.boxes, colours, image_root),
        f"<h3>Captions</h3><ul>{captions}</ul>",
        f"<details><summary>{_count(len(context.boxes), 'box', 'boxes')}</summary><ul class='boxes'>{boxes}</ul>"
        "</details>" if boxes else "",
        f"<p class='quiet'>The teacher sees the {sees}.</p>",
        f"</div><div class='answer'>{_findings(verdict)}{_turns(task, outcome, language)}</div></div></article>",
    ])


def _verdict(outcome: Outcome) -> str:
    verdict = outcome.verdict
    if verdict is None:
        return "<span class='chip open'>not asked yet</span>"
    tries = f" <span class='quiet'>after {len(outcome.answers)} answers</span>" if len(outcome.answers) > 1 else ""
    if verdict.accepted:
        found = len(verdict.evidence.findings) if verdict.evidence else 0
        flag = f" <span class='chip flag'>{_count(found, 'contradiction')}</span>" if found else ""
        return f"<span class='chip good'>✓ accepted</span>{flag}{tries}"
    again = "" if outcome.done else " <span class='chip open'>to be asked again</span>"
    return (f"<span class='chip bad'>✗ {_text(verdict.reason.replace('_', ' '))}</span> {_text(verdict.detail)}"
            f"{again}{tries}")


def _findings(verdict: Verdict | None) -> str:
    if verdict is None or verdict.evidence is None:
        return ""
    if not verdict.evidence.checked:
        return "<p class='quiet'>Not compared with captions and boxes: this language is not read.</p>"
    rows = "".join(f"<li><b>{_text(finding.kind)}</b> {_text(finding.claim)}: {_text(finding.against)}</li>"
                   for finding in verdict.evidence.findings)
    return f"<ul class='findings'>{rows}</ul>" if rows else ""


def _turns(task: Task, outcome: Outcome, language: str) -> str:
    if outcome.verdict is None:
        return ""
    if not outcome.verdict.turns:  # it could not be read: as it came
        text = outcome.answers[-1][1].text
        text = f"{text[:LONGEST_TEXT]} ..." if len(text) > LONGEST_TEXT else text
        return f"<pre lang='{_text(language)}'>{_text(text)}</pre>" if text.strip() else "<p class='quiet'>no text</p>"
    return "".join(f"<div class='{turn['from']}' lang='{_text(language)}'>{_text(turn['value'])}</div>"
                   for turn in outcome.verdict.turns)


def _picture(name: str, boxes: Sequence[Box], colours: Mapping[str, int], image_root: str) -> str:
    """The image, or a blank square, with the boxes over it."""
    drawn = []
    for box in sorted(boxes, key=lambda box: (box.x1 - box.x2) * (box.y2 - box.y1)):  # small ones on top
        place = f"left:{box.x1:.2%};top:{box.y1:.2%};width:{box.x2 - box.x1:.2%};height:{box.y2 - box.y1:.2%}"
        label = f"<span>{_text(box.category)}</span>" if len(boxes) <= LABELLED else ""
        drawn.append(f"<div class='box{' crowd' * box.crowd}' style='--hue:{colours[box.category]};{place}' "
                     f"title='{_text(box.line())}'>{label}</div>")
    image, note = "<div class='blank'></div>", "boxes in a square: no --image-root was given"
    if image_root:
        try:
            image, note = _encode(_inside(image_root, name)), ""
        except (OSError, ValueError) as error:
            note = f"no picture: {' '.join(str(error).split())}"
    caption = f"{_text(name)}" + (f"<br>{_text(note)}" if note else "")
    return (f"<figure><div class='picture'>{image}{''.join(drawn)}</div><figcaption>{caption}</figcaption></figure>")


def _inside(image_root: str, name: str) -> str:
    """The path of an image. Raises UserError if its name or a link leads out of the folder of images."""
    path = os.path.realpath(os.path.join(image_root, name))
    root = os.path.realpath(image_root)
    if os.path.commonpath([root, path]) != root or not os.path.isfile(path):
        raise UserError("there is no such file in --image-root")
    return path


def _encode(path: str) -> str:
    picture = open_image(path)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img width='{picture.width}' height='{picture.height}' alt='' src='data:image/jpeg;base64,{data}'>"


def _colours(boxes: Sequence[Box]) -> dict[str, int]:
    """A hue for every category, neighbours far from each other."""
    categories = dict.fromkeys(box.category for box in boxes)
    return {category: 137 * number % 360 for number, category in enumerate(categories)}


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())
