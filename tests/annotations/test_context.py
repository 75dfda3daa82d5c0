"""Captions and boxes from files of COCO's structure, JSON lines and a TFDS data set, against brute force."""

import io
import itertools
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llava_jax.annotations.boxes import Box
from llava_jax.annotations.context import AnnotationSource, Context, open_contexts
from llava_jax.data import json_rows
from llava_jax.errors import UserError

CATEGORIES = [{"supercategory": "person", "id": 1, "name": "person"}, {"id": 18, "name": "dog"},
              {"id": 10, "name": "traffic light"}]


def coco(images: int = 6, seed: int = 0) -> tuple[dict, dict]:
    """Contents of a captions and an instances file; boxes inside the image, none twice."""
    rng = random.Random(seed)
    ids = rng.sample(range(1, 600_000), images)
    listed = [
        {"license": 3, "file_name": f"COCO_train2014_{number:012d}.jpg", "coco_url": "http://x/y.jpg", "id": number,
         "height": rng.randrange(100, 640), "width": rng.randrange(100, 640), "date_captured": "2013-11-14 17:02:52"}
        for number in ids
    ]
    captions = [{"image_id": number, "id": 7 * k, "caption": f" Caption {k} of é {number}.\n "}
                for number, k in itertools.product(ids, range(5))]
    things = []
    for image in listed:
        for k in range(rng.randrange(1, 9)):
            x, y = rng.uniform(0, 0.6) * image["width"], rng.uniform(0, 0.6) * image["height"]
            width, height = rng.uniform(0.01, 0.3) * image["width"], rng.uniform(0.01, 0.3) * image["height"]
            crowd = int(rng.random() < 0.2)
            segmentation = {"counts": [rng.randrange(99) for _ in range(9)], "size": [image["height"], image["width"]]}
            things.append({
                "segmentation": segmentation if crowd else [[round(rng.uniform(0, 99), 2) for _ in range(12)]],
                "area": width * height, "iscrowd": crowd, "image_id": image["id"],
                "bbox": [round(place, 2) for place in (x, y, width, height)],
                "category_id": rng.choice(CATEGORIES)["id"], "id": 900_000 + len(things) + k,
            })
    rng.shuffle(captions), rng.shuffle(things)
    about = {"info": {"year": 2014, "contributor": "nobody"}, "licenses": [{"id": 1, "name": "free"}], "more": []}
    return (
        about | {"images": listed, "annotations": captions},
        about | {"images": listed[::-1], "annotations": things, "categories": CATEGORIES},
    )


def brute(captions: dict, instances: dict) -> list[Context]:
    """The contexts of all images, from contents that need no mending."""
    names = {category["id"]: category["name"] for category in CATEGORIES}
    found = []
    for image in sorted(captions["images"], key=lambda image: image["id"]):
        own = [item["caption"] for item in captions["annotations"] if item["image_id"] == image["id"]]
        texts, boxes = [" ".join(caption.split()) for caption in own], []
        for thing in (thing for thing in instances["annotations"] if thing["image_id"] == image["id"]):
            (x, y, width, height), across, down = thing["bbox"], image["width"], image["height"]
            place = x / across, y / down, (x + width) / across, (y + height) / down
            boxes.append(Box(names[thing["category_id"]], *place, bool(thing["iscrowd"])))
        name = f"{image['id']:012d}"
        found.append(Context(name, f"{name}.jpg", tuple(texts), tuple(boxes)))
    return found


def write(folder, captions: dict, instances: dict, order=None, **options) -> dict[str, str]:
    """Files as arguments of AnnotationSource."""
    paths = {}
    for name, content in (("captions", captions), ("instances", instances)):
        keys = sorted(content, key=(order or list(content)).index) if order else list(content)
        paths[name] = str(folder / f"{name}.json")
        with open(paths[name], "w") as file:
            json.dump({key: content[key] for key in keys}, file, **options)
    return paths


def contexts_of(folder, captions: dict, instances: dict, **options):
    return open_contexts(AnnotationSource(**write(folder, captions, instances), **options))


def test_lines_and_texts():
    assert Box("person", 0.63, 0.1, 1.0, 0.53249).line() == "person: [0.63, 0.1, 1.0, 0.532]"
    assert Box("dog", 0, 1 / 3, 0.9996, 1, crowd=True).line() == "dog (crowd): [0.0, 0.333, 1.0, 1.0]"
    assert Box("dog", np.float64(0.25), 0, 1, 1).line() == "dog: [0.25, 0.0, 1.0, 1.0]"
    context = Context("1", "1.jpg", ("A dog.", "A big dog."), (Box("dog", 0, 0, 1, 1), Box("cat", 0.1, 0, 1, 1)))
    assert context.text == "A dog.\nA big dog.\n\ndog: [0.0, 0.0, 1.0, 1.0]\ncat: [0.1, 0.0, 1.0, 1.0]"
    assert Context("1", "1.jpg", ("A dog.",)).text == "A dog."


@pytest.mark.parametrize("piece, indent", [(100, None), (1 << 20, 1)])
def test_coco_files_in_any_order_of_their_members(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(json_rows, "SMALL_PIECE_BYTES", piece)
    captions, instances = coco()
    expected = brute(captions, instances)
    for order in itertools.permutations(["annotations", "images", "categories"]):
        paths = write(tmp_path, captions, instances, ["info", *order, "licenses", "more"], indent=indent)
        contexts = open_contexts(AnnotationSource(**paths))
        assert list(contexts) == expected and len(contexts) == 6
    assert contexts[2:4] == expected[2:4] and contexts[-1] == expected[-1]
    assert contexts.categories == ("person", "dog", "traffic light") and contexts.has_boxes and not contexts.notes
    assert contexts.files == tuple(paths.values())
    assert contexts.where(0) == f"{paths['captions']}, image id {int(expected[0].id)}"
    with pytest.raises(IndexError):
        contexts[6]


def test_without_instances(tmp_path):
    captions, instances = coco()
    contexts = open_contexts(AnnotationSource(captions=write(tmp_path, captions, instances)["captions"]))
    assert [context.captions for context in contexts] == [context.captions for context in brute(captions, instances)]
    assert not contexts.has_boxes and not any(context.boxes for context in contexts) and not contexts.notes


def test_names(tmp_path):
    captions, instances = coco(2)
    captions["images"][0]["file_name"] = "folder/COCO_val2017_x.png"
    by_id = {context.id: context.image for context in contexts_of(tmp_path, captions, instances, prefix="coco/")}
    first, second = (f"{image['id']:012d}" for image in captions["images"])
    assert by_id == {first: "coco/folder/x.png", second: f"coco/{second}.jpg"}
    by_id = {context.id: context.image for context in contexts_of(tmp_path, captions, instances, names="file")}
    assert by_id == {first: "folder/COCO_val2017_x.png", second: f"COCO_train2014_{second}.jpg"}


def one_image(*boxes: tuple, captions: tuple[str, ...] = ("A street.",)) -> tuple[dict, dict]:
    """An image of 200 x 100 pixels with boxes (category id, x, y, width, height[, crowd])."""
    image = {"id": 5, "file_name": "000000000005.jpg", "width": 200, "height": 100}
    things = [{"id": n, "image_id": 5, "category_id": box[0], "bbox": list(box[1:5]), "iscrowd": int(len(box) > 5)}
              for n, box in enumerate(boxes)]
    texts = [{"id": n, "image_id": 5, "caption": caption} for n, caption in enumerate(captions)]
    return ({"images": [image], "annotations": texts},
            {"images": [image], "annotations": things, "categories": CATEGORIES})


def test_boxes_outside_of_zero_size_and_given_twice(tmp_path):
    files = one_image((1, -20, 50, 100, 80), (1, 250, 10, 20, 20), (18, 10, 10, 0, 20), (18, 10, 10, 20, -5),
                      (1, 100, 0, 100.05, 50), (10, 20, 20, 20, 20), (10, 20, 20, 20, 20), (18, 20, 20, 20, 20))
    contexts = contexts_of(tmp_path, *files)
    assert contexts[0].boxes == (Box("person", 0, 0.5, 0.4, 1), Box("person", 0.5, 0, 1, 0.5),
                                 Box("traffic light", 0.1, 0.2, 0.2, 0.4), Box("dog", 0.1, 0.2, 0.2, 0.4))
    # What exceeds the edge by less than three decimals can show is not counted as clipped.
    assert contexts.notes == {"boxes clipped at the image's edge": 2, "boxes dropped: given twice": 1,
                              "boxes dropped: of zero size or outside the image": 3}


GOOD = [(1, 10 * n, 10, 50, 40 + n) for n in range(8)]  # [x, y, width, height] in 200 x 100 pixels


@pytest.mark.parametrize(("wrong", "note", "message"), [
    ((18, 0.1, 0.2, 0.5, 0.5), "boxes dropped: in fractions, not in pixels",
     r"bbox \[0.1, 0.2, 0.5, 0.5\] must be fractions, as are 8 of 16 boxes of the file; pixels are needed"),
    ((18, 10, 20, 900, 30), "boxes dropped: far outside the image",
     "dog has a box beyond the image's edge, as have 8 of the source's 16; boxes must be"),
    ((18, -150, 20, 160, 30), "boxes dropped: far outside the image", "dog has a box beyond the image's edge"),
    ((18, 150, 50, 120, 70), "boxes clipped at the image's edge", "dog has a box beyond the image's edge"),  # corners
    ((18, 90, 60, -30, -20), "boxes dropped: of zero size or outside the image", "dog has a box of negative size"),
    ((18, 90, 60, -30, 20), "boxes dropped: of zero size or outside the image", "dog has a box of negative size"),
])
def test_boxes_that_cannot_be_meant(tmp_path, wrong, note, message):
    """One is left out, or clipped, and counted; many are another format, which is refused."""
    contexts = contexts_of(tmp_path, *one_image(*GOOD, wrong))
    assert contexts.notes == {note: 1} and len(contexts[0].boxes) == 8 + ("clipped" in note)
    many = [(wrong[0], wrong[1] + n / 100, *wrong[2:]) for n in range(8)]
    with pytest.raises(UserError, match=f"instances.json, image id 5: {message}"):
        contexts_of(tmp_path, *one_image(*GOOD, *many))


def test_width_and_height_of_images_exchanged(tmp_path):
    captions, instances = coco(40)
    for image in instances["images"]:
        image["width"], image["height"] = 100, 600
        for box in (item["bbox"] for item in instances["annotations"] if item["image_id"] == image["id"]):
            box[:] = [box[0] / 700 * 600 + 100, box[1] / 7, box[2], box[3] / 7]
    with pytest.raises(UserError, match="has a box beyond the image's edge"):
        contexts_of(tmp_path, captions, instances)


@pytest.mark.parametrize(("box", "message"), [
    ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "are no pixels; fractions are given as box"),
    ({"bbox": [50, 60, -30, -20]}, "has a box of negative size, or with its corners swapped"),
    ({"bbox": [50, 60, 500, 20]}, "has a box beyond the image's edge"),
    ({"box": [0.5, 0.5, 0.2, 0.9]}, "has a box of negative size, or with its corners swapped"),
    ({"box": [0.5, 0.5, 1.2, 0.9]}, "has a box beyond the image's edge"),
    ({"box": [-0.5, 0.5, 0.2, 0.9]}, "has a box beyond the image's edge"),
    ({"box": [50, 50, 90, 90]}, "are no fractions of the image"),
])
def test_boxes_of_json_lines_that_cannot_be_meant(tmp_path, box, message):
    row = {"width": 200, "height": 100, "caption": "A dog.", "boxes": [{"category": "dog"} | box]}
    good = row | {"boxes": [{"category": "dog", "bbox": [1, 2, 30, 40]}]}
    path = jsonl(tmp_path, {"image": "1.jpg"} | good, {"image": "2.jpg"} | row)
    with pytest.raises(UserError, match=re.escape(f"{path}, row 2 (line 2): ") + ".*" + message):
        open_contexts(AnnotationSource(data=path))


def test_chosen_boxes(tmp_path):
    files = one_image((1, 0, 0, 20, 20), (18, 0, 0, 100, 100), (10, 50, 50, 40, 40), (1, 0, 0, 200, 100, "crowd"))

    def lines(**options):
        return [box.line() for box in contexts_of(tmp_path, *files, **options)[0].boxes]

    small, dog, light, crowd = ["person: [0.0, 0.0, 0.1, 0.2]", "dog: [0.0, 0.0, 0.5, 1.0]",
                                "traffic light: [0.25, 0.5, 0.45, 0.9]", "person (crowd): [0.0, 0.0, 1.0, 1.0]"]
    assert lines() == [small, dog, light, crowd]
    assert lines(crowd="drop") == [small, dog, light]
    assert lines(min_box_area=0.05) == [dog, light, crowd]
    assert lines(max_boxes=3) == [dog, light, crowd]
    assert lines(max_boxes=2, crowd="drop") == [dog, light]
    assert lines(min_boxes=4) == [small, dog, light, crowd]
    with pytest.raises(UserError, match="no image has 4 boxes"):
        lines(min_boxes=4, crowd="drop")


def test_max_boxes_against_sorting(tmp_path):
    captions, instances = coco(20, seed=3)
    for context, full in zip(contexts_of(tmp_path, captions, instances, max_boxes=3, min_boxes=0),
                             brute(captions, instances), strict=True):
        largest = sorted(full.boxes, key=lambda box: (box.x1 - box.x2) * (box.y2 - box.y1))[:3]
        assert context.boxes == tuple(box for box in full.boxes if box in largest)


def test_images_that_are_skipped_are_counted(tmp_path):
    captions, instances = coco(6)
    first, second, third = (image["id"] for image in captions["images"][:3])
    captions["annotations"] = [item for item in captions["annotations"] if item["image_id"] != first]
    instances["images"] = [image for image in instances["images"] if image["id"] != second]
    instances["annotations"] = [thing for thing in instances["annotations"] if thing["image_id"] not in (second, third)]
    boxes = sum(thing["image_id"] == first for thing in instances["annotations"])
    contexts = contexts_of(tmp_path, captions, instances)
    assert [int(context.id) for context in contexts] == sorted(
        image["id"] for image in captions["images"] if image["id"] not in (first, second))
    assert contexts.notes == {"images without captions skipped": 1, "images without boxes": 1,
                              "images skipped that the instances file does not have": 1,
                              "boxes dropped: of images that were skipped": boxes}
    assert contexts_of(tmp_path, captions, instances, min_boxes=1).notes["images with fewer than 1 boxes skipped"] == 1


def test_files_of_different_splits_are_told_apart(tmp_path):
    """Their ids may be the same, as those of COCO are in 2014 and 2017, or begin at 1 in each."""
    captions, instances = coco(6)
    numbers = sorted(image["id"] for image in captions["images"])
    same = [image | {"file_name": f"{image['id']:012d}.jpg"} for image in instances["images"]]
    assert list(contexts_of(tmp_path, captions, instances | {"images": same})) == brute(captions, instances)

    def cut(content: dict, key: str, number: str, kept: list[int]) -> dict:
        return content | {key: [item for item in content[key] if item[number] in kept]}

    some = cut(cut(captions, "images", "id", numbers[:1]), "annotations", "image_id", numbers[:1])
    assert len(contexts_of(tmp_path, some, instances)) == 1  # captions of a few images are no mistake
    for wrong, message in [
        ((captions, instances | {"images": [image | {"file_name": "train/1.jpg"} for image in instances["images"]]}),
         rf"instances.json: image id {numbers[0]} is train/1.jpg, but COCO_.*captions.json; take both files of the sa"),
        ((captions, cut(cut(instances, "images", "id", numbers[:2]), "annotations", "image_id", numbers[:2])),
         "instances.json: has 2 of the 6 images of .*captions.json; take both files of the same split"),
        ((cut(captions, "annotations", "image_id", numbers[:2]), instances),
         "captions.json: of its 6 images 4 have no caption; take the whole file"),
        ((captions | {"images": captions["images"] + [captions["images"][0] | {"file_name": "2.jpg"}]}, instances),
         "captions.json: of its images, id .* stands for two images, COCO_.*.jpg and 2.jpg"),
    ]:
        with pytest.raises(UserError, match=message):
            contexts_of(tmp_path, *wrong)


def test_several_images_of_one_file_are_counted(tmp_path):
    captions, instances = ({**content, "images": [image | {"file_name": "a.jpg"} for image in content["images"]]}
                           for content in coco(3))
    assert contexts_of(tmp_path, captions, instances).notes == {"images whose file another image has too": 2}


def test_captions_are_one_line_each_and_once(tmp_path):
    captions = ("A  street.\n", "", "A street.", "A\tcar.", " \n")
    contexts = contexts_of(tmp_path, *one_image((1, 10, 10, 20, 20), captions=captions))
    assert contexts[0].captions == ("A street.", "A car.")
    assert contexts.notes == {"captions dropped: empty": 2, "captions dropped: given twice": 1}


def change(content: dict, key: str, index: int, **values) -> dict:
    items = [dict(item) for item in content[key]]
    items[index] |= values
    return content | {key: items}


@pytest.mark.parametrize(
    "case, message",
    [
        (lambda c, i: (i, i), "captions.json: of its annotations, id 0 has a box and no caption; is this the inst"),
        (lambda c, i: (c, c), "instances.json: of its annotations, id 0 has a caption and no box; is this the capt"),
        (lambda c, i: (c | {"annotations": []}, i), "captions.json: not COCO's, or cut: it has no annotations"),
        (lambda c, i: ({"a": 1}, i), "captions.json: not COCO's, or cut: it has no images and no annotations"),
        (lambda c, i: (c, i | {"categories": []}), "instances.json: not COCO's, or cut: it has no categories"),
        (lambda c, i: (change(c, "annotations", 0, image_id=7), i),
         "captions.json: 1 images have captions but are not among the file's images, such as image id 7; take"),
        (lambda c, i: (c, change(i, "annotations", 0, image_id=7)),
         "instances.json: 1 images have boxes but are not among the file's images, such as image id 7; take"),
        (lambda c, i: (c, change(change(i, "annotations", 0, image_id=7), "images", 0, id=7)),
         "instances.json: has 0 of the 1 images of .*captions.json; take both files of the same split"),
        (lambda c, i: (c, change(i, "annotations", 0, category_id=2)),
         "instances.json: category id 2 of a box in image id 5 is not among its 3 categories"),
        (lambda c, i: (c, change(i, "annotations", 0, bbox=[1, 2, 3])), r"id 0 has as bbox \[1, 2, 3\]; .* four num"),
        (lambda c, i: (c, change(i, "annotations", 0, bbox=[1, 2, 3, float("nan")])), "must be four numbers"),
        (lambda c, i: (c, change(i, "annotations", 0, bbox=[1, 2, 3, 10**400])), "must be four numbers"),
        (lambda c, i: (c, change(i, "images", 0, width=0)), "id 5 has as width and height 0 and 100"),
        (lambda c, i: (c, change(i, "images", 0, id="5")), "has as id '5'; it must be a whole number"),
        (lambda c, i: (c, change(i, "categories", 0, name="")), "has as name ''; it must be text"),
        (lambda c, i: (change(c, "annotations", 0, caption=None), i), "has as caption None; it must be text"),
        (lambda c, i: (change(c, "annotations", 0, caption="\ud800"), i), "caption has half of a UTF-16 pair"),
        (lambda c, i: (change(c, "annotations", 0, caption=" "), i), "no image has a caption"),
        (lambda c, i: (change(c, "images", 0, file_name=3), i), "has as file_name 3; it must be text"),
        (lambda c, i: (c | {"annotations": ["text"]}, i), "an item of its annotations is no object"),
    ],
)
def test_files_that_are_wrong_give_one_line(tmp_path, case, message):
    files = one_image((1, 10, 10, 20, 20))
    with pytest.raises(UserError, match=message) as error:
        contexts_of(tmp_path, *case(*files))
    assert "\n" not in str(error.value)


def test_missing_files_and_sources(tmp_path):
    with pytest.raises(UserError, match="none.json: no such file"):
        open_contexts(AnnotationSource(captions=f"{tmp_path}/none.json"))
    for path, what in (("none.jsonl", "file"), ("none", "folder")):
        with pytest.raises(UserError, match=f"{path}: no such {what}"):
            open_contexts(AnnotationSource(data=f"{tmp_path}/{path}"))
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match="empty.json: the file is empty"):
        open_contexts(AnnotationSource(captions=f"{tmp_path}/empty.json"))
    for options, message in [
        ({}, "name either COCO files"), ({"captions": "a", "data": "b"}, "name either"),
        ({"instances": "a"}, "boxes without captions"), ({"data": "a", "max_boxes": 0}, "max_boxes is 0"),
        ({"data": "a", "min_box_area": 1.0}, "fraction"), ({"data": "a", "min_boxes": -1}, "min_boxes is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            AnnotationSource(**options)


def jsonl(tmp_path, *rows) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines(tmp_path):
    boxes = [{"category": "dog", "bbox": [50, 10, 100, 20]},
             {"category": "cat", "box": [0.5, 0, 1, 0.25], "iscrowd": 1}]
    path = jsonl(
        tmp_path,
        {"image": "b/x.png", "captions": ["A dog.", "Dogs."], "boxes": boxes, "width": 200, "height": 100},
        {"image": "ten.png", "caption": "One.", "id": 10, "extra": None},
        {"image": "two.png", "caption": "One.", "id": "2", "boxes": []},
        {"image": "two.png", "caption": "Other.", "id": 2},
        {"image": "none.png", "captions": []},
    )
    contexts = open_contexts(AnnotationSource(data=path))
    assert list(contexts) == [
        Context("2", "two.png", ("One.",)),
        Context("10", "ten.png", ("One.",)),
        Context("b/x", "b/x.png", ("A dog.", "Dogs."),
                (Box("dog", 0.25, 0.1, 0.75, 0.3), Box("cat", 0.5, 0, 1, 0.25, crowd=True))),
    ]
    assert contexts.notes == {"images given twice, of which the first is kept": 1, "images without captions skipped": 1,
                              "images without boxes": 2}
    assert contexts.where(0) == f"{path}, row 3 (line 3)" and contexts.files == (path,) and contexts.has_boxes


def test_an_id_of_two_images_is_refused(tmp_path):
    path = jsonl(tmp_path, {"image": "1.png", "caption": "A dog."}, {"image": "1.jpg", "caption": "A cat."})
    with pytest.raises(UserError, match=r"row 2 \(line 2\): has the id '1' of 1.png; give every image an id of its"):
        open_contexts(AnnotationSource(data=path))


@pytest.mark.parametrize(
    "row, message",
    [
        ([1], "a row must be an object"),
        ({"captions": ["a"]}, "has as image None"),
        ({"image": "a"}, "needs captions, a list of texts, or caption, one text"),
        ({"image": "a", "caption": "a", "captions": ["a"]}, "needs captions"),
        ({"image": "a", "captions": "a"}, "captions that are no list"),
        ({"image": "a", "captions": [1]}, "has as caption 1; it must be text"),
        ({"image": "a", "caption": "a", "id": True}, "has as id True"),
        ({"image": "a", "caption": "a", "boxes": {}}, "boxes that are no list"),
        ({"image": "a", "caption": "a", "boxes": [[1, 2, 3, 4]]}, "boxes that are no list of objects"),
        ({"image": "a", "caption": "a", "boxes": [{"category": "x"}]}, "needs either bbox, .* or box"),
        ({"image": "a", "caption": "a", "boxes": [{"box": [0, 0, 1, 1]}]}, "has as category None"),
        ({"image": "a", "caption": "a", "boxes": [{"category": "x", "box": [10, 20, 50, 70]}]},
         r"box \[10, 20, 50, 70\], which are no fractions of the image; pixels are given as bbox"),
        ({"image": "a", "caption": "a", "boxes": [{"category": "x", "bbox": [1, 2, 3, 4]}]}, "has as width and height"),
        ({"image": "a", "caption": "a", "width": 640, "height": 480,
          "boxes": [{"category": "x", "bbox": [0.1, 0.2, 0.5, 0.5]}]}, "are no pixels; fractions are given as box"),
    ],
)
def test_json_rows_that_are_wrong(tmp_path, row, message):
    path = jsonl(tmp_path, {"image": "good", "caption": "a"}, row)
    with pytest.raises(UserError, match=re.escape(f"{path}, row 2 (line 2): ") + ".*" + message) as error:
        open_contexts(AnnotationSource(data=path))
    assert "\n" not in str(error.value)


class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    """The features of coco_captions."""

    VERSION = tfds.core.Version("1.1.0")
    code_path = None

    def _info(self):
        of = tfds.features
        features = {
            "image": of.Image(encoding_format="jpeg"),
            "image/filename": of.Text(),
            "image/id": np.int64,
            "objects": of.Sequence({"id": np.int64, "area": np.int64, "bbox": of.BBoxFeature(),
                                    "label": of.ClassLabel(names=["person", "traffic light"]), "is_crowd": np.bool_}),
            "captions": of.Sequence({"id": np.int64, "text": np.str_}),
        }
        return tfds.core.DatasetInfo(builder=self, features=of.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(range(9, 3, -1)), "val": self._generate_examples(range(2))}

    def _generate_examples(self, numbers):
        for number in numbers:
            things = [{"id": i, "area": 5, "bbox": tfds.features.BBox(0.125 * i, 0.0, 0.125 * i + 0.25, 0.5),
                       "label": i % 2, "is_crowd": i == 2} for i in range(number % 4)]
            yield number, {"image": io.BytesIO(b"a photo"), "image/id": number, "objects": things,
                           "image/filename": f"COCO_val2014_{number:012d}.jpg",
                           "captions": [{"id": i, "text": f"Caption {i}. "} for i in range(number % 3)]}


def test_a_tfds_data_set(tmp_path):
    CocoCaptions(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    contexts = open_contexts(AnnotationSource(data=str(tmp_path / "coco_captions")))
    names = ["person", "traffic light", "person"]
    assert list(contexts) == [
        Context(f"{number:012d}", f"{number:012d}.jpg", tuple(f"Caption {i}." for i in range(number % 3)),
                tuple(Box(names[i], 0, 0.125 * i, 0.5, 0.125 * i + 0.25, i == 2) for i in range(number % 4)))
        for number in (4, 5, 7, 8)
    ]
    assert contexts.notes == {"images without captions skipped": 2, "images without boxes": 2}
    assert contexts.where(0).startswith(f"{tmp_path}/coco_captions/1.1.0, split train, row ")
    validation = open_contexts(AnnotationSource(data=f"{tmp_path}/coco_captions:val"))
    assert [context.id for context in validation] == ["000000000001"]


MEASURE = """
import re, sys, time
from llava_jax.annotations.context import AnnotationSource, open_contexts

def peak():  # not ru_maxrss, in which a process begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before, start = peak(), time.perf_counter()
contexts = open_contexts(AnnotationSource(captions=sys.argv[1], instances=sys.argv[2]))
boxes = sum(len(context.boxes) for context in contexts)
assert "jax" not in sys.modules
print(len(contexts), boxes, (peak() - before) // 1024, round(time.perf_counter() - start, 1))
"""


def big_files(folder, images: int, bytes_of_a_box: int) -> list[str]:
    """Files of COCO's structure with 7 boxes an image, most of whose bytes are polygons."""
    rng = random.Random(0)
    listed = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 640, "height": 480, "coco_url": "http://" + 40 * "x"}
              for n in range(images)]
    polygon = [round(rng.uniform(0, 640), 2) for _ in range(bytes_of_a_box // 8)]
    captions, instances = folder / "captions.json", folder / "instances.json"
    with open(captions, "w") as file:
        texts = ({"image_id": n, "id": n * 5 + k, "caption": f"A person with {k} dogs in front of house {n}."}
                 for n in range(images) for k in range(5))
        file.write('{"images": ' + json.dumps(listed) + ', "annotations": [' + ",".join(map(json.dumps, texts)) + "]}")
    with open(instances, "w") as file:
        file.write('{"annotations": [')
        shape = json.dumps([polygon])
        for n in range(7 * images):
            box = json.dumps([rng.randrange(300), rng.randrange(300), 20 + n % 99, 30])
            file.write(f'{"," if n else ""}{{"segmentation": {shape}, "bbox": {box}, "iscrowd": 0, "id": {n},'
                       f' "image_id": {n % images}, "category_id": {(1, 10, 18)[n % 3]}}}')
        file.write('], "images": ' + json.dumps(listed) + ', "categories": ' + json.dumps(CATEGORIES) + "}")
    return [str(captions), str(instances)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "images, bytes_of_a_box, limit", [(1000, 3000, 60), pytest.param(60_000, 480, 250, marks=pytest.mark.slow)])
def test_big_files_need_little_memory(tmp_path, images, bytes_of_a_box, limit):
    """21 MB in the small case, 200 MB in the slow one. `limit`: MB beyond the imports."""
    files = big_files(tmp_path, images, bytes_of_a_box)
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], check=True, capture_output=True, text=True)
    found, boxes, memory, seconds = done.stdout.split()
    print(f"{found} images, {boxes} boxes: {memory} MB, {seconds} s")
    assert (int(found), int(boxes)) == (images, 7 * images) and int(memory) < limit
