"""Compares the data pipeline of a host with plain decoding and resizing: JPEG 640x480 -> 336 pixels, padded -> rows.

python scripts/bench_pipeline.py [--workers 1 2] [--records 2000]

Prints images per second of plain PIL in one process, then of `Batches` with each number of workers. From these it
computes the number of cores that keep the chips of a host busy. Run it on the host of the chips.
"""

import argparse
import json
import os
import tempfile
import time

import numpy as np
from PIL import Image

from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture
from llava_jax.images import ImageProcessor
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

SIZE, ROW_LENGTH, SLOTS, ROWS = 336, 3072, 4, 8
TOKENIZER = os.path.join(os.path.dirname(__file__), "..", "tests", "golden", "tokenizer.model")
WORDS = "the a man woman dog street red large sitting next to with and holding people in front of an old table".split()

# LLaVA-1.5 7B: FLOPs of a decoder token with (stage 2) and without (stage 1) weight gradients, and of an image's
# forward pass; and the share of the chips' peak that a good step reaches, an assumption that favours the chips.
DECODER, TOWER, UTILISATION = {"align": 4 * 6.7e9, "instruct": 6 * 6.7e9}, 0.37e12, 0.6
CHIPS = {"v5e": (197e12, 4), "v6e": (918e12, 4)}  # peak FLOP/s in bfloat16, chips of a host in a slice of several hosts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--records", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths, data = write(folder, options.records)
        start = time.process_time()
        for path in paths[:1000]:
            decode_and_resize(path)
        bare = min(1000, options.records) / (time.process_time() - start)
        print(f"bare PIL: {bare:.0f} images/s in one process ({1000 / bare:.2f} ms each)")
        for workers in options.workers:
            rate, images = measure(data, workers)
            print(f"{workers} workers: {rate:.0f} images/s, {rate / workers:.0f} per worker, "
                  f"{rate / workers / bare:.2f} of bare PIL; {images:.2f} images a row")
    print("\n| host | stage | images/s | cores |\n|---|---|---|---|")
    for chip, (peak, chips) in CHIPS.items():
        for stage, flops in DECODER.items():
            needed = chips * peak * UTILISATION / (ROW_LENGTH * flops + images * TOWER) * images
            print(f"| {chip}, {chips} chips | {stage} | {needed:.0f} | {needed / (rate / workers):.1f} |")


def decode_and_resize(path: str) -> np.ndarray:
    """Decodes, pads and resizes an image in plain PIL, the minimum of work."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.array(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def write(folder: str, records: int) -> tuple[list[str], str]:
    """Writes smooth pictures with grain, about 100 KB each, and a conversation of about 150 words about each."""
    rng, paths, rows = np.random.default_rng(0), [], []
    for number in range(records):
        if number < 200:
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC))
            noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
            paths.append(os.path.join(folder, f"{number}.jpg"))
            Image.fromarray(noisy).save(paths[-1], quality=85)
        else:
            paths.append(paths[number % 200])
        turns = []
        for turn in range(3):
            question = "<image>\n" * (turn == 0) + " ".join(rng.choice(WORDS, 10)) + "?"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join(rng.choice(WORDS, 40))}]
        rows.append({"id": number, "image": os.path.basename(paths[-1]), "conversations": turns})
    with open(os.path.join(folder, "data.json"), "w") as file:
        json.dump(rows, file)
    return paths, file.name


def measure(data: str, workers: int) -> tuple[float, float]:
    """Returns images per second once the pipeline is running, and images per row."""
    spec = DataSpec(mixture=open_mixture(data), tokenizer=Tokenizer.load(TOKENIZER), template=TEMPLATES["vicuna_v1"],
                    processor=ImageProcessor(), sequence_length=ROW_LENGTH, tiles_per_sequence=SLOTS)
    batches = iter(Batches(spec, ROWS, workers=workers))
    for _ in range(20):
        next(batches)
    images, rows, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < 20:
        batch = next(batches)
        images, rows = images + int((batch["tile_segment_ids"] > 0).sum()), rows + ROWS
    seconds = time.perf_counter() - start
    batches.close()
    return images / seconds, images / rows


if __name__ == "__main__":
    main()
