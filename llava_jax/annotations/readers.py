"""Readers of captions and boxes: COCO's files, JSON lines and TFDS data sets."""

import contextlib
import dataclasses
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_jax.annotations.boxes import MAX_SUSPECT_SHARE, Annotations, BoxArrays, BoxCollector
from llava_jax.data.json_rows import JsonRows, read_members
from llava_jax.data.records import check_text
from llava_jax.data.tfds_rows import TfdsRows
from llava_jax.errors import UserError


def read_coco(captions: str, instances: str, names: str) -> Annotations:
    """Reads COCO's captions_*.json and instances_*.json ("" for none).

    Boxes of the files are [x, y, width, height] in pixels. The id of an image is COCO's id with twelve digits.
    """
    notes: Counter[str] = Counter()
    listed, texts = _read_captions(captions, notes)
    if texts and 2 * len(texts) < len(listed):
        raise UserError(f"{captions}: of its {len(listed):,} images {len(listed) - len(texts):,} have no caption; "
                         "take the whole file")
    notes["images without captions skipped"] += len(listed) - len(texts)
    notes["images whose file another image has too"] += len(texts) - len({listed[number] for number in texts})
    sizes, categories, boxes = {}, [], BoxCollector().to_arrays()
    if instances:
        files, sizes, categories, boxes = _read_instances(instances)
        _require_same_split(captions, instances, {number: listed[number] for number in texts}, files)
    numbers = sorted(texts.keys() & sizes.keys() if instances else texts)
    notes["images skipped that the instances file does not have"] += len(texts) - len(numbers)
    ids = np.array(numbers, np.int64)
    own = np.isin(boxes.image, ids)
    notes["boxes dropped: of images that were skipped"] += int((~own).sum())
    boxes = boxes[own]
    boxes.image = np.searchsorted(ids, boxes.image)
    size = np.array([sizes[number] for number in numbers] if instances else [], np.float64).reshape(-1, 2)
    boxes = _without_fractions(boxes, size, notes, lambda image: f"{instances}, image id {numbers[image]}")
    boxes.corners[:, 2:] += boxes.corners[:, :2]
    boxes.corners /= np.tile(size, 2)[boxes.image]
    return Annotations(
        files=[captions, instances] if instances else [captions],
        has_boxes=bool(instances),
        ids=[f"{number:012d}" for number in numbers],
        names=[_name(listed[number], names) for number in numbers],
        captions=[tuple(texts[number]) for number in numbers],
        categories=categories,
        boxes=boxes,
        notes=notes,
        where=lambda image: f"{captions}, image id {numbers[image]}",
        where_boxes=lambda image: f"{instances}, image id {numbers[image]}",
    )


def _without_fractions(
    boxes: BoxArrays, sizes: np.ndarray, notes: Counter[str], where: Callable[[int], str]
) -> BoxArrays:
    """Drops boxes that can only be fractions instead of pixels. Raises UserError if they are many."""
    fractions = (boxes.corners.max(1, initial=0) <= 1) & (boxes.corners[:, 2:] > 0).all(1)
    fractions &= (sizes[boxes.image] > 2).all(1)
    if fractions.sum() > MAX_SUSPECT_SHARE * len(boxes):
        first = int(np.argmax(fractions))
        raise UserError(f"{where(int(boxes.image[first]))}: bbox {boxes.corners[first].tolist()} must be fractions, as "
                        f"are {fractions.sum():,} of {len(boxes):,} boxes of the file; pixels are needed")
    notes["boxes dropped: in fractions, not in pixels"] += int(fractions.sum())
    return boxes[~fractions]


def read_rows(path: str, names: str) -> Annotations:
    """Reads a file of JSON lines (or one list), or a TFDS folder given as FOLDER or FOLDER:SPLIT.

    A JSON row is an object with
    - `image`: the image's file name;
    - `id`: text or a whole number, by default the file name without its extension;
    - `captions`, a list of texts, or `caption`, one text;
    - `boxes`: a list of {"category": text, "bbox": [x, y, width, height]} in pixels, as in COCO, which also needs
      `width` and `height` in the row; or of {"category": text, "box": [x1, y1, x2, y2]} in fractions of the image.
      Both may have "iscrowd": 1.

    A TFDS row has the features of coco_captions: `captions` (texts, or dicts with a `text`), `objects` (dicts of
    `bbox`, `label` and maybe `is_crowd`), `image/id` and `image/filename`.
    """
    if path.endswith((".json", ".jsonl")) and not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if os.path.isfile(path):
        rows, read = JsonRows(path), _read_json_row
        files = [path]
    else:
        rows, read = TfdsRows(path), _read_tfds_row
        files = rows.files
    notes: Counter[str] = Counter()
    boxes, categories, has_boxes = BoxCollector(), {}, False
    kept: dict[str, tuple[int, str, tuple[str, ...]]] = {}
    for number in _progress(range(len(rows)), path):
        row = rows[number]
        try:
            item = read(row, notes)
        except ValueError as error:
            raise UserError(f"{rows.where(number)}: {error}") from None
        has_boxes |= item.boxes is not None
        name = _name(item.image, names)
        if item.id in kept and kept[item.id][1] != name:
            raise UserError(f"{rows.where(number)}: has the id {item.id!r} of {kept[item.id][1]}; "
                             "give every image an id of its own")
        if item.id in kept:
            notes["images given twice, of which the first is kept"] += 1
        elif not item.captions:
            notes["images without captions skipped"] += 1
        else:
            for category, corners, crowd in item.boxes or ():
                boxes.add(len(kept), categories.setdefault(category, len(categories)), corners, crowd)
            kept[item.id] = number, name, item.captions
    numbers = [number for number, _, _ in kept.values()]
    return Annotations(
        files=files,
        has_boxes=has_boxes,
        ids=list(kept),
        names=[name for _, name, _ in kept.values()],
        captions=[captions for _, _, captions in kept.values()],
        categories=list(categories),
        boxes=boxes.to_arrays(),
        notes=notes,
        where=lambda image: rows.where(numbers[image]),
        where_boxes=lambda image: rows.where(numbers[image]),
        box_format="bbox: [x, y, width, height] in pixels, box: [x1, y1, x2, y2] in fractions",
    )


def _read_captions(path: str, notes: Counter[str]) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Returns file names of all images, and captions of those that have any, by image id."""
    listed: dict[int, str] = {}
    texts: dict[int, list[str]] = {}
    for key, item in _members(path, "images", "annotations"):
        with _where(path, key, item):
            if key == "images":
                _add_image(listed, item)
            elif "caption" not in item and "bbox" in item:
                raise UserError("has a box and no caption; is this the instances file?")
            else:
                found = texts.setdefault(_integer(item, "image_id"), [])
                _add_caption(found, item.get("caption"), notes)
    _require_images(path, listed, texts, "captions")
    return listed, {number: found for number, found in texts.items() if found}


def _read_instances(path: str) -> tuple[dict[int, str], dict[int, tuple[float, float]], list[str], BoxArrays]:
    """Returns file names and (width, height) by image id, names of categories, and the boxes.

    `image` of the boxes is the image's id; `corners` is x, y, width, height in pixels.
    """
    listed: dict[int, str] = {}
    sizes: dict[int, tuple[float, float]] = {}
    names: dict[int, str] = {}
    boxes = BoxCollector()
    for key, item in _members(path, "images", "annotations", "categories"):
        with _where(path, key, item):
            if key == "images":
                sizes[_add_image(listed, item)] = _size(item)
            elif key == "categories":
                names[_integer(item, "id")] = _text(item, "name")
            elif "bbox" not in item and "caption" in item:
                raise UserError("has a caption and no box; is this the captions file?")
            else:
                corners, crowd = _numbers(item, "bbox"), bool(item.get("iscrowd"))
                boxes.add(_integer(item, "image_id"), _integer(item, "category_id"), corners, crowd)
    found = boxes.to_arrays()
    _require_images(path, sizes, set(found.image.tolist()), "boxes")
    number = {category: i for i, category in enumerate(names)}
    if unknown := sorted(set(found.category.tolist()) - names.keys()):
        first = int(found.image[found.category == unknown[0]][0])
        raise UserError(f"{path}: category id {unknown[0]} of a box in image id {first} is not among its "
                         f"{len(names)} categories; take the whole file")
    found.category = np.array([number[category] for category in found.category.tolist()], np.int64)
    return listed, sizes, list(names.values()), found


def _members(path: str, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the items of the lists under `keys`. Raises UserError if a list is missing or empty."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    seen = set()
    for key, item in _progress(read_members(path), path):
        if key in keys:
            seen.add(key)
            yield key, item
    if missing := [key for key in keys if key not in seen]:
        raise UserError(f"{path}: not COCO's, or cut: it has no {' and no '.join(missing)}")


def _add_image(listed: dict[int, str], item: dict[str, Any]) -> int:
    """Adds the file name of an image, and returns its id."""
    number, file = _integer(item, "id"), _text(item, "file_name")
    if listed.setdefault(number, file) != file:
        raise UserError(f"stands for two images, {listed[number]} and {file}")
    return number


def _require_same_split(captions: str, instances: str, captioned: dict[int, str], boxed: dict[int, str]) -> None:
    """Raises UserError if the two files list different images under the same ids.

    `captioned` and `boxed` map image ids to file names. Ids of other data sets than COCO may start at 1 in every split.
    """
    same = captioned.keys() & boxed.keys()
    for number in sorted(same):  # of COCO's own ids, 2014 and 2017 mean the same images
        if _name(captioned[number], "short") != _name(boxed[number], "short"):
            raise UserError(f"{instances}: image id {number} is {boxed[number]}, but {captioned[number]} in "
                            f"{captions}; take both files of the same split")
    if 2 * len(same) < len(captioned):
        raise UserError(f"{instances}: has {len(same):,} of the {len(captioned):,} images of {captions}; "
                         "take both files of the same split")


def _require_images(path: str, listed: dict[int, Any], used: Iterable[int], what: str) -> None:
    if lost := set(used) - listed.keys():
        raise UserError(f"{path}: {len(lost):,} images have {what} but are not among the file's images, such as image "
                         f"id {min(lost)}; take the whole file")


@contextlib.contextmanager
def _where(path: str, key: str, item: Any) -> Iterator[None]:
    """Puts file and item in front of the message of a UserError."""
    if not isinstance(item, dict):
        raise UserError(f"{path}: an item of its {key} is no object")
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: of its {key}, id {item.get('id')!r:.40} {error}") from None


@dataclasses.dataclass(frozen=True)
class _CaptionRow:
    """An image with captions. `boxes` are (category, (x1, y1, x2, y2), crowd), or None if the row has no such field."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: list[tuple[str, Sequence[float], bool]] | None


def _read_json_row(row: Any, notes: Counter[str]) -> _CaptionRow:
    if not isinstance(row, dict):
        raise UserError("a row must be an object")
    image = _text(row, "image")
    name = row.get("id")
    if name is None:
        name = os.path.splitext(image)[0]
    elif isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"has as id {name!r:.40}; it must be text or a whole number")
    if ("captions" in row) == ("caption" in row):
        raise UserError("needs captions, a list of texts, or caption, one text")
    given = row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(given, list):
        raise UserError("has captions that are no list")
    captions: list[str] = []
    for caption in given:
        _add_caption(captions, caption, notes)
    if row.get("boxes") is None:
        return _CaptionRow(check_text(str(name), "id"), image, tuple(captions), None)
    if not isinstance(row["boxes"], list) or not all(isinstance(box, dict) for box in row["boxes"]):
        raise UserError("has boxes that are no list of objects")
    boxes = [_json_box(box, row) for box in row["boxes"]]
    return _CaptionRow(check_text(str(name), "id"), image, tuple(captions), boxes)


def _json_box(box: dict[str, Any], row: dict[str, Any]) -> tuple[str, Sequence[float], bool]:
    if ("bbox" in box) == ("box" in box):
        raise UserError("has a box that needs either bbox, [x, y, width, height] in pixels, or box, [x1, y1, x2, y2] "
                         "in fractions of the image")
    if "box" in box:
        corners = _numbers(box, "box")
        if max(map(abs, corners)) > 2:
            raise UserError(f"has as box {list(corners)}, which are no fractions of the image; pixels are given as "
                             "bbox, [x, y, width, height]")
    else:
        (x, y, box_width, box_height), (width, height) = _numbers(box, "bbox"), _size(row)
        if 0 < max(x, y, box_width, box_height) <= 1 < min(width, height):
            raise UserError(f"has as bbox {box['bbox']}, which are no pixels; fractions are given as box, "
                             "[x1, y1, x2, y2]")
        corners = x / width, y / height, (x + box_width) / width, (y + box_height) / height
    return _text(box, "category"), corners, bool(box.get("iscrowd"))


def _read_tfds_row(row: dict[str, Any], notes: Counter[str]) -> _CaptionRow:
    if not isinstance(row.get("captions"), list) or "image/id" not in row or "image/filename" not in row:
        raise UserError("coco_captions' features captions, image/id and image/filename are needed; it has "
                         + ", ".join(row))
    captions: list[str] = []
    for caption in row["captions"]:
        _add_caption(captions, caption.get("text") if isinstance(caption, dict) else caption, notes)
    number = row["image/id"]
    name = f"{number:012d}" if isinstance(number, int) else check_text(str(number), "image/id")
    objects = row.get("objects")
    if objects is None:
        return _CaptionRow(name, _text(row, "image/filename"), tuple(captions), None)
    boxes = []
    for thing in objects:
        if not isinstance(thing, dict) or "bbox" not in thing:
            raise UserError("has objects without bbox, or in another format than TFDS's own, ymin, xmin, ymax, xmax")
        if thing.get("label") is None:
            notes["boxes dropped: without a category"] += 1
            continue
        y1, x1, y2, x2 = thing["bbox"]
        boxes.append((_text(thing, "label"), (x1, y1, x2, y2), bool(thing.get("is_crowd"))))
    return _CaptionRow(name, _text(row, "image/filename"), tuple(captions), boxes)


def _add_caption(captions: list[str], caption: Any, notes: Counter[str]) -> None:
    """Adds a caption, as one line, to the captions of its image."""
    if not isinstance(caption, str):
        raise UserError(f"has as caption {caption!r:.40}; it must be text")
    caption = " ".join(check_text(caption, "caption").split())
    if not caption:
        notes["captions dropped: empty"] += 1
    elif caption in captions:
        notes["captions dropped: given twice"] += 1
    else:
        captions.append(caption)


def _name(file: str, names: str) -> str:
    """Returns the name of an image: COCO_train2014_000000033471.jpg becomes 000000033471.jpg if `names` is "short"."""
    return re.sub(r"(^|/)COCO_[a-z]+20\d\d_(?=[^/]+$)", r"\1", file) if names == "short" else file


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has as {key} {value!r:.40}; it must be text")
    return check_text(" ".join(value.split()), key) if key in ("name", "category", "label") else check_text(value, key)


def _integer(item: dict[str, Any], key: str) -> int:
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise UserError(f"has as {key} {value!r:.40}; it must be a whole number")
    return value


def _numbers(item: dict[str, Any], key: str) -> Sequence[float]:
    value = item.get(key)
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise UserError(f"has as {key} {value!r:.60}; it must be four numbers")
    return value


def _size(item: dict[str, Any]) -> tuple[float, float]:
    width, height = item.get("width"), item.get("height")
    if not _is_number(width) or not _is_number(height) or width <= 0 or height <= 0:
        raise UserError(f"has as width and height {width!r:.20} and {height!r:.20}; they must be those of the image "
                         "in pixels")
    return width, height


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # not so of NaN


def _progress(items: Iterable, path: str) -> Iterable:
    return tqdm(items, desc=os.path.basename(path), unit=" items", disable=not sys.stderr.isatty())
