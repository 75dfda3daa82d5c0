"""Writes a run as one HTML page: scores, chats, loss curves, and images with questions and answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llava_jax.pages import page
from llava_jax.pages.curves import Curve, draw_curves
from llava_jax.pages.thumbnails import make_thumbnail
from llava_jax.train.metrics import read_lines


class AnsweredQuestion(NamedTuple):
    """A question about an image with the model's answer."""

    question: str
    expected: str
    answer: str
    correct: bool


class Chat(NamedTuple):
    """A conversation about an image: (question, answer) in turn, in a language such as `en`."""

    image: Image.Image
    language: str
    turns: Sequence[tuple[str, str]]


def read_metrics(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the lines of `metrics.jsonl` by stage."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(Path(path)):
        stages.setdefault(line["stage"], []).append(line)
    return stages


def write_page(path: str | Path, title: str, summary: str, stages: Mapping[str, Sequence[Mapping[str, Any]]],
               tables: Mapping[str, Mapping[str, Mapping[str, float]]],
               images: Sequence[tuple[Image.Image, Sequence[AnsweredQuestion]]], chats: Sequence[Chat] = ()) -> None:
    """Writes the page.

    Args:
      stages: Lines of `metrics.jsonl` by stage.
      tables: Title -> column -> row -> share of correct answers, 0..1.
      images: Images with the questions about them.
      chats: Conversations that are shown in full.
    """
    curves = {stage: _loss_curves(stage, lines) for stage, lines in stages.items()
              if any("loss" in line or "validation_loss" in line for line in lines)}
    cards = [(make_thumbnail(image, 336), questions) for image, questions in images]
    page.write(str(path), page.render(
        "train/report.html", title=title, summary=summary, curves=curves, cards=cards,
        chats=[chat._replace(image=make_thumbnail(chat.image, 336)) for chat in chats],
        tables={name: (["", *columns], _rows(columns)) for name, columns in tables.items()}))


def _rows(columns: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [[name, *(f"{100 * column[name]:.1f} %" if name in column else "–" for column in columns.values())]
            for name in names]


def _loss_curves(stage: str, lines: Sequence[Mapping[str, Any]]) -> str:
    curves = [Curve(name.replace("_", " "), [(line["step"], line[name]) for line in lines if name in line], style)
              for name, style in (("loss", "line"), ("validation_loss", "dots"))]
    return draw_curves(f"Loss of stage {stage}", [curve for curve in curves if curve.points], "step", "loss")
