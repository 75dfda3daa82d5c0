"""The page of a run, or of two side by side: figures, and the questions with picture, reference, answers and scores."""

import base64
import hashlib
import html
import io
import os
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llava_jax.image_files import open_image

SHOWN, SHOWN_WRONG = 1000, 700
"""The most questions on a page, and how many of these are not right where there are more."""

SIDE = 288  # pixels of the longer side of a picture


class Given(NamedTuple):
    """An answer; `read` is what the scorer made of it, `score` 0..1 or None."""

    name: str
    text: str
    read: str
    score: float | None


class Card(NamedTuple):
    """A question with its answers. `state` is how they turned out, for the filter."""

    id: Any
    prompt: str
    category: str
    reference: str
    state: str
    given: Sequence[Given]
    images: Sequence[str | bytes]


def state(score: float | None) -> str:
    """How an answer turned out, in a word."""
    if score is None:
        return "not scored"
    return "right" if score == 1 else "wrong" if score == 0 else "partly right"


def card(row: Mapping[str, Any], images: Sequence[str | bytes]) -> Card:
    """The card of a row of items.jsonl."""
    return Card(row["id"], row["prompt"], row["category"], row["reference"], state(row["score"]),
                [Given("", row["text"], row["read"], row["score"])], images)


def write(title: str, about: Mapping[str, str], table: Sequence[Sequence[str]], figures: Sequence[Sequence[str]],
          notes: Sequence[str], cards: Sequence[Card], root: str, good: Sequence[str] = ("right",)) -> str:
    """The page. It needs nothing besides itself.

    Args:
      about: names and values of the run.
      table, figures: tables, the head first; the second is folded.
      root: the folder of the images; others are not shown, so that a file of questions cannot put any picture of this
        machine on a page that is passed on.
      good: states of which fewer are shown where there are too many cards.
    """
    shown = choose(cards, good)
    pictures = _Pictures(root)
    articles = "\n".join(_article(one, pictures) for one in shown)
    facts = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in about.items())
    remarks = "".join(f"<li>{_text(note)}</li>" for note in notes)
    if len(shown) < len(cards):
        remarks += f"<li>The page shows {len(shown):,} of {len(cards):,} questions; items.jsonl has all.</li>"
    tables = _table(table)
    if len(figures) > 2:
        tables += f"<details><summary>{len(figures) - 1:,} figures</summary>{_table(figures)}</details>"
    body = (f"<h1>{_text(title)}</h1>\n<div class='facts'>{facts}</div>\n{tables}\n<ul class='notes'>{remarks}</ul>\n"
            f"{_filters(shown)}\n<main>\n{articles}\n</main>")
    page = Path(__file__).with_name("results_page.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(title=_text(title), pictures=pictures.style(), body=body)


def choose(cards: Sequence[Card], good: Sequence[str]) -> list[Card]:
    """At most SHOWN of them in their order, evenly drawn: up to SHOWN_WRONG that are not good, then others."""
    if len(cards) <= SHOWN:
        return list(cards)
    bad = [n for n, one in enumerate(cards) if one.state not in good]
    rest = [n for n, one in enumerate(cards) if one.state in good]
    bad = _evenly(bad, max(SHOWN - len(rest), SHOWN_WRONG))
    return [cards[n] for n in sorted([*bad, *_evenly(rest, SHOWN - len(bad))])]


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]


class _Pictures:
    """Pictures as rules of the style sheet: each is in the page once, however many questions are about it."""

    def __init__(self, root: str):
        self.root = os.path.realpath(root)
        self.rules: dict[str, str] = {}

    def add(self, image: str | bytes) -> str:
        """The picture's element; or a line that says why there is none."""
        told = image.encode(errors="surrogatepass") if isinstance(image, str) else image
        name = "p" + hashlib.sha256(told).hexdigest()[:12]
        if name not in self.rules:
            if isinstance(image, str) and not _is_inside(image, self.root):
                return f"<p class='quiet'>no picture: {_text(image)} is outside of {_text(self.root)}</p>"
            try:
                picture = open_image(image)
            except (OSError, ValueError) as error:
                return f"<p class='quiet'>no picture: {_text(' '.join(str(error).split()))}</p>"
            small = picture.width < SIDE / 2 > picture.height  # enlarged, its pixels stay pixels
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            kind, file = "png" if small else "jpeg", io.BytesIO()
            picture.save(file, kind, **({} if small else {"quality": 80}))
            data = base64.b64encode(file.getvalue()).decode()
            self.rules[name] = (f".{name}{{aspect-ratio:{picture.width}/{picture.height};"
                                f"background-image:url(data:image/{kind};base64,{data})"
                                f"{';image-rendering:pixelated' if small else ''}}}")
        about = f" aria-label='{_text(image)}' title='{_text(image)}'" if isinstance(image, str) else ""
        return f"<div class='picture {name}' role='img'{about}></div>"

    def style(self) -> str:
        return "\n".join(self.rules.values())


def _is_inside(path: str, root: str) -> bool:
    """Whether a path leads into the folder `root`, which has no symbolic links, after all links are followed."""
    try:
        return os.path.commonpath([os.path.realpath(path), root]) == root
    except ValueError:  # a NUL in the path
        return False


def _article(one: Card, pictures: _Pictures) -> str:
    images = "".join(map(pictures.add, one.images))
    category = f"<span class='quiet'>{_text(one.category)}</span> " if one.category else ""
    reference = f"<p class='reference'><b>Reference</b> {_text(one.reference)}</p>" if one.reference else ""
    given = "".join(map(_given, one.given))
    return (f"<article data-state='{_text(one.state)}' data-category='{_text(one.category)}'>"
            f"<div>{images}</div><div><p><b>{_text(one.id)}</b> {category}</p>"
            f"<p class='question'>{_text(one.prompt)}</p>{reference}{given}</div></article>")


def _given(given: Given) -> str:
    how = state(given.score)
    sign = {"right": "✓", "wrong": "✗", "partly right": f"{100 * (given.score or 0):.0f} %"}.get(how, "")
    name = f"<b>{_text(given.name)}</b> " if given.name else ""
    read = ""
    if given.read not in ("", given.text):
        read = f" <span class='quiet'>read as {_text(repr(given.read))}</span>"
    return (f"<p class='given {how.replace(' ', '-')}'>{name}<b class='sign'>{sign}</b> "
            f"<span class='said'>{_text(given.text)}</span>{read}</p>")


def _table(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2 or len(rows[0]) < 2:
        return ""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr><th>{_text(name)}</th>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
                   for name, *cells in rows[1:])
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _filters(cards: Sequence[Card]) -> str:
    parts = []
    for name, values in (("state", [one.state for one in cards]), ("category", [one.category for one in cards])):
        counts = Counter(values)
        if len(counts) > 1:
            options = "".join(f"<option value='{_text(value)}'>{_text(value) or 'none'} ({counts[value]:,})</option>"
                              for value in sorted(counts))
            parts.append(f"<select data-by='{name}' aria-label='{name}'><option value='*'>every {name}</option>"
                         f"{options}</select>")
    parts.append("<input type='search' placeholder='text' aria-label='text to look for'>")
    return f"<div class='filters'>{''.join(parts)}<span id='count'>{len(cards):,} questions</span></div>"


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())
