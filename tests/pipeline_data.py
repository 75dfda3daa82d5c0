"""Rows with images, and the packed sequences that Batches builds of them."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import Mixture, Source, open_source
from llava_jax.images import ImageProcessor
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer.model"
SIZE, PER_IMAGE, LENGTH, SLOTS = 14, 4, 160, 3
PROCESSOR = ImageProcessor(SIZE, patches=2)


def png(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(5, 40, 2), 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_rows(folder: Path, count: int, seed: int = 0, images=(0, 1, 1, 1, 2)) -> list[dict]:
    """Rows with 0 to 2 images each, 1 or 2 questions, and answers of which no two are alike."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        names = [f"{number}-{k}.png" for k in range(rng.choice(images))]
        for name in names:
            (folder / name).write_bytes(png(rng))
        turns = []
        for turn in range(rng.integers(1, 3)):
            question = "<image>\n" * (len(names) if turn == 0 else 0) + "What is here?"
            answer = f"Row {number} of {seed}." + " It is red." * rng.integers(0, 3)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{seed}-{number}", "image": names, "conversations": turns})
    return rows


def write_file(folder: Path, rows: list[dict], name: str = "data.json") -> Source:
    (folder / name).write_text(json.dumps(rows))
    return open_source(folder / name)


def settings(*sources: Source, **changes) -> dict:
    """Options of Batches; `changes` are fields of the DataSpec or other options."""
    spec = {
        "mixture": Mixture(sources, tuple(len(source) for source in sources)),
        "tokenizer": Tokenizer.load(TOKENIZER),
        "template": TEMPLATES["vicuna_v1"],
        "processor": PROCESSOR,
        "sequence_length": LENGTH,
        "tiles_per_sequence": SLOTS,
    }
    names = {field.name for field in dataclasses.fields(DataSpec)}
    spec |= {name: value for name, value in changes.items() if name in names}
    return {"spec": DataSpec(**spec), "seed": 7} | {n: value for n, value in changes.items() if n not in names}


def packed_rows(**options):
    """The rows of batches of one row each."""
    for batch in Batches(batch_size=1, **options):
        skipped = batch.pop("skipped")
        yield {name: value[0] for name, value in batch.items()} | {"skipped": skipped}
