"""The page of `prepare preview`: images, tokens and packed sequences as the model gets them."""

import contextlib
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.data.examples import EncodedRecord
from llava_jax.data.packing import WINDOW, pack
from llava_jax.data.records import BadRow, Record
from llava_jax.image_files import open_header, open_image, read_image
from llava_jax.pages import page
from llava_jax.pages.thumbnails import make_thumbnail
from llava_jax.prepare.settings import Settings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID, conversation_spans, tokenize_spans
from llava_jax.video import Video, decode_frames, sampled_frames

MAX_ORIGINAL_SIDE, MIN_TILE_SIDE, MAX_CANVAS_SIDE = 144, 224, 672
"""Pixels of the longer side of an original image, of a tile after it is enlarged, and of tiles side by side."""

MAX_FRAMES = 4
"""Number of frames shown of a video."""

MAX_VALUE_LENGTH = 20_000
"""Number of characters shown of a value in a stored row. An image in base64 has millions."""


class PreviewRecord(NamedTuple):
    """A record of the preview. Fields that could not be read are None."""

    number: int  # position on the page, from 1
    where: str
    row: Any  # as stored
    record: Record | None
    example: EncodedRecord | None
    tiles: np.ndarray | None  # uint8 [tiles, size, size, 3]
    bad: BadRow | None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of tokens, supervised tokens and images."""
        tokens, labels, media, _ = self.example
        return len(tokens), np.count_nonzero(labels != IGNORE), len(media)


class TokenText(NamedTuple):
    """A token with its part of the rendered conversation. The parts join to the conversation.

    `token` is IMAGE_TOKEN_ID once for all visual tokens of an image, and None for text without a token. A character of
    several tokens is the text of one of them. The text of its other tokens, and of a BOS token, is empty.
    """

    text: str
    token: int | None
    supervised: bool


def render_page(title: str, about: Mapping[str, str], records: Sequence[PreviewRecord], settings: Settings,
                sequence_length: int, tiles_per_sequence: int) -> str:
    """Renders the page. Records without a problem are also packed into sequences."""
    good = [record for record in records if record.bad is None]
    return page.render(
        "prepare/preview_page.html", title=title, about=about, cards=[_card(record, settings) for record in records],
        sequences=list(_sequences(good, sequence_length, tiles_per_sequence)), window=WINDOW,
        sequence_length=sequence_length, tiles_per_sequence=tiles_per_sequence)


def align_tokens(turns: Sequence[Mapping[str, str]], example: EncodedRecord, settings: Settings) -> list[TokenText]:
    """Divides a rendered conversation among the tokens that `encode_conversation` made of it."""
    laid_out = conversation_spans(turns, settings.template)
    text = "".join(span.text for span in laid_out)
    parts, ids, position = [], [], 0
    counts = (len(layout.index) for layout in settings.processor.layouts(example.media))
    for token, (start, end) in zip(*tokenize_spans(laid_out, settings.tokenizer), strict=True):
        if start > position:
            parts.append(TokenText(text[position:start], None, False))
            position = start
        parts.append(TokenText(text[position : max(end, 0)], token, bool(example.labels[len(ids)] != IGNORE)))
        ids += [token] * (next(counts) if token == IMAGE_TOKEN_ID else 1)
        position = max(position, end)
    if position < len(text):
        parts.append(TokenText(text[position:], None, False))
    if not np.array_equal(ids, example.tokens):
        raise RuntimeError("the preview tokenizes otherwise than training does: a fault in llava_jax, not in the data")
    return parts


def _card(record: PreviewRecord, settings: Settings) -> dict[str, Any]:
    """Returns the values of a record's card."""
    images, tokens = [], []
    layouts = settings.processor.layouts(record.example.media if record.example else ())
    if record.tiles is not None:
        parts = np.split(record.tiles, np.cumsum([layout.tiles for layout in layouts])[:-1]) if layouts else ()
        for image, tiles in zip(record.record.images, parts, strict=True):
            images += (_frames if isinstance(image, Video) else _image)(image, tiles, settings)
    if record.example:
        tokens = [_token(part, settings) for part in align_tokens(record.record.turns, record.example, settings)]
    return {
        "number": record.number, "where": record.where, "id": record.record.id if record.record else "",
        "reason": record.bad.reason.replace("_", " ") if record.bad else "", "problem": str(record.bad),
        "counts": record.counts if record.example else None, "images": images, "tokens": tokens,
        "visual_tokens": [len(layout.index) for layout in layouts],
        "row": None if record.row is None else _stored(record.row)}


def _frames(video: Video, tiles: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """Returns the values of a clip's first sampled frames and of the tiles made from them."""
    sampled = sampled_frames(video, settings.video, settings.max_pixels)
    shown = sampled.indices[:MAX_FRAMES]
    return [_pair(frame, tile[None], f"frame {index}, {number} of {len(sampled.indices)} of the video", video.path,
                  settings)
            for number, (index, frame, tile) in
            enumerate(zip(shown, decode_frames(video, shown, settings.max_pixels), tiles, strict=False), 1)]


def _image(image: str | bytes, tiles: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """Returns the values of an original image and of the tiles made from it."""
    original = open_image(image, settings.exif, settings.max_pixels)
    with open_header(image if isinstance(image, bytes) else read_image(image, settings.max_pixels),
                     settings.max_pixels) as file:
        kind, frames = f"{file.format} {file.mode}", 1
        with contextlib.suppress(Exception):  # a later frame may be damaged; only the first one is used
            frames = getattr(file, "n_frames", 1)
    return [_pair(original, tiles, kind + (f", first of {frames} frames" if frames > 1 else ""),
                  f"embedded, {len(image):,} bytes" if isinstance(image, bytes) else image, settings)]


def _pair(original: Image.Image, tiles: np.ndarray, kind: str, path: str, settings: Settings) -> dict[str, Any]:
    side = len(tiles[0])
    pictures = [(f"the model sees {side} × {side}", make_thumbnail(Image.fromarray(tiles[0]), side, MIN_TILE_SIDE))]
    if len(tiles) > 1:
        width, height = settings.processor.canvas(*original.size)
        canvas = tiles[1:].reshape(height // side, width // side, side, side, 3).swapaxes(1, 2)
        picture = make_thumbnail(Image.fromarray(canvas.reshape(height, width, 3)), MAX_CANVAS_SIDE, MIN_TILE_SIDE)
        pictures.append((f"and {len(tiles) - 1} tiles of {width} × {height}", picture))
    return {"original": make_thumbnail(original, MAX_ORIGINAL_SIDE), "size": original.size, "kind": kind, "path": path,
            "pictures": pictures}


def _token(part: TokenText, settings: Settings) -> dict[str, Any]:
    """Returns the values of a token: style classes, a sign if it has no text, and its characters with their signs."""
    token = {"id": part.token, "classes": "gap", "sign": "", "characters": _signed(part.text)}
    if part.token is None:
        return token
    if part.token == IMAGE_TOKEN_ID:
        return token | {"classes": "image"}
    decoded = settings.tokenizer.decode([part.token], skip_special_tokens=False)
    special = settings.tokenizer.special_id(part.text.strip() or decoded) == part.token
    classes = "t" + " l" * part.supervised + " s" * special + " part" * (not part.text)
    sign = ("+" if chr(0xFFFD) in decoded else decoded.strip() or "▁") if not part.text else ""
    return token | {"classes": classes, "sign": sign}


def _signed(text: str) -> list[tuple[str, str]]:
    """Pairs characters with a sign if they are invisible. The style sheet draws signs, so the page's text is `text`."""
    blank = not text.strip(" ")
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return [(c, signs.get(c, f"U+{ord(c):04X}") if blank or _is_invisible(c) else "") for c in text]


def _is_invisible(character: str) -> bool:
    return character != " " and unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")


def _sequences(good: Sequence[PreviewRecord], sequence_length: int,
               tiles_per_sequence: int) -> Iterator[dict[str, Any]]:
    """Yields the values of packed sequences: numbers of tokens and images, and segments."""
    counts = [record.counts for record in good]
    tokens, tiles = [count[0] for count in counts], [record.example.tiles for record in good]
    for chosen in pack(tokens, tiles, sequence_length, tiles_per_sequence):
        yield {"tokens": sum(tokens[i] for i in chosen), "tiles": sum(tiles[i] for i in chosen),
               "segments": [(good[i], _runs(good[i].example)) for i in chosen]}


def _runs(example: EncodedRecord) -> list[tuple[str, int]]:
    """Returns kinds of tokens with the lengths of their runs."""
    tokens, labels, *_ = example
    kinds = np.where(tokens == IMAGE_TOKEN_ID, "visual", np.where(labels == IGNORE, "prompt", "supervised"))
    return [(str(kind), len([*run])) for kind, run in itertools.groupby(kinds)]


def _stored(row: Any) -> str:
    try:
        return json.dumps(_shortened(row), indent=2, ensure_ascii=False)
    except RecursionError:
        return "(nested too deep to be shown)"


def _shortened(value: Any) -> Any:
    """Returns a row as JSON, without the millions of characters of an image."""
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, Mapping):
        return {str(key): _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and len(value) > MAX_VALUE_LENGTH:
        return f"{value[:MAX_VALUE_LENGTH]}… ({len(value):,} characters)"
    return value if isinstance(value, str | int | float | None) else str(value)
