"""Parses rows of every format into Records, and raises BadRow for rows that cannot become one."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from llava_jax.data import fields
from llava_jax.errors import UserError
from llava_jax.video import Video

REASONS = ("malformed", "role", "turn_order", "image_count", "outside_root", "missing_image", "broken_image",
           "no_supervised_tokens", "too_long", "unsupported")

Image = str | bytes  # a path, or the encoded bytes of an image
Medium = Image | Video

# Key of a row's turns, and the format of such rows.
FORMATS = {
    "conversations": "LLaVA or ShareGPT conversations",
    "conversation": "LLaVA or ShareGPT conversations",
    "messages": "chat messages (OpenAI, Hugging Face, ms-swift)",
    "query": "ms-swift query and response",
}
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt", "bing": "gpt",
         "bard": "gpt", "model": "gpt", "system": "system", "developer": "system"}


class BadRow(UserError):
    """Raised for a row that cannot be used, with one line that names file and row, and a `reason` out of REASONS."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # worker processes send it to the main process
        return BadRow, (self.reason, str(self))


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation about none, one or several images or videos."""

    id: str
    images: tuple[Medium, ...]  # in the order of their <image> in the turns; a video has an <image> too
    # {"from": "human" | "gpt", "value": text}; the first may be from "system". An answer that is not supervised has
    # "loss": False too.
    turns: tuple[dict[str, Any], ...]
    source: str  # file and row, for messages
    image_sizes: tuple[tuple[int, int], ...] | None = None  # width and height of each stored image, where known
    unknown: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # keys that nothing reads


def turns_key(row: Any) -> str | None:
    """Returns the key of a row's turns, or None. Raises UserError if there are several."""
    keys = [key for key in FORMATS if isinstance(row, Mapping) and row.get(key) is not None]
    if len(keys) > 1:
        raise UserError(f"the row is ambiguous: it has {' and '.join(keys)}; leave one")
    return keys[0] if keys else None


def parse_row(row: Any, where: str) -> Record:
    """Parses a row of any format that FORMATS names; `where` names file and row in messages.

    - Turns are {"from", "value"} or {"role", "content"}; names of roles are those of ROLES. A content is text, or a
      list of parts: {"type": "text"}, and {"type": "image"} or {"type": "image_url"}, each of which becomes an
      `<image>` at its position; parts are joined by newlines.
    - Videos are the row's `video` or `videos`: a path or a list of paths; or parts {"type": "video"} and {"type":
      "video_url"} with their own. A clip's mark is `<video>`, or in a row without images `<image>`.
    - Images are the row's `image` or `images`: a path, {"bytes", "path"} or a list of these; or the parts' own (`path`,
      `url`, `base64`, `image`). A `data:` URL contains the image itself. Every `<image>` refers to the
      next one, and a part with an `index` to the one of that number.
    - A system text is a first turn or the row's `system`, `system_prompt` or `system_message`. An empty first turn
      omits the template's own, as it does in a prompt; an empty `system` has no effect.
    - A turn's `weight`, `loss`, `train`, `masked` (fields.py has all) mask an answer.

    ShareGPT rows may start with an answer, which encoding drops. Raises BadRow, also for fields that cannot be
    honoured: audio, boxes, tools.
    """
    if not isinstance(row, Mapping):
        raise BadRow("malformed", f"{where}: a row must be an object, not {kind(row)}")
    record_id = "" if row.get("id") is None else row["id"]
    if isinstance(record_id, float) and record_id.is_integer():  # pandas makes floats of integers with gaps
        record_id = int(record_id)
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise BadRow("malformed", f"{where}: id must be text or a whole number, not {kind(record_id)}")
    if record_id != "":
        where = f"{where}, id {record_id!s:.80}".encode("utf-8", "replace").decode()
    try:
        check_text(str(record_id), "id")
        key = turns_key(row)
        if key is None:
            has = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"a row must have one of {', '.join(FORMATS)}; this one has {has:.200}")
        fields.check_row(row)
        turn_list = _query_turns(row) if key == "query" else _turn_list(row[key])
        column, videos = _column(row), _videos(row)
        turns, slots = _turns(turn_list, _system(row), bool(videos))
        images = _fill(slots, column, videos)
        unknown = fields.unknown_keys(row, key, turn_list)
    except BadRow as bad:
        raise BadRow(bad.reason, f"{where}: {bad}") from None
    except fields.Unsupported as error:
        raise BadRow("unsupported", f"{where}: {error}") from None
    except UserError as error:
        raise BadRow("malformed", f"{where}: {error}") from None
    return Record(str(record_id), images, turns, where, _sizes(row) if images == column else None, unknown)


def kind(value: Any) -> str:
    """Describes a JSON value, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bytes: "bytes", bool: "true or false"}
    if value is None:
        return "nothing"
    if value in ("", [], {}):
        return "empty"
    return names.get(type(value), "a number")


def check_text(text: str, name: str) -> str:
    """Returns the text. Raises UserError if it has a character that no file name or tokenizer accepts."""
    if "\0" in text:
        raise UserError(f"{name} has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} has half of a UTF-16 pair, which is no character") from None
    return text


def _query_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of pairs of question and answer")
    pairs = [*history, (row["query"], row.get("response"))]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


# Source of an `<image>`: its own image or video, the index of one in the row's column, None for the column's next
# image, or _NEXT_VIDEO.
_Slot = Medium | int | None
_NEXT_VIDEO = Video("")


def _turn_list(value: Any) -> list[Any]:
    if isinstance(value, Mapping):  # in columns, as Arrow and TFDS may store a list of objects
        columns = {key: list(column) for key, column in value.items() if isinstance(column, list | tuple)}
        if len({len(column) for column in columns.values()}) != 1:
            raise UserError("the turns must be a list, not an object")
        value = [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise UserError(f"the turns must be a list, not {kind(value)}")
    return value


def _system(row: Mapping[str, Any]) -> str | None:
    """Returns the system text that is not a turn."""
    given = {key: row[key] for key in fields.SYSTEM if row.get(key) not in (None, "")}
    for key, text in given.items():
        if not isinstance(text, str):
            raise UserError(f"{key} must be text, not {kind(text)}")
    if len(set(given.values())) > 1:
        raise UserError(f"the row is ambiguous: {' and '.join(given)} differ; leave one")
    return next(iter(given.values()), None)


def _turns(value: list[Any], system: str | None, has_videos: bool
           ) -> tuple[tuple[dict[str, Any], ...], list[_Slot]]:
    """Returns the turns in LLaVA's form, and a slot for every `<image>` in them."""
    turns, slots = [], []
    first = value[0] if isinstance(value[0], Mapping) else {}
    if system is not None and "system" in (first.get("role"), first.get("from")):
        if system not in (first.get("value"), first.get("content")):
            raise UserError("the row is ambiguous: its system text and that of its first turn differ; leave one")
        system = None
    if system is not None:
        text, slots = _content(system, "system", False, has_videos)
        turns.append({"from": "system", "value": text})
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise UserError(f"turn {number} must be an object, not {kind(turn)}")
        role = turn.get("from") if turn.get("role") is None else turn["role"]
        text = "value" if turn.get("value") is not None or "from" in turn and "content" not in turn else "content"
        if not isinstance(role, str) or role.lower() not in ROLES:
            what = f"is from {role!r:.80}" if role else "names no role"
            raise BadRow("role", f"turn {number} {what}; it must be from 'human' (user) or 'gpt' (assistant)")
        role, name = ROLES[role.lower()], f"turn {number}"
        fields.check_turn(turn, name)
        supervised = fields.is_supervised(turn, name, role == "gpt")
        text, own = _content(turn.get(text), f"{name}'s {text}", role == "gpt", has_videos)
        if text or role != "system" or not turns:
            turns.append({"from": role, "value": text} | ({"loss": False} if role == "gpt" and not supervised else {}))
        slots += own
    _check_order([turn["from"] for turn in turns], len(turns) - len(value))
    return tuple(turns), slots


def _check_order(roles: list[str], offset: int) -> None:
    for i, role in enumerate(roles):
        if role == "system" and i:
            raise BadRow("turn_order", f"turn {i + 1 - offset} is from 'system', which can only be the first")
        if i and role == roles[i - 1]:
            raise BadRow("turn_order", f"turns {i - offset} and {i + 1 - offset} are both from {role!r}")
    if "human" not in roles:
        raise BadRow("turn_order", "there is no human turn")


def _content(content: Any, name: str, is_answer: bool, has_videos: bool) -> tuple[str, list[_Slot]]:
    """Returns a turn's text, and a slot for every `<image>` in it. With `has_videos`, a `<video>` becomes one too."""
    if isinstance(content, str):
        mark = "<image>|<video>" if has_videos and not is_answer else "<image>"
        slots = [_NEXT_VIDEO if found == "<video>" else None for found in re.findall(mark, content)]
        content = re.sub(mark, "<image>", content)
        fields.check_text(content, name, is_answer)
        return check_text(content, name), slots
    if not isinstance(content, list):
        raise UserError(f"{name} must be text or a list of parts, not {kind(content)}")
    texts, slots = [], []
    for number, part in enumerate(content, 1):
        if isinstance(part, Mapping):
            fields.check_part(part, f"{name}, part {number}")
        part_type = "text" if isinstance(part, str) else part.get("type") if isinstance(part, Mapping) else None
        if part_type == "text":
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):  # a list in it would be parts of parts, without limit
                raise UserError(f"{name}, part {number} must be text, not {kind(text)}")
            text, own = _content(text, f"{name}, part {number}", is_answer, has_videos)
        elif part_type in ("image", "image_url"):
            text, own = "<image>", [_own_image(part, f"{name}, part {number}")]
        elif part_type in ("video", "video_url"):
            text, own = "<image>", [_own_video(part, f"{name}, part {number}")]
        else:
            is_medium = isinstance(part_type, str) and re.search("video|audio", part_type)
            error = fields.Unsupported if is_medium else UserError
            raise error(f"{name}, part {number}: type {part_type!r:.80}; text, image, image_url, video and video_url "
                        "can be read")
        texts.append(text)
        slots += own
    return "\n".join(texts), slots


def _own_image(part: Mapping[str, Any], name: str) -> _Slot:
    if isinstance(part.get("base64"), str):
        return _decoded(part["base64"], name)
    for key in ("image_url", "url", "path", "image"):
        if not _is_empty(part.get(key)):
            return _image(part[key], f"{name}'s {key}")
    index = part.get("index")
    return index if isinstance(index, int) and not isinstance(index, bool) else None


def _own_video(part: Mapping[str, Any], name: str) -> Video:
    for key in ("video_url", "url", "path", "video"):
        if not _is_empty(part.get(key)):
            return _video(part[key], f"{name}'s {key}")
    return _NEXT_VIDEO


def _column(row: Mapping[str, Any]) -> tuple[Image, ...]:
    """Returns the images of a row's own column."""
    return tuple(_image(image, key) for key, image in _cells(row, "image", "images"))


def _videos(row: Mapping[str, Any]) -> tuple[Video, ...]:
    """Returns the videos of a row's own column."""
    return tuple(_video(video, key) for key, video in _cells(row, "video", "videos"))


def _cells(row: Mapping[str, Any], *keys: str) -> list[tuple[str, Any]]:
    """Returns the cells of the column under one of the keys, each with that key."""
    given = {key: row[key] for key in keys if row.get(key) not in (None, "", [])}
    if len(given) > 1:
        raise UserError(f"the row is ambiguous: it has {' and '.join(given)}; leave one")
    return [(key, cell) for key, value in given.items()
            for cell in (value if isinstance(value, list | tuple) else [value]) if not _is_empty(cell)]


def _sizes(row: Mapping[str, Any]) -> tuple[tuple[int, int], ...] | None:
    """Returns width and height of each image of the row's column, if two more columns have them."""
    widths, heights, images = (row.get(key) for key in (*fields.SIZES, "images"))
    if not all(isinstance(column, list) for column in (widths, heights, images)):
        return None
    sizes = tuple(zip(widths, heights, strict=False))
    good = all(type(side) is int and side > 0 for size in sizes for side in size)
    return sizes if good and len(widths) == len(heights) == len(images) else None


def _is_empty(cell: Any) -> bool:
    """Returns whether a cell has no image: empty, or Hugging Face's {"bytes": None, "path": None}."""
    if isinstance(cell, Mapping):
        return cell.keys() <= {"bytes", "path", "url", "detail"} and not any(map(cell.get, ("bytes", "path", "url")))
    return cell is None or cell == ""


def _image(value: Any, name: str) -> Image:
    if isinstance(value, Mapping):  # {"bytes", "path"} of Hugging Face, {"url"} of OpenAI
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a path or a list of paths, not {kind(value)}")
    if value.lstrip()[:5].lower() == "data:":
        about, comma, content = value.partition(",")
        if not comma:
            raise UserError(f"{name} is a data: URL without a comma")
        if re.search(r";\s*base64\s*$", about, re.IGNORECASE):
            return _decoded(content, name)
        return _filled(unquote_to_bytes(content), name)
    value = value.removeprefix("file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
        raise UserError(f"{name} is {value:.80}, which is not on this machine; download it and give its path")
    return check_text(value, name)


def _video(value: Any, name: str) -> Video:
    if isinstance(value, list | tuple):
        raise fields.Unsupported(f"{name} is a list of frames; put them in a folder and give its path")
    path = _image(value, name)
    if isinstance(path, bytes):
        raise fields.Unsupported(f"{name} is the content of a video; write it to a file and give its path")
    return Video(path)


def _decoded(text: str, name: str) -> bytes:
    """Decodes base64, also with line breaks, percent signs, - and _ for + and /, or without padding."""
    try:
        plain = re.sub(rb"\s", b"", unquote_to_bytes(text)).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return _filled(base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True), name)
    except (ValueError, binascii.Error) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("broken_image", f"{name} is not base64 ({error})") from None


def _filled(content: bytes, name: str) -> bytes:
    if not content:
        raise BadRow("broken_image", f"{name} has an image of 0 bytes")
    return content


def _fill(slots: list[_Slot], column: tuple[Image, ...], videos: tuple[Video, ...]) -> tuple[Medium, ...]:
    """Returns the image or video of every slot. Raises BadRow unless all of the row and all slots are used."""
    if videos and not column and _NEXT_VIDEO not in slots:  # LLaVA marks a video as an image
        slots = [_NEXT_VIDEO if slot is None else slot for slot in slots]
    num_videos = slots.count(_NEXT_VIDEO)
    if num_videos != len(videos):
        raise BadRow("image_count", f"{len(videos)} videos, but {num_videos} times <video> in the turns")
    num_own = sum(isinstance(slot, str | bytes) or isinstance(slot, Video) and slot.path != "" for slot in slots)
    if len(slots) != num_own + len(column) + len(videos):
        count = len(slots) - num_videos
        raise BadRow("image_count", f"{num_own + len(column)} images, but {count} times <image> in the turns")
    numbers = {slot for slot in slots if isinstance(slot, int)}
    if numbers and numbers != set(range(len(column))):
        raise BadRow("image_count", f"the parts' indices {sorted(numbers)} are not those of the {len(column)} images")
    images, clips = iter(column), iter(videos)
    filled = []
    for slot in slots:
        if slot is None:
            filled.append(next(images))
        elif slot == _NEXT_VIDEO:
            filled.append(next(clips))
        else:
            filled.append(column[slot] if isinstance(slot, int) else slot)
    return tuple(filled)
