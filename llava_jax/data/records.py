"""One Record for every format, and BadRow for what cannot become one."""

import dataclasses
from typing import Any

REASONS = ("malformed", "missing_image", "broken_image", "image_count", "no_supervised_tokens", "too_long")


class BadRow(ValueError):
    """A row that cannot be trained on: one line that names file and row, and a `reason` out of REASONS to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # worker processes send it to the main process
        return BadRow, (self.reason, str(self))


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about none, one or several images."""

    id: str
    images: tuple[str, ...]  # paths, in the order of their <image> in the turns
    turns: tuple[dict[str, str], ...]  # {"from": "human" | "gpt", "value": text}
    source: str  # file and row, for messages


def parse_row(row: Any, where: str) -> Record:
    """Reads a row of LLaVA's JSON: `id`, `image` (a path, a list of paths, or absent), `conversations`.

    `where` names file and row. ShareGPT rows, which may open with an answer, are read as they are: encoding drops that
    turn. Raises BadRow: "malformed" for anything of the wrong type, an unknown role or two turns of one role in
    succession; "image_count" if there are not as many images as `<image>` in the turns.
    """
    if not isinstance(row, dict):
        raise BadRow("malformed", f"{where}: a row must be an object, not {_kind(row)}")
    record_id = "" if row.get("id") is None else row["id"]
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise BadRow("malformed", f"{where}: id must be text or a whole number, not {_kind(record_id)}")
    if record_id != "":
        where = f"{where}, id {record_id}"
    images = _images(row.get("image"), where)
    turns = _turns(row.get("conversations"), where)
    marks = sum(turn["value"].count("<image>") for turn in turns)
    if marks != len(images):
        raise BadRow("image_count", f"{where}: {len(images)} images, but {marks} times <image> in the turns")
    return Record(str(record_id), images, turns, where)


def _images(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    paths = (value,) if isinstance(value, str) else value
    if not isinstance(paths, tuple | list) or not all(isinstance(path, str) and path for path in paths):
        raise BadRow("malformed", f"{where}: image must be a path or a list of paths, not {_kind(value)}")
    return tuple(paths)


def _turns(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadRow("malformed", f"{where}: conversations must be a list of turns, not {_kind(value)}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("malformed", f"{where}: turn {number} must be an object with from and value, both text")
        role = turn.get("from")
        if role not in ("human", "gpt"):
            raise BadRow("malformed", f"{where}: turn {number} is from {role!r}; it must be from 'human' or 'gpt'")
        if turns and turns[-1]["from"] == role:
            raise BadRow("malformed", f"{where}: turns {number - 1} and {number} are both from {role!r}")
        turns.append({"from": role, "value": turn["value"]})
    return tuple(turns)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    if value in ("", [], {}):
        return "empty"
    return names.get(type(value), "a number")
