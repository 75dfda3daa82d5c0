"""Measures `prepare pack`: size, speed of packing and reading, and the change of the tiles by re-encoding.

Draws pictures of 640 x 480 and 640 x 427 pixels (noise of all scales with hard edges, JPEG of quality 90), or uses
the pictures of `--images FOLDER`. Reading is measured in one process.

    python scripts/bench_pack.py
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_jax.data.sources import open_source
from llava_jax.image_files import open_image
from llava_jax.images import ImageProcessor
from llava_jax.prepare.pack import Pack

SIZE = 336
PROCESSOR = ImageProcessor(SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of pictures")
    parser.add_argument("--images", default="", help="folder of pictures, instead of drawn ones")
    parser.add_argument("--workers", type=int, default=1, help="processes that pack")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), args.count, args.images)
        before = open_source(data, "/")
        print(f"{len(before):,} rows of one image each, {mean(before, lambda c: len(c) / 1e3):.1f} kB an image")
        base = per_row(before, lambda content: PROCESSOR(open_image(content)))
        print(f"files: read, decoded and prepared in {base * 1e3:.2f} ms an image\n")
        print("| pack | time | set | read a row at random | read, decode, prepare | tile: mean, max difference |")
        print("|---|---|---|---|---|---|")
        for name, options in {
            "as in the files": {},
            f"pad {SIZE}, jpeg 95": {"image_size": SIZE},
            f"pad {SIZE}, jpeg 90": {"image_size": SIZE, "quality": 90},
            f"pad {SIZE}, png": {"image_size": SIZE, "image_format": "png"},
        }.items():
            out = os.path.join(folder, "out")
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                Pack(data=data, out=out, image_root="/", workers=args.workers, shard_size="16MB", **options).run()
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in Path(out).iterdir())
            after = pickle.loads(pickle.dumps(open_source(out)))
            row, seen = per_row(after, None), per_row(after, lambda content: PROCESSOR(open_image(content)))
            average, largest = differences(before, after)
            print(
                f"| {name} | {seconds:.1f} s | {size / 1e6:.1f} MB | {row * 1e6:.0f} us | {seen * 1e3:.2f} ms | "
                f"{average:.2f}, {largest} |",
                flush=True,
            )
            shutil.rmtree(out)


def write_data(folder: Path, count: int, images: str) -> str:
    paths = sorted(path for path in Path(images).rglob("*") if path.is_file())[:count] if images else []
    for number in range(0 if images else count):
        paths.append(folder / f"{number}.jpg")
        draw_picture(number).save(paths[-1], quality=90)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A picture. " * 40}]
    rows = [{"id": i, "image": str(path.absolute()), "conversations": turns} for i, path in enumerate(paths)]
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


def draw_picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    size = (640, 480) if seed % 2 else (640, 427)
    pixels = np.zeros((size[1], size[0], 3))
    for scale in 2 ** np.arange(1, 9):
        noise = rng.normal(size=(size[1] * scale // 256 + 2, size[0] * scale // 256 + 2, 3))
        noise[..., 1:] = 0.7 * noise[..., :1] + 0.3 * noise[..., 1:]
        planes = [Image.fromarray(plane).resize(size) for plane in np.moveaxis(noise, -1, 0).astype(np.float32)]
        pixels += np.stack([np.asarray(plane) for plane in planes], -1) / scale**0.7
    picture = Image.fromarray(np.uint8(np.clip(pixels / pixels.std() * 45 + 118, 0, 255)))
    pen, draw = ImageDraw.Draw(picture), random.Random(seed)
    for _ in range(12):
        x, y, radius = draw.randrange(size[0]), draw.randrange(size[1]), draw.randrange(5, 80)
        colour = tuple(draw.randrange(256) for _ in range(3))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture


def content_of(source, index: int) -> bytes:
    (image,) = source[index].images
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def mean(source, measure) -> float:
    return sum(measure(content_of(source, i)) for i in range(len(source))) / len(source)


def per_row(source, work) -> float:
    """Returns the seconds to read a row in random order, and to do `work` with its image."""
    order = random.Random(0).sample(range(len(source)), min(len(source), 300))
    content_of(source, 0)
    start = time.perf_counter()
    for index in order:
        content = content_of(source, index)
        if work is not None:
            work(content)
    return (time.perf_counter() - start) / len(order)


def differences(before, after) -> tuple[float, int]:
    """Returns the mean and the maximum difference of the prepared tiles, of 255."""
    found = []
    for index in range(0, len(before), max(1, len(before) // 100)):
        tiles = [PROCESSOR(open_image(content_of(source, index))) for source in (before, after)]
        found.append(np.abs(np.subtract(*tiles, dtype=int)))
    return float(np.mean([diff.mean() for diff in found])), int(max(diff.max() for diff in found))


if __name__ == "__main__":
    main()
