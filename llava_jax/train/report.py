"""A run as one self-contained HTML page: loss curves, scores, and pictures with questions and answers."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_jax.train.metrics import read_lines

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7d46; --bad: #b3372f; --curve: #2f6fb3; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: left; font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
.card img { width: 100%; max-width: 12rem; display: block; margin: 0 auto .6rem; image-rendering: pixelated; }
.card p { margin: .2rem 0; font-size: .92rem; } .good { color: var(--good); } .bad { color: var(--bad); }
"""


def read_metrics(path: str | Path) -> dict[str, list[dict]]:
    """The lines of `metrics.jsonl` by stage."""
    stages: dict[str, list[dict]] = {}
    for line in read_lines(Path(path)):
        stages.setdefault(line["stage"], []).append(line)
    return stages


def write_page(path: str | Path, title: str, summary: str, stages: Mapping[str, Sequence[dict]],
               tables: Mapping[str, Mapping[str, Mapping[str, float]]],
               cards: Sequence[tuple[Path, Sequence[tuple[str, str, str, bool]]]]) -> None:
    """Writes the page.

    `tables`: title -> column -> row -> share of right answers, 0..1. `cards`: a picture's file, and for each question
    about it the question, the expected answer, the given answer, and whether that is right.
    """
    curves = "".join(_curve(stage, lines) for stage, lines in stages.items()
                     if any("loss" in line or "validation_loss" in line for line in lines))
    shares = "".join(f"<h2>{html.escape(name)}</h2><div class='wide'>{_table(columns)}</div>"
                     for name, columns in tables.items())
    Path(path).write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
        f"{shares}"
        f"<h2>Loss</h2><div class='curves'>{curves}</div>"
        f"<h2>Held-out pictures</h2><div class='cards'>{''.join(_card(*card) for card in cards)}</div>"
        "</body></html>\n", encoding="utf-8", errors="replace")


def _table(scores: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(scores)
    rows = list(dict.fromkeys(row for column in scores.values() for row in column))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(row)}</th>"
        + "".join(f"<td>{100 * scores[column][row]:.1f} %</td>" if row in scores[column] else "<td>–</td>"
                  for column in columns)
        + "</tr>" for row in rows)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _curve(stage: str, lines: Sequence[dict]) -> str:
    """Training loss as a line, validation loss as dots."""
    width, height, left, bottom = 460, 240, 44, 30
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    dots = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    last, top = max(x for x, _ in points + dots), max(y for _, y in points + dots) or 1

    def place(x: float, y: float) -> tuple[str, str]:
        return (f"{left + x / last * (width - left - 12):.1f}",
                f"{height - bottom - y / top * (height - bottom - 26):.1f}")

    grid = ""
    for i in range(5):
        _, y = place(0, top * i / 4)
        grid += (f"<line x1='{left}' x2='{width - 12}' y1='{y}' y2='{y}' stroke='var(--line)'/>"
                 f"<text x='{left - 6}' y='{y}' dy='.35em' text-anchor='end'>{top * i / 4:.2f}</text>")
    line = " ".join(",".join(place(*point)) for point in points)
    marks = "".join("<circle cx='{}' cy='{}' r='3.5' fill='var(--bad)'/>".format(*place(*dot)) for dot in dots)
    note = f"{stage}: training loss" + (", validation loss (dots)" if dots else "")
    return (f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{html.escape(note)}'>"
            f"<text x='{left}' y='14' font-weight='600'>{html.escape(note)}</text>{grid}"
            f"<polyline points='{line}' fill='none' stroke='var(--curve)' stroke-width='2'/>{marks}"
            f"<text x='{left}' y='{height - 8}'>0</text>"
            f"<text x='{width - 12}' y='{height - 8}' text-anchor='end'>step {last}</text></svg>")


def _card(image: Path, answers: Sequence[tuple[str, str, str, bool]]) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    kind = "png" if image.suffix == ".png" else "jpeg"
    lines = "".join(
        f"<p>{html.escape(question)}<br>"
        + (f"<b class='good'>✓ {html.escape(given)}</b>" if right else
           f"<b class='bad'>✗ {html.escape(given)}</b> (right: {html.escape(expected)})")
        + "</p>" for question, expected, given, right in answers)
    return f"<div class='card'><img src='data:image/{kind};base64,{data}' alt=''>{lines}</div>"
