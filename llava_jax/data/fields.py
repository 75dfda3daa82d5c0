"""Classifies the fields of rows and turns, besides texts and images, as honoured, refused or unknown.

A field that changes the meaning of a row is never ignored. Flags that mask an answer are honoured. Boxes,
tools, preferences and audio are refused. `prepare check` counts all other fields.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava_jax.errors import UserError

SYSTEM = ("system", "system_prompt", "system_message")  # keys of a row's system text

# Keys of a turn's flag for supervision: OpenAI and OpenChat, ms-swift, axolotl. MASKED: torchtune, axolotl.
SUPERVISED = ("weight", "loss", "loss_weight", "loss_scale", "train", "training", "trainable", "learn")
MASKED = ("masked", "mask")
SUPERVISED_ROWS = ("weight", "loss", "loss_weight", "loss_scale", "train", "masked")  # the same for a row

VIDEOS = ("video", "videos")  # keys of a row's videos
MEDIA = re.compile(r"(video|audio)s?(_(path|url|file)s?)?", re.IGNORECASE)  # keys
CLIP_PARTS = ("start", "end", "video_start", "video_end", "start_time", "end_time")  # of a video, in seconds
PREFERENCES = ("chosen", "rejected")  # two last answers, one preferred
TOOLS = ("tools", "functions", "tool_calls", "function_call")
PARTS_OF_ANSWERS = ("train_detail", "spans")  # axolotl: offsets of the supervised parts of a turn

# Marks of ms-swift and others for content that is inserted later. A bare <video> may be HTML, so it counts as a mark
# only at the start or the end of a line of a question, without a closing tag.
_BOX = re.compile(r"<(bbox|ref-object)>|<\|(video|audio)(_pad)?\|>", re.IGNORECASE)
# Image marks in the data of other models: Qwen-VL, Qwen2-VL, Phi-3-vision and MMMU.
_IMAGE = re.compile(r"<img>[^<\n]*</img>|<\|(vision_start|image(_pad|_\d+)?)\|>|<image[ _]\d+>")
_MEDIUM = re.compile(r"^[ \t]*<(video|audio|img)>|<(video|audio|img)>[ \t]*$", re.MULTILINE)
ANY_MARK = re.compile(r"<(video|audio|img)>")

SIZES = ("image_widths", "image_heights")  # of the images of a row, in pixels; `prepare pack` writes them

# Keys from which a record is parsed, or by which a row is refused. From a parquet file `parse_row` gets only these.
READ = frozenset({
    "id", "image", "images", *SIZES, *SYSTEM, "response", "history", "label", "kto_tag", "objects", *PREFERENCES,
    *TOOLS, *SUPERVISED_ROWS, *CLIP_PARTS,
    *(kind + plural + suffix for kind in ("video", "audio") for plural in ("", "s")
      for suffix in ("", *(f"_{what}{more}" for what in ("path", "url", "file") for more in ("", "s")))),
})  # fmt: skip
_KNOWN = {"id", "image", "images", *VIDEOS, *SIZES, *SYSTEM}
_KNOWN_IN_TURNS = {"from", "role", "value", "content", *SUPERVISED, *MASKED}
_KNOWN_IN_PARTS = {"type", "text", "image", "image_url", "video", "video_url", "url", "path", "base64", "index",
                   *SUPERVISED, *MASKED}


class Unsupported(UserError):
    """Raised for a field that training cannot honour."""


def check_row(row: Mapping[str, Any]) -> None:
    """Raises Unsupported if a field gives the row a meaning that training would miss."""
    _refuse_media(row, "the row", VIDEOS)
    _refuse_clip_parts(row, "the row")
    objects = row.get("objects")
    if isinstance(objects, Mapping) and any(not _is_empty(objects.get(key)) for key in ("bbox", "ref")):
        raise Unsupported("the row has objects (boxes for marks in its texts); write the boxes into the texts")
    for key in PREFERENCES:
        if not _is_empty(row.get(key)):
            raise Unsupported(f"the row has {key}: preferences are not trained on; give the chosen answer as a turn")
    for key in ("label", "kto_tag"):
        if row.get(key) is False:
            raise Unsupported(f"{key} is false: the answer is one to avoid (KTO), and training would imitate it")
    if not _flag(row, "the row", default=True, keys=SUPERVISED_ROWS):
        raise Unsupported("the row is masked by its flag; leave it out")


def check_turn(turn: Mapping[str, Any], name: str) -> None:
    """Raises Unsupported if a turn has media or tools of its own."""
    _refuse_media(turn, name)
    for key in ("image", "images"):
        if not _is_empty(turn.get(key)):
            raise Unsupported(f"{name} has {key} of its own; give them in the row's images, with <image> in the text")
    for key in PARTS_OF_ANSWERS:
        if not _is_empty(turn.get(key)):
            raise Unsupported(f"{name} has {key}: answers are supervised as a whole or not at all")


def check_part(part: Mapping[str, Any], name: str) -> None:
    """Raises Unsupported if a part of a turn has other media, or masks only a part of the turn."""
    _refuse_media(part, name, ("video", "video_url") if part.get("type") in ("video", "video_url") else ())
    _refuse_clip_parts(part, name)
    if not _flag(part, name, default=True):
        raise Unsupported(f"{name} is masked by its flag; answers are supervised as a whole or not at all")


def is_supervised(turn: Mapping[str, Any], name: str, is_answer: bool) -> bool:
    """Returns whether a turn is supervised. Raises Unsupported for a supervised question or a fractional weight."""
    supervised = _flag(turn, name, default=is_answer)
    if supervised and not is_answer:
        raise Unsupported(f"{name} is no answer, but its flag makes it supervised; only answers are")
    return supervised


def check_text(text: str, name: str, is_answer: bool) -> None:
    """Raises Unsupported if a text has a mark for a medium or a box that is inserted later."""
    mark = _BOX.search(text)
    if not mark and not is_answer:
        mark = _IMAGE.search(text) or next((match for match in _MEDIUM.finditer(text) if _is_mark(match, text)), None)
    if mark:
        raise Unsupported(f"{name} has the mark {mark[0].strip()}; of marks, only <image> can be read, and <video> if "
                          "the row has video or videos")


def unknown_keys(row: Mapping[str, Any], turns_key: str, turns: list[Any]) -> tuple[str, ...]:
    """Returns the names of fields that nothing reads: "turn.NAME" in turns, "part.NAME" in their parts."""
    known = _KNOWN | {turns_key} | ({"response", "history"} if turns_key == "query" else set())
    unknown = [str(key) for key in row.keys() - known if not _is_empty(row[key])]
    turns = [turn for turn in turns if isinstance(turn, Mapping)]
    inner = {str(key) for turn in turns for key in turn.keys() - _KNOWN_IN_TURNS if not _is_empty(turn[key])}
    contents = [turn[key] for turn in turns for key in ("content", "value") if isinstance(turn.get(key), list)]
    parts = {str(key) for content in contents for part in content if isinstance(part, Mapping)
             for key in part.keys() - _KNOWN_IN_PARTS if not _is_empty(part[key])}
    return (*sorted(unknown), *(f"turn.{key}" for key in sorted(inner)), *(f"part.{key}" for key in sorted(parts)))


def _refuse_media(fields: Mapping[str, Any], name: str, allowed: tuple[str, ...] = ()) -> None:
    for key, value in fields.items():
        if _is_empty(value) or not isinstance(key, str):
            continue
        if MEDIA.fullmatch(key) and key not in allowed:
            raise Unsupported(f"{name} has {key}; videos are given by the row's video or videos, or by parts, and "
                              "audio cannot be trained on")
        if key in TOOLS:
            raise Unsupported(f"{name} has {key}; conversations with tools cannot be trained on")


def _refuse_clip_parts(fields: Mapping[str, Any], name: str) -> None:
    if any(not _is_empty(fields.get(key)) for key in (*VIDEOS, "video_url")):
        for key in CLIP_PARTS:
            if not _is_empty(fields.get(key)):
                raise Unsupported(f"{name} has {key}: a video is read from its start to its end; cut the clip")


def _flag(
    fields: Mapping[str, Any], name: str, default: bool, keys: tuple[str, ...] = (*SUPERVISED, *MASKED)
) -> bool:
    """Returns the value of the flags of a row or a turn (0 or 1, true or false), or `default` without flags."""
    flags = {}
    for key in keys:
        value = fields.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Unsupported(f"{name} has {key} {value!r:.40}; only 0 and 1, true and false can be honoured")
        flags[key] = bool(value) != (key in MASKED)
    if len(set(flags.values())) > 1:
        raise Unsupported(f"{name} contradicts itself: {' and '.join(flags)} say different things")
    return next(iter(flags.values()), default)


def _is_mark(match: re.Match, text: str) -> bool:
    kind = match[1] or match[2]
    return kind == "img" or f"</{kind}>" not in text


def _is_empty(value: Any) -> bool:
    """Returns whether a field is empty: null, an empty text or list, or the text of one."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(item is None or item == "" or item == [] for item in value)
    return value is None
