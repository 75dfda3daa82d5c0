"""POPE's questions, made from the things that stand in pictures."""

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import PHRASE_INSTRUCTION
from llava_jax.evaluate.tasks.pope import CATEGORIES, LABELS, Pope
from llava_jax.evaluate.tasks.question_file import fits, make_folder, read_json, read_json_lines
from llava_jax.files import replacing

ID = int | str
COCO = {"categories": [{"id": ID, "name": str}], "images": [{"id": ID, "file_name": str}],
        "annotations": [{"image_id": ID, "category_id": ID}]}
EACH = 3  # questions of either answer about a picture
FIRST_ID = 10_000_000  # the categories' ids begin at one, two and three times this


@dataclass(frozen=True)
class PopeData:
    """Makes POPE's questions and labels from instances: 3 things that are there and 3 that are not, of each picture.

    The things that are there are the first three of a picture, the same for each kind of question.
    """

    instances: str
    """COCO's instances_*.json, or JSON lines of {image, objects: [name, ...]}"""
    out: str
    """folder for llava_pope_test.jsonl and coco/coco_pope_*.json; pictures go to val2014/ in it"""
    pictures: int = 500
    """how many pictures, drawn of those with at least three kinds of things"""
    seed: int = 0
    """of the draws: the pictures, and the things of the random questions"""

    def run(self) -> int:
        things = read_things(self.instances)
        questions, labels = [], {}
        try:
            made = make(things, self.pictures, self.seed)
        except UserError as error:
            raise UserError(f"{self.instances}: {error}") from None
        for position, (category, rows) in enumerate(made.items(), 1):
            labels[category] = rows
            questions += [{"question_id": position * FIRST_ID + row["question_id"], "image": row["image"],
                           "text": row["text"] + PHRASE_INSTRUCTION, "category": category} for row in rows]
        make_folder(os.path.join(self.out, "coco"))
        for category, rows in labels.items():
            _write(os.path.join(self.out, "coco", LABELS.format(category)), rows)
        _write(os.path.join(self.out, Pope.question_file), questions)  # last: a folder with questions has their labels
        print(f"{len(questions):,} questions about {self.pictures:,} pictures in {self.out}")
        return 0


def read_things(path: str) -> dict[str, list[str]]:
    """The kinds of things in each picture, in the order in which they first come; UserError for another form."""
    if path.endswith(".jsonl"):
        things = {}
        for number, row in read_json_lines(path):
            if not fits(row, {"image": str, "objects": [str]}) or "" in row["objects"]:
                raise UserError(f"{path}, line {number}: not {{image, objects: [name, ...]}}")
            things[row["image"]] = list(dict.fromkeys(row["objects"]))
        return things
    content = read_json(path)
    if not fits(content, COCO) or not all(category["name"] for category in content["categories"]):
        raise UserError(f"{path}: not COCO's instances: images, categories with names, annotations")
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        things = {file: [] for file in files.values()}
        for instance in content["annotations"]:
            kinds, name = things[files[instance["image_id"]]], names[instance["category_id"]]
            if name not in kinds:
                kinds.append(name)
    except KeyError as error:
        raise UserError(f"{path}: an annotation is of image or category {error}, which the file lacks") from None
    return things


def make(things: Mapping[str, Sequence[str]], pictures: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of {question_id, image, text, label} by category. UserError if too few pictures or things are there.

    A thing that is not there is asked about after each that is: any (random); the one in most pictures (popular); the
    one most often beside that which was just asked about, in the pictures drawn (adversarial). None twice.
    """
    fit = [image for image, kinds in things.items() if len(kinds) >= EACH]
    if len(fit) < pictures:
        raise UserError(f"{len(fit):,} pictures have {EACH} kinds of things or more; {pictures:,} are wanted")
    draw = random.Random(seed)
    chosen = {image: things[image] for image in draw.sample(fit, pictures)}
    everywhere = Counter(kind for kinds in chosen.values() for kind in kinds)
    beside: dict[str, Counter] = defaultdict(Counter)
    for kinds in chosen.values():
        for kind in kinds:
            beside[kind].update(other for other in kinds if other != kind)
    by_number = [kind for kind, _ in everywhere.most_common()]  # equal ones in the order in which they first come
    orders: dict[str, Callable[[str], Sequence[str]]] = {
        "random": lambda thing: (),
        "popular": lambda thing: by_number,
        "adversarial": lambda thing: [kind for kind, _ in beside[thing].most_common()],
    }
    return {category: _questions(chosen, list(everywhere), orders[category], draw) for category in CATEGORIES}


def _questions(chosen: Mapping[str, Sequence[str]], everything: Sequence[str],
               order: Callable[[str], Sequence[str]], draw: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def ask(image: str, thing: str, label: str) -> None:
        article = "an" if thing[0] in "aeiou" else "a"
        text = f"Is there {article} {thing} in the image?"
        rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})

    for image, kinds in chosen.items():
        absent = [kind for kind in everything if kind not in kinds]
        if len(absent) < EACH:
            raise UserError(f"{image}: of all {len(everything)} kinds of things fewer than {EACH} are not in it")
        for thing in kinds[:EACH]:
            other = next((kind for kind in order(thing) if kind in absent), None) or draw.choice(absent)
            absent.remove(other)
            ask(image, thing, "yes")
            ask(image, other, "no")
    return rows


def _write(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
