"""Draws scenes: pictures of coloured shapes, written to disk as a data set in COCO's format.

A picture has 60 x 60 pixels and one to four objects, each within its own cell of a 3 x 3 grid. Objects are small or
large, of eight colours and five shapes, over a plain, shaded or patterned background, anti-aliased and with noise.
The files are COCO's (images, five captions and the boxes of each), so other code reads them as it reads COCO. Four of
the forty colour-shape pairs are absent from the splits `train` and `test`. Every picture of the split `unseen` shows
at least one of them.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_jax.annotations.boxes import Box

SIZE = 60
CELL = SIZE // 3
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 50),
    "green": (45, 160, 60),
    "cyan": (40, 205, 215),
    "blue": (40, 75, 215),
    "purple": (130, 45, 165),
    "pink": (250, 140, 200),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
POSITIONS = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
UNSEEN = (("red", "triangle"), ("green", "ring"), ("blue", "circle"), ("pink", "cross"))
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
NUMBERS = ("zero", "one", "two", "three", "four")

_BACKGROUNDS = ((235, 235, 230), (200, 205, 215), (225, 215, 190), (120, 120, 120), (70, 75, 85), (35, 35, 45),
                (95, 80, 70))
RADII = {"small": (6.0, 7.0), "large": (8.6, 9.6)}
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Object:
    """A coloured shape. `cell` is 0..8 in reading order; centre and radius are in pixels."""

    colour: str
    shape: str
    size: str
    cell: int
    x: float
    y: float
    radius: float

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def box(self) -> list[float]:
        """COCO's [x, y, width, height] in pixels."""
        return [round(value, 1) for value in
                (self.x - self.radius, self.y - self.radius, 2 * self.radius, 2 * self.radius)]

    def to_box(self) -> Box:
        """Returns the box in fractions of the picture, as it is read from COCO's files."""
        x, y, width, height = self.box
        return Box(f"{self.colour} {self.shape}", x / SIZE, y / SIZE, (x + width) / SIZE, (y + height) / SIZE)


def sample(rng: random.Random, pairs: tuple = SEEN, required: tuple = (), most: int = 4) -> tuple[Object, ...]:
    """Draws the objects of one scene, in reading order. At least one object is of a pair in `required`, if given."""
    count = rng.randint(1, most)
    objects = []
    for index, cell in enumerate(rng.sample(range(9), count)):
        colour, shape = rng.choice(required if required and (index == 0 or rng.random() < 0.3) else pairs)
        if index and not required and rng.random() < 0.4:  # repeat a colour or a shape, so that counting is not trivial
            other = rng.choice(objects)
            twin = (other.colour, shape) if rng.random() < 0.5 else (colour, other.shape)
            colour, shape = twin if twin in pairs else (colour, shape)
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADII[size])
        slack = CELL / 2 - radius
        row, column = divmod(cell, 3)
        x, y = (CELL * i + CELL / 2 + rng.uniform(-slack, slack) for i in (column, row))
        objects.append(Object(colour, shape, size, cell, x, y, radius))
    return tuple(sorted(objects, key=lambda thing: thing.cell))


def render(objects: tuple[Object, ...], rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """Draws the picture of a scene: RGB, 60 x 60."""
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(canvas)
    _background(draw, rng, SIZE * scale)
    for thing in objects:
        fill = tuple(channel + rng.randint(-18, 18) for channel in COLOURS[thing.colour])
        _shape(draw, thing.shape, thing.x * scale, thing.y * scale, thing.radius * scale, fill)
    pixels = np.asarray(canvas.reduce(scale), np.float32)
    pixels = pixels * rng.uniform(0.88, 1.1) + noise.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 8)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _background(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    base = rng.choice(_BACKGROUNDS)
    other = tuple(max(0, min(255, channel + rng.choice((-1, 1)) * rng.randint(8, 24))) for channel in base)
    draw.rectangle((0, 0, side, side), fill=base)
    kind = rng.choice(("plain", "shaded", "striped", "chequered"))
    step = rng.choice((12, 18, 30))
    if kind == "shaded":
        for y in range(0, side, 6):
            mix = y / side
            fill = tuple(int(a + (b - a) * mix) for a, b in zip(base, other, strict=True))
            draw.rectangle((0, y, side, y + 6), fill=fill)
    elif kind == "striped":
        for x in range(0, side, 2 * step):
            draw.rectangle((x, 0, x + step - 1, side), fill=other)
    elif kind == "chequered":
        for y in range(0, side, step):
            for x in range(y // step % 2 * step, side, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=other)


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.42 * r))
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)), fill=fill)
    else:
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def captions(objects: tuple[Object, ...]) -> list[str]:
    """Returns five captions of a scene, with its objects in reading order."""
    full = [f"{thing.size} {thing.colour} {thing.shape}" for thing in objects]
    short = [f"{thing.colour} {thing.shape}" for thing in objects]
    positions = [thing.position for thing in objects]
    noun = "object" if len(objects) == 1 else "objects"
    located = _join(f"a {name} at the {position}" for position, name in zip(positions, short, strict=True))
    return [
        ", ".join(f"{position} {name}" for position, name in zip(positions, full, strict=True)),
        _sentence(f"a {name} at the {position}" for position, name in zip(positions, full, strict=True)),
        _sentence(f"at the {position} a {name}" for position, name in zip(positions, short, strict=True)),
        f"{NUMBERS[len(objects)].capitalize()} {noun}: {_join(f'a {name}' for name in full)}.",
        f"A picture of {located}.",
    ]


def _join(parts) -> str:
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def _sentence(parts) -> str:
    text = _join(parts)
    return text[0].upper() + text[1:] + "."


def write(out_dir: str | Path, *, train: int, test: int, unseen: int = 0, probe: int = 0, seed: int = 0) -> Path:
    """Writes the splits `train`, `test`, `unseen` and `probe` in COCO's layout, and returns `out_dir`.

    The arguments are numbers of pictures; a split of 0 pictures is not written. The same seed gives the same bytes.
    Files are `out_dir/SPLIT/000000000001.jpg` ..., `out_dir/annotations/captions_SPLIT.json` and
    `instances_SPLIT.json`. The `categories` of a split are the colour-shape pairs that its pictures may show.
    """
    out_dir = Path(out_dir)
    (out_dir / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count, pairs, required in (
        ("train", train, SEEN, ()),
        ("test", test, SEEN, ()),
        ("unseen", unseen, SEEN, UNSEEN),
        ("probe", probe, SEEN, ()),
    ):
        if count:
            _write_split(out_dir, split, count, pairs, required, seed)
    return out_dir


def _write_split(out_dir: Path, split: str, count: int, pairs: tuple, required: tuple, seed: int) -> None:
    rng = random.Random(f"{seed} {split}")
    noise = np.random.default_rng(rng.getrandbits(64))
    (out_dir / split).mkdir(exist_ok=True)
    ids = {pair: PAIRS.index(pair) + 1 for pair in (*pairs, *required)}
    images, texts, boxes = [], [], []
    for image_id in range(1, count + 1):
        objects = sample(rng, pairs, required)
        name = f"{image_id:012d}.jpg"
        render(objects, rng, noise).save(out_dir / split / name, quality=92, subsampling=0)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for caption in captions(objects):
            texts.append({"id": len(texts) + 1, "image_id": image_id, "caption": caption})
        for thing in objects:
            boxes.append({"id": len(boxes) + 1, "image_id": image_id, "category_id": ids[thing.colour, thing.shape],
                          "bbox": thing.box, "area": round(thing.box[2] * thing.box[3], 1), "iscrowd": 0})
    categories = [{"id": number, "name": f"{colour} {shape}", "supercategory": shape}
                  for (colour, shape), number in ids.items()]
    folder = out_dir / "annotations"
    (folder / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": texts}))
    instances = {"images": images, "annotations": boxes, "categories": categories}
    (folder / f"instances_{split}.json").write_text(json.dumps(instances))
