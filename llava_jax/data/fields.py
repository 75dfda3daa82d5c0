"""Fields of rows and turns beside their texts and images: what is honoured, what is refused, what is unknown.

A field that changes what a row means is never ignored. Flags that keep an answer from being learned are honoured.
Media other than images, boxes, tools and preferences are refused. Any other field is counted by `prepare check`.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava_jax.errors import UserError

SYSTEM = ("system", "system_prompt", "system_message")  # keys of a row's system text

# Keys of a turn that say whether it is learned: OpenAI and OpenChat, ms-swift, axolotl; with the second, torchtune.
LEARNED = ("weight", "loss", "loss_weight", "loss_scale", "train", "training", "trainable", "learn")
MASKED = ("masked", "mask")
LEARNED_ROWS = ("weight", "loss", "loss_weight", "loss_scale", "train", "masked")  # the same, of a whole row

MEDIA = re.compile(r"(video|audio)s?(_(path|url|file)s?)?", re.IGNORECASE)  # keys
PREFERENCES = ("chosen", "rejected")  # two last answers of which one is to be preferred
TOOLS = ("tools", "functions", "tool_calls", "function_call")
PARTS_OF_ANSWERS = ("train_detail", "spans")  # of axolotl: offsets of what is learned in a turn

# Marks of ms-swift and others for what is put into a text later. A bare <video> may be HTML as well, so it counts as a
# mark where marks stand: at the start or the end of a line of a question, without a closing tag.
_BOX = re.compile(r"<(bbox|ref-object)>|<\|(video|audio)(_pad)?\|>", re.IGNORECASE)
# Marks of an image in other models' data: Qwen-VL, Qwen2-VL, Phi-3-vision and MMMU.
_IMAGE = re.compile(r"<img>[^<\n]*</img>|<\|(vision_start|image(_pad|_\d+)?)\|>|<image[ _]\d+>")
_MEDIUM = re.compile(r"^[ \t]*<(video|audio|img)>|<(video|audio|img)>[ \t]*$", re.MULTILINE)
ANY_MARK = re.compile(r"<(video|audio|img)>")

SIZES = ("image_widths", "image_heights")  # of the images of a row, in pixels; `prepare pack` writes them

# Keys of a row that a record is made of, or that make it unusable. `parse_row` sees only these of a parquet file.
READ = frozenset({
    "id", "image", "images", *SIZES, *SYSTEM, "response", "history", "label", "kto_tag", "objects", *PREFERENCES,
    *TOOLS, *LEARNED_ROWS,
    *(kind + plural + suffix for kind in ("video", "audio") for plural in ("", "s")
      for suffix in ("", *(f"_{what}{more}" for what in ("path", "url", "file") for more in ("", "s")))),
})  # fmt: skip
_KNOWN = {"id", "image", "images", *SIZES, *SYSTEM}
_KNOWN_IN_TURNS = {"from", "role", "value", "content", *LEARNED, *MASKED}
_KNOWN_IN_PARTS = {"type", "text", "image", "image_url", "url", "path", "base64", "index", *LEARNED, *MASKED}


class Unsupported(UserError):
    """Raised for a field whose meaning training cannot honour."""


def check_row(row: Mapping[str, Any]) -> None:
    """Raises Unsupported if a field beside the turns gives the row a meaning that training would miss."""
    _refuse_media(row, "the row")
    objects = row.get("objects")
    if isinstance(objects, Mapping) and any(not _is_empty(objects.get(key)) for key in ("bbox", "ref")):
        raise Unsupported("the row has objects (boxes for marks in its texts); write the boxes into the texts")
    for key in PREFERENCES:
        if not _is_empty(row.get(key)):
            raise Unsupported(f"the row has {key}: preferences cannot be learned; give the chosen answer as a turn")
    for key in ("label", "kto_tag"):
        if row.get(key) is False:
            raise Unsupported(f"{key} is false: the answer is one to avoid (KTO), and training would learn it")
    if not _flag(row, "the row", default=True, keys=LEARNED_ROWS):
        raise Unsupported("the row is not to be learned at all, as its flag says; leave it out")


def check_turn(turn: Mapping[str, Any], name: str) -> None:
    """Raises Unsupported if a turn brings media or tools of its own."""
    _refuse_media(turn, name)
    for key in ("image", "images"):
        if not _is_empty(turn.get(key)):
            raise Unsupported(f"{name} has {key} of its own; give them in the row's images, with <image> in the text")
    for key in PARTS_OF_ANSWERS:
        if not _is_empty(turn.get(key)):
            raise Unsupported(f"{name} has {key}: answers are learned whole or not at all")


def check_part(part: Mapping[str, Any], name: str) -> None:
    """Raises Unsupported if a part of a turn brings other media, or is not to be learned with the rest of its turn."""
    _refuse_media(part, name)
    if not _flag(part, name, default=True):
        raise Unsupported(f"{name} is not to be learned, as its flag says; answers are learned whole or not at all")


def is_learned(turn: Mapping[str, Any], name: str, is_answer: bool) -> bool:
    """Whether a turn is learned. Raises Unsupported for a question that is to be learned, and for half a weight."""
    learned = _flag(turn, name, default=is_answer)
    if learned and not is_answer:
        raise Unsupported(f"{name} is no answer, and its flag says that it is to be learned; only answers are")
    return learned


def check_text(text: str, name: str, is_answer: bool) -> None:
    """Raises Unsupported if a text has the mark of a medium or of a box that is put in later."""
    mark = _BOX.search(text)
    if not mark and not is_answer:
        mark = _IMAGE.search(text) or next((found for found in _MEDIUM.finditer(text) if _is_mark(found, text)), None)
    if mark:
        raise Unsupported(f"{name} has the mark {mark[0].strip()}; of marks, only <image> can be read")


def unknown_keys(row: Mapping[str, Any], turns_key: str, turns: list[Any]) -> tuple[str, ...]:
    """Names of the fields with a value that nothing reads; "turn.NAME" in turns, "part.NAME" in their parts."""
    known = _KNOWN | {turns_key} | ({"response", "history"} if turns_key == "query" else set())
    found = [str(key) for key in row.keys() - known if not _is_empty(row[key])]
    turns = [turn for turn in turns if isinstance(turn, Mapping)]
    inner = {str(key) for turn in turns for key in turn.keys() - _KNOWN_IN_TURNS if not _is_empty(turn[key])}
    contents = [turn[key] for turn in turns for key in ("content", "value") if isinstance(turn.get(key), list)]
    parts = {str(key) for content in contents for part in content if isinstance(part, Mapping)
             for key in part.keys() - _KNOWN_IN_PARTS if not _is_empty(part[key])}
    return (*sorted(found), *(f"turn.{key}" for key in sorted(inner)), *(f"part.{key}" for key in sorted(parts)))


def _refuse_media(fields: Mapping[str, Any], name: str) -> None:
    for key, value in fields.items():
        if _is_empty(value) or not isinstance(key, str):
            continue
        if MEDIA.fullmatch(key):
            raise Unsupported(f"{name} has {key}; only texts and images can be learned")
        if key in TOOLS:
            raise Unsupported(f"{name} has {key}; conversations with tools cannot be learned")


def _flag(
    fields: Mapping[str, Any], name: str, default: bool, keys: tuple[str, ...] = (*LEARNED, *MASKED)
) -> bool:
    """Whether the flags of a row or a turn say that it is learned, if there are any: 0 or 1, true or false."""
    said = {}
    for key in keys:
        value = fields.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Unsupported(f"{name} has {key} {value!r:.40}; only 0 and 1, true and false can be honoured")
        said[key] = bool(value) != (key in MASKED)
    if len(set(said.values())) > 1:
        raise Unsupported(f"{name} contradicts itself: {' and '.join(said)} say different things")
    return next(iter(said.values()), default)


def _is_mark(found: re.Match, text: str) -> bool:
    kind = found[1] or found[2]
    return kind == "img" or f"</{kind}>" not in text


def _is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty text or list, or what stands for one in text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(item is None or item == "" or item == [] for item in value)
    return value is None
