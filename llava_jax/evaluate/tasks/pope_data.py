"""Makes POPE's questions from the objects in images."""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.errors import UserError
from llava_jax.evaluate.tasks.base import PHRASE_INSTRUCTION
from llava_jax.evaluate.tasks.pope import CATEGORIES, LABELS, Pope
from llava_jax.evaluate.tasks.question_file import read_json
from llava_jax.files import make_folder, matches_schema, read_json_lines, write_json_lines

ID = int | str
COCO = {"categories": [{"id": ID, "name": str}], "images": [{"id": ID, "file_name": str}],
        "annotations": [{"image_id": ID, "category_id": ID}]}
EACH = 3
"""Number of questions with either answer about an image."""
FIRST_ID = 10_000_000
"""First question id of the first category. The next categories start at two and three times this."""


@dataclass(frozen=True)
class PopeData:
    """Makes POPE's questions and labels from instances: 3 present and 3 absent objects per image.

    The present objects are the first three of an image, the same for each category of questions.
    """

    instances: str
    """COCO's instances_*.json, or JSON lines of {image, objects: [name, ...]}."""
    out: str
    """Folder for llava_pope_test.jsonl and coco/coco_pope_*.json. Its folder val2014/ is for the images."""
    count: int = 500
    """Number of images, drawn from those with at least three kinds of objects."""
    seed: int = 0
    """Random seed for the images and for the objects of the random questions."""

    def run(self) -> int:
        objects = read_objects(self.instances)
        try:
            rows_of = make_questions(objects, self.count, self.seed)
        except UserError as error:
            raise UserError(f"{self.instances}: {error}") from None
        make_folder(os.path.join(self.out, "coco"))
        questions = []
        for position, (category, rows) in enumerate(rows_of.items(), 1):
            write_json_lines(os.path.join(self.out, "coco", LABELS.format(category)), rows)
            questions += [{"question_id": position * FIRST_ID + row["question_id"], "image": row["image"],
                           "text": row["text"] + PHRASE_INSTRUCTION, "category": category} for row in rows]
        # Last, because a folder with questions must have their labels.
        write_json_lines(os.path.join(self.out, Pope.question_file), questions)
        print(f"{len(questions):,} questions about {self.count:,} pictures in {self.out}")
        return 0


def read_objects(path: str) -> dict[str, list[str]]:
    """Returns the kinds of objects in each image, in the order of first appearance."""
    if path.endswith(".jsonl"):
        objects = {}
        for number, row in read_json_lines(path):
            if not matches_schema(row, {"image": str, "objects": [str]}) or "" in row["objects"]:
                raise UserError(f"{path}, line {number}: not {{image, objects: [name, ...]}}")
            objects[row["image"]] = list(dict.fromkeys(row["objects"]))
        return objects
    content = read_json(path, lambda x: matches_schema(x, COCO) and all(row["name"] for row in x["categories"]),
                        "not COCO's instances: images, categories with names, annotations")
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        objects = {file: {} for file in files.values()}  # dicts as sets that keep their order
        for instance in content["annotations"]:
            objects[files[instance["image_id"]]][names[instance["category_id"]]] = None
    except KeyError as error:
        raise UserError(f"{path}: an annotation is of image or category {error}, which the file lacks") from None
    return {file: list(kinds) for file, kinds in objects.items()}


def make_questions(objects: Mapping[str, Sequence[str]], images: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Returns rows of {question_id, image, text, label} by category. Raises UserError for too few images or objects.

    After each present object comes a question about an absent one: any (random), the one in most images (popular), or
    the one that occurs most often with the present object in the drawn images (adversarial). None is asked twice.
    """
    usable = [image for image, kinds in objects.items() if len(kinds) >= EACH]
    if len(usable) < images:
        raise UserError(f"{len(usable):,} pictures have {EACH} kinds of things or more; {images:,} are wanted")
    rng = random.Random(seed)
    chosen = {image: objects[image] for image in rng.sample(usable, images)}
    frequency = Counter(kind for kinds in chosen.values() for kind in kinds)
    together: dict[str, Counter] = defaultdict(Counter)
    for kinds in chosen.values():
        for kind in kinds:
            together[kind].update(other for other in kinds if other != kind)
    # Equally frequent kinds keep the order of first appearance.
    candidates = {
        "random": dict.fromkeys(frequency, ()),
        "popular": dict.fromkeys(frequency, [kind for kind, _ in frequency.most_common()]),
        "adversarial": {kind: [other for other, _ in together[kind].most_common()] for kind in frequency},
    }
    return {category: _questions(chosen, list(frequency), candidates[category], rng) for category in CATEGORIES}


def _questions(chosen: Mapping[str, Sequence[str]], all_kinds: Sequence[str],
               candidates: Mapping[str, Sequence[str]], rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image, kinds in chosen.items():
        absent = [kind for kind in all_kinds if kind not in kinds]
        if len(absent) < EACH:
            raise UserError(f"{image}: of all {len(all_kinds)} kinds of things fewer than {EACH} are not in it")
        for present in kinds[:EACH]:
            other = next((kind for kind in candidates[present] if kind in absent), None) or rng.choice(absent)
            absent.remove(other)
            for kind, label in ((present, "yes"), (other, "no")):
                article = "an" if kind[0] in "aeiou" else "a"
                rows.append({"question_id": len(rows) + 1, "image": image,
                             "text": f"Is there {article} {kind} in the image?", "label": label})
    return rows
