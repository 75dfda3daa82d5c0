"""Draws scenes: pictures of coloured shapes, written to disk as a data set in COCO's format.

A picture has 60 x 60 pixels and one to four objects, each within its own cell of a 3 x 3 grid. Objects are small or
large, of eight colours and five shapes, over a plain, shaded or patterned background, anti-aliased and with noise.
The files are COCO's (images, five captions and the boxes of each), so other code reads them as it reads COCO. Four of
the forty colour-shape pairs are absent from the splits `train` and `test`. Every picture of the split `unseen` shows
at least one of them.

Pictures may be larger. Large objects grow with the picture and small ones keep their pixels, so a picture shrunk to 60
pixels hardly shows the shape of a small object. A larger picture may have a sign with small shapes, to be read.
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
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
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
"""Cells of the 3 x 3 grid that are in a line."""
LINE_SHARE = 0.5
"""Fraction of the pictures with three objects or more in which three are put in a line, so that one is between two."""
UNSEEN = (("red", "triangle"), ("green", "ring"), ("blue", "circle"), ("pink", "cross"))
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
NUMBERS = ("zero", "one", "two", "three", "four")

_BACKGROUNDS = ((235, 235, 230), (200, 205, 215), (225, 215, 190), (120, 120, 120), (70, 75, 85), (35, 35, 45),
                (95, 80, 70))
RADII = {"small": (6.0, 7.0), "large": (8.6, 9.6)}
GLYPH_RADIUS = 4.5
_FRAME, _PLATE = (250, 250, 250), (30, 30, 40)
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
        """Returns the box in fractions of a picture of 60 x 60, as it is read from COCO's files."""
        x, y, width, height = self.box
        return Box(f"{self.colour} {self.shape}", x / SIZE, y / SIZE, (x + width) / SIZE, (y + height) / SIZE)


@dataclass(frozen=True)
class Sign:
    """A dark plate with shapes of one colour, which spell `words`. No object is in the plate's row of the 3 x 3 grid.

    The centre x, y is in pixels.
    """

    words: tuple[str, ...]
    colour: str
    row: int
    x: float
    y: float

    @property
    def category(self) -> str:
        """Name of the sign's box, which `read_sign` reads."""
        return " ".join(("sign", self.colour, *self.words))

    @property
    def box(self) -> list[float]:
        """COCO's [x, y, width, height] of the plate in pixels."""
        width, height = CELL * len(self.words) - 2, CELL - 2
        return [round(value, 1) for value in (self.x - width / 2, self.y - height / 2, width, height)]


def read_sign(category: str) -> tuple[str, str] | None:
    """Returns colour and text of a sign's category ("sign red cross ring"), or None for another category."""
    first, *words = category.split(" ")
    is_sign = first == "sign" and len(words) > 1 and words[0] in COLOURS and set(words[1:]) <= set(SHAPES)
    return (words[0], " ".join(words[1:])) if is_sign else None


def sample_sign(rng: random.Random, width: int, height: int, length: int = 1) -> Sign:
    """Draws a sign of `length` shapes for a picture of this size."""
    row = rng.randrange(3)
    words = tuple(rng.choices(SHAPES, k=length))
    column = rng.randrange(width // CELL - length + 1)
    line = rng.randrange(row * height // 3, (row + 1) * height // 3, CELL)
    return Sign(words, rng.choice(tuple(COLOURS)), row, CELL * (column + length / 2), line + CELL / 2)


def sample(rng: random.Random, pairs: tuple = SEEN, required: tuple = (), most: int = 4,
           picture: tuple[int, int] = (SIZE, SIZE), sign: Sign | None = None) -> tuple[Object, ...]:
    """Draws the objects of a picture of this (width, height), in reading order.

    At least one object is of a pair in `required`, if given. The objects have another row and colour than the sign.
    """
    if sign:
        pairs, required = (tuple(pair for pair in some if pair[0] != sign.colour) for some in (pairs, required))
    count = rng.randint(1, most)
    cells = [cell for cell in range(9) if not sign or cell // 3 != sign.row]
    growth = min(picture) / SIZE
    chosen = rng.sample(cells, count)
    if count > 2 and rng.random() < LINE_SHARE:
        line = rng.choice([line for line in LINES if set(line) <= set(cells)])
        chosen = [*line, *rng.sample([cell for cell in cells if cell not in line], count - 3)]
    objects = []
    for index, cell in enumerate(chosen):
        colour, shape = rng.choice(required if required and (index == 0 or rng.random() < 0.3) else pairs)
        if index and not required and rng.random() < 0.4:  # repeat a colour or a shape, so that counting is not trivial
            other = rng.choice(objects)
            twin = (other.colour, shape) if rng.random() < 0.5 else (colour, other.shape)
            colour, shape = twin if twin in pairs else (colour, shape)
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADII[size]) * (growth if size == "large" else 1)
        x, y = (_coordinate(rng, i, side, radius) for i, side in zip((cell % 3, cell // 3), picture, strict=True))
        objects.append(Object(colour, shape, size, cell, x, y, radius))
    return tuple(sorted(objects, key=lambda thing: thing.cell))


def _coordinate(rng: random.Random, third: int, side: int, radius: float) -> float:
    """Draws the centre of an object in a third of a side.

    A small object keeps to a span of CELL pixels, so that no edge of a tile of 60 pixels cuts it.
    """
    start, span = side / 3 * third, side / 3
    if radius <= CELL / 2 < span / 2:
        start, span = start + rng.randrange(round(span / CELL)) * CELL, CELL
    slack, middle = span / 2 - radius, side / 6 * (2 * third + 1)
    clear = 0.095 * side  # further from the middle of the third, `Scene` is not sure of the position
    return min(max(start + span / 2 + rng.uniform(-slack, slack), middle - clear), middle + clear)


def render(objects: tuple[Object, ...], rng: random.Random, noise: np.random.Generator,
           picture: tuple[int, int] = (SIZE, SIZE), sign: Sign | None = None, enlarge: int = 1) -> Image.Image:
    """Draws the picture of a scene: RGB, of this (width, height) times `enlarge`."""
    scale = _SUPERSAMPLING * enlarge
    canvas = Image.new("RGB", (picture[0] * scale, picture[1] * scale))
    draw = ImageDraw.Draw(canvas)
    _background(draw, rng, *canvas.size, enlarge)
    if sign:
        x, y, width, height = (value * scale for value in sign.box)
        draw.rectangle((x, y, x + width, y + height), fill=_PLATE, outline=_FRAME, width=2 * scale)
        for number, word in enumerate(sign.words):
            across = sign.x + (number - (len(sign.words) - 1) / 2) * CELL
            _shape(draw, word, across * scale, sign.y * scale, GLYPH_RADIUS * scale, COLOURS[sign.colour])
    for thing in objects:
        fill = tuple(channel + rng.randint(-18, 18) for channel in COLOURS[thing.colour])
        _shape(draw, thing.shape, thing.x * scale, thing.y * scale, thing.radius * scale, fill)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)
    pixels = pixels * rng.uniform(0.88, 1.1) + noise.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 8)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _background(draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int, enlarge: int) -> None:
    base = rng.choice(_BACKGROUNDS)
    other = tuple(max(0, min(255, channel + rng.choice((-1, 1)) * rng.randint(8, 24))) for channel in base)
    draw.rectangle((0, 0, width, height), fill=base)
    kind = rng.choice(("plain", "shaded", "striped", "chequered"))
    step = rng.choice((12, 18, 30)) * enlarge
    if kind == "shaded":
        for y in range(0, height, 6):
            mix = y / height
            fill = tuple(int(a + (b - a) * mix) for a, b in zip(base, other, strict=True))
            draw.rectangle((0, y, width, y + 6), fill=fill)
    elif kind == "striped":
        for x in range(0, width, 2 * step):
            draw.rectangle((x, 0, x + step - 1, height), fill=other)
    elif kind == "chequered":
        for y in range(0, height, step):
            for x in range(y // step % 2 * step, width, 2 * step):
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
    located = _join(f"{with_article(name)} at the {position}" for position, name in zip(positions, short, strict=True))
    return [
        ", ".join(f"{position} {name}" for position, name in zip(positions, full, strict=True)),
        _sentence(f"a {name} at the {position}" for position, name in zip(positions, full, strict=True)),
        _sentence(f"at the {position} {with_article(name)}" for position, name in zip(positions, short, strict=True)),
        f"{NUMBERS[len(objects)].capitalize()} {noun}: {_join(f'a {name}' for name in full)}.",
        f"A picture of {located}.",
    ]


def with_article(name: str) -> str:
    """Returns the name after its indefinite article, "an orange ring"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _join(parts) -> str:
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def _sentence(parts) -> str:
    text = _join(parts)
    return text[0].upper() + text[1:] + "."


def write(out_dir: str | Path, *, train: int, test: int, unseen: int = 0, probe: int = 0, seed: int = 0,
          pictures: Sequence[tuple[int, int]] = ((SIZE, SIZE),), signs: float = 0.0) -> Path:
    """Writes the splits `train`, `test`, `unseen` and `probe` in COCO's layout, and returns `out_dir`.

    The first arguments are numbers of pictures; a split of 0 pictures is not written. Each picture has a size (width,
    height) of `pictures`, and a fraction `signs` of them has a sign. The same arguments give the same bytes.
    Files are `out_dir/SPLIT/000000000001.jpg` ..., `out_dir/annotations/captions_SPLIT.json` and
    `instances_SPLIT.json`. The `categories` of a split are the colour-shape pairs that its pictures may show, and the
    signs as "sign red cross".
    """
    out_dir = Path(out_dir)
    (out_dir / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test), ("unseen", unseen), ("probe", probe)):
        if count:
            _write_split(out_dir, split, itertools.islice(draw_split(split, seed, pictures, signs), count))
    return out_dir


def draw_split(split: str, seed: int = 0, pictures: Sequence[tuple[int, int]] = ((SIZE, SIZE),), signs: float = 0.0,
               enlarge: int = 1) -> Iterator[tuple[tuple[Object, ...], Sign | None, Image.Image]]:
    """Yields objects, sign and picture of the scenes of a split, without end, in the order in which `write` has them.

    With `enlarge`, the same scenes have pictures that many times as large, for people to look at.
    """
    rng = random.Random(f"{seed} {split}")
    noise = np.random.default_rng(rng.getrandbits(64))
    required = UNSEEN if split == "unseen" else ()
    while True:
        size = rng.choice(pictures) if len(pictures) > 1 else pictures[0]
        sign = sample_sign(rng, *size) if signs and rng.random() < signs else None
        objects = sample(rng, SEEN, required, picture=size, sign=sign)
        yield objects, sign, render(objects, rng, noise, size, sign, enlarge)


def _write_split(out_dir: Path, split: str, scenes: Iterable[tuple[tuple[Object, ...], Sign | None, Image.Image]]
                 ) -> None:
    (out_dir / split).mkdir(exist_ok=True)
    ids = {" ".join(pair): PAIRS.index(pair) + 1 for pair in (*SEEN, *(UNSEEN if split == "unseen" else ()))}
    images, texts, boxes = [], [], []
    for image_id, (objects, sign, picture) in enumerate(scenes, 1):
        name = f"{image_id:012d}.jpg"
        picture.save(out_dir / split / name, quality=92, subsampling=0)
        images.append({"id": image_id, "file_name": name, "width": picture.width, "height": picture.height})
        for caption in captions(objects):
            texts.append({"id": len(texts) + 1, "image_id": image_id, "caption": caption})
        named = [(f"{thing.colour} {thing.shape}", thing.box) for thing in objects]
        for category, box in [*named, (sign.category, sign.box)] if sign else named:
            boxes.append({"id": len(boxes) + 1, "image_id": image_id,
                          "category_id": ids.setdefault(category, len(PAIRS) + len(ids)),
                          "bbox": box, "area": round(box[2] * box[3], 1), "iscrowd": 0})
    categories = [{"id": number, "name": name, "supercategory": "sign" if read_sign(name) else name.split(" ")[1]}
                  for name, number in ids.items()]
    folder = out_dir / "annotations"
    (folder / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": texts}))
    instances = {"images": images, "annotations": boxes, "categories": categories}
    (folder / f"instances_{split}.json").write_text(json.dumps(instances))
