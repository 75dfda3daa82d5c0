"""The page of `prepare preview`: pictures, tokens and rows as the model gets them."""

import base64
import contextlib
import html
import io
import itertools
import json
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.data.packing import WINDOW, pack
from llava_jax.data.records import BadRow, Record
from llava_jax.image_files import open_header, open_image, read_image
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, Example, lay_out, place_tokens

THUMBNAIL = 144  # pixels of the longer side of an original
SMALL = 224  # tiles of fewer pixels are shown enlarged
EXACT = 48 << 10  # bytes up to which a picture is kept as PNG; otherwise JPEG
LONGEST = 20_000  # characters of a text in a row as stored: an image in base64 has millions


class Shown(NamedTuple):
    """A record as drawn, read as far as it is good."""

    number: int  # on the page, from 1
    where: str
    row: Any  # as stored; None if it cannot be read
    record: Record | None
    example: Example | None
    tiles: np.ndarray | None  # uint8 [I, size, size, 3]
    bad: BadRow | None


def write_page(title: str, about: Mapping[str, str], shown: Sequence[Shown], settings: Settings, sequence_length: int,
               tiles_per_sequence: int) -> str:
    """The page: the names and values of `about`, the records, and the good ones packed into rows."""
    good = [one for one in shown if one.bad is None]
    facts = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in about.items())
    cards = "\n".join(_card(one, settings) for one in shown)
    rows = "\n".join(_rows(good, sequence_length, tiles_per_sequence)) or "<p>No record is good.</p>"
    body = (
        f"<h1>{_text(title)}</h1>\n<div class='facts'>{facts}</div>\n"
        f"<h2>Records</h2>\n{_LEGEND}\n{cards}\n"
        f"<h2>Packed rows</h2>\n<p>The good records, packed as in training into rows of {sequence_length:,} tokens and "
        f"{_number(tiles_per_sequence, 'image')}. Training packs {WINDOW:,} records at a time, which fills rows "
        f"better. Widths are to scale.</p>\n{_KEYS}\n{rows}"
    )
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return string.Template(page).substitute(title=_text(title), body=body)


class Piece(NamedTuple):
    """A token and its stretch of the rendered conversation. Pieces join to the whole of it.

    `token` is IMAGE_TOKEN_ID once for all visual tokens of an image, and None for text that no token stands for. A
    character of several tokens is the text of one of them; the others, as a BOS, have the text "".
    """

    text: str
    token: int | None
    learned: bool


def read_pieces(turns: Sequence[Mapping[str, str]], example: Example, settings: Settings) -> list[Piece]:
    """Cuts a rendered conversation into the texts of the tokens that `encode_conversation` has made of it."""
    laid_out = lay_out(turns, settings.template)
    text = "".join(span.text for span in laid_out)
    pieces, ids, at = [], [], 0
    for token, (begin, end) in zip(*place_tokens(laid_out, settings.tokenizer), strict=True):
        if begin > at:
            pieces.append(Piece(text[at:begin], None, False))
            at = begin
        pieces.append(Piece(text[at : max(end, 0)], token, bool(example.labels[len(ids)] != IGNORE)))
        ids += [token] * (settings.tokens_per_image if token == IMAGE_TOKEN_ID else 1)
        at = max(at, end)
    if at < len(text):
        pieces.append(Piece(text[at:], None, False))
    if not np.array_equal(ids, example.tokens):
        raise RuntimeError("the preview tokenizes otherwise than training does: a fault in llava_jax, not in the data")
    return pieces


_LEGEND = """<div class='legend'>
<span><span class='t'>question</span> only read</span>
<span><span class='t l'>answer</span> learned: underlined</span>
<span><span class='image'>image 1</span> its visual tokens</span>
<span><span class='t'><i data-sign='␣'> </i></span> blank, <span class='t'><i data-sign='↵'> </i></span> newline, \
<span class='t'><i data-sign='⇥'> </i></span> tab</span>
<span><span class='t part' data-sign='▁'></span> blank that tokenizing puts before a text</span>
<span><span class='t part' data-sign='+'></span> one more token of the same character</span>
<span class='quiet'>A line ends each token; its tooltip is the id.</span>
</div>"""
_KEYS = """<div class='legend'>
<span><span class='key'><i class='visual'></i></span>visual</span>
<span><span class='key'><i class='learned'></i></span>learned</span>
<span><span class='key'><i class='read'></i></span>only read</span>
<span><span class='key'></span>padding</span>
<span><span class='slots'>■□</span> image slot, used and empty</span>
</div>"""


def _card(one: Shown, settings: Settings) -> str:
    name = f" <span class='quiet'>id {_text(one.record.id)}</span>" if one.record and one.record.id else ""
    parts = [f"<article class='card' id='record-{one.number}'>", f"<h3>Record {one.number}{name}</h3>"]
    if one.bad:  # its line names file and row
        parts.append(f"<p><span class='bad'>✗ {one.bad.reason.replace('_', ' ')}</span>: {_text(one.bad)}</p>")
    else:
        parts.append(f"<p class='quiet'>{_text(one.where)}</p>")
    if one.example:
        tokens, learned, images = _counts(one)
        share = f"{learned / tokens:.1%}"
        parts.append(f"<p>{tokens:,} tokens, {learned:,} learned ({share}), {_number(images, 'image')}</p>")
        figures = "" if one.tiles is None else "".join(
            _picture(image, tile, settings) for image, tile in zip(one.record.images, one.tiles, strict=True)
        )
        spans = "".join(_spans(read_pieces(one.record.turns, one.example, settings), settings))
        column = f"<div class='pictures'>{figures}</div>" if figures else ""
        parts.append(f"<div class='body'>{column}<div class='tokens'>{spans}</div></div>")
    if one.row is not None:
        parts.append(f"<details><summary>The row as stored</summary><pre>{_text(_stored(one.row))}</pre></details>")
    return "\n".join([*parts, "</article>"])


def _counts(one: Shown) -> tuple[int, int, int]:
    """Tokens, learned tokens, images."""
    tokens, labels = one.example
    return len(tokens), np.count_nonzero(labels != IGNORE), len(one.record.images)


def _picture(image: str | bytes, tile: np.ndarray, settings: Settings) -> str:
    """An original, small, and the tile that was made of it."""
    original = open_image(image, settings.exif, settings.max_pixels)
    width, height = original.size
    original.thumbnail((THUMBNAIL, THUMBNAIL))
    side, times = len(tile), max(1, SMALL // len(tile))
    path = f"embedded, {len(image):,} bytes" if isinstance(image, bytes) else image
    enlarged = f", shown × {times}" if times > 1 else ""
    kind = _kind(image, settings.max_pixels)
    return (
        "<div><div class='pair'>"
        f"<figure>{_image(original, 1)}<figcaption>original: {width} × {height}<br>{kind}</figcaption></figure>"
        f"<figure>{_image(Image.fromarray(tile), times)}"
        f"<figcaption>the model sees {side} × {side}{enlarged}</figcaption></figure>"
        f"</div><p class='quiet'>{_text(path)}</p></div>"
    )


def _kind(image: str | bytes, max_pixels: int) -> str:
    content = image if isinstance(image, bytes) else read_image(image, max_pixels)
    with open_header(content, max_pixels) as file:
        kind, frames = f"{file.format} {file.mode}", 1
        with contextlib.suppress(Exception):  # a later frame may be damaged; the first is all that is used
            frames = getattr(file, "n_frames", 1)
    return kind + (f", first of {frames} frames" if frames > 1 else "")


def _image(image: Image.Image, times: int) -> str:
    kind, data = "png", _encoded(image, "PNG", optimize=True)
    if len(data) > EXACT:
        kind, data = "jpeg", _encoded(image, "JPEG", quality=85)
    grown = " class='grown'" if times > 1 else ""
    return (f"<img{grown} width='{image.width * times}' height='{image.height * times}' alt='' "
            f"src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _spans(pieces: Sequence[Piece], settings: Settings) -> Iterator[str]:
    images = 0
    for text, token, learned in pieces:
        if token == IMAGE_TOKEN_ID:
            images += 1
            yield f"<span class='image'>image {images}: {settings.tokens_per_image} tokens</span>"
        elif token is None:
            yield f"<span class='gap' title='no token stands for this text'>{_signs(text)}</span>"
        else:
            yield _span(text, token, learned, settings)


def _span(text: str, token: int, learned: bool, settings: Settings) -> str:
    classes, sign = "t l" if learned else "t", ""
    alone = settings.tokenizer.decode([token], skip_special_tokens=False)
    if settings.tokenizer.special_id(text.strip() or alone) == token:
        classes += " s"
    if not text:  # what is no text is no text of the page either
        classes += " part"
        sign = f" data-sign='{_text('+' if chr(0xFFFD) in alone else alone.strip() or '▁')}'"
    return f"<span class='{classes}'{sign} title='{token}'>{_signs(text)}</span>"


def _signs(text: str) -> str:
    """The text, with a sign for what cannot be seen. The page's text stays the same: style sheets write the signs."""
    blank = not text.strip(" ")
    return "".join(f"<i data-sign='{_sign(c)}'>{_text(c)}</i>" if blank or _is_hidden(c) else _text(c) for c in text)


def _sign(character: str) -> str:
    return {" ": "␣", "\n": "↵", "\t": "⇥"}.get(character, f"U+{ord(character):04X}")


def _is_hidden(character: str) -> bool:
    return character != " " and unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")


def _rows(good: Sequence[Shown], sequence_length: int, tiles_per_sequence: int) -> Iterator[str]:
    tokens, _, images = zip(*map(_counts, good), strict=True) if good else ((), (), ())
    for number, row in enumerate(pack(tokens, images, sequence_length, tiles_per_sequence), 1):
        used, slots = sum(tokens[i] for i in row), sum(images[i] for i in row)
        segments = "".join(_segment(good[i]) for i in row)
        padding = f"<i class='padding' style='flex:{sequence_length - used}'></i>" if used < sequence_length else ""
        squares = "■" * slots + "□" * (tiles_per_sequence - slots)
        yield (f"<div class='row'><p>Row {number}: {used:,} of {sequence_length:,} tokens "
               f"({used / sequence_length:.1%}), {slots} of {_number(tiles_per_sequence, 'image')} "
               f"<span class='slots'>{squares}</span></p>"
               f"<div class='bar'>{segments}{padding}</div></div>")


def _segment(one: Shown) -> str:
    tokens, labels = one.example
    kinds = np.where(tokens == IMAGE_TOKEN_ID, "visual", np.where(labels == IGNORE, "read", "learned"))
    parts = "".join(f"<i class='{kind}' style='flex:{len([*same])}'></i>" for kind, same in itertools.groupby(kinds))
    count, learned, images = _counts(one)
    about = f"record {one.number}: {count:,} tokens, {learned:,} learned, {_number(images, 'image')}"
    return (f"<a class='segment' href='#record-{one.number}' style='flex:{count}' title='{about}'>"
            f"{parts}<span>{one.number}</span></a>")


def _number(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _stored(row: Any) -> str:
    try:
        return json.dumps(_shortened(row), indent=2, ensure_ascii=False)
    except RecursionError:
        return "(nested too deep to be shown)"


def _shortened(value: Any) -> Any:
    """A row as JSON can hold it, without the millions of characters of an image."""
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, Mapping):
        return {str(key): _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}… ({len(value):,} characters)"
    return value if isinstance(value, str | int | float | None) else str(value)


def _text(value: Any) -> str:
    """Escaped for the text and the attributes of the page; reading the page gives it back."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return html.escape(text).replace("\r", "&#13;")
