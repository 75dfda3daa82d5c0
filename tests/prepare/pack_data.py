"""Data sets to pack, and how to read back what was packed."""

import hashlib
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.core.example_parser import ExampleParserNp

from llava_jax.data.sources import open_source
from llava_jax.prepare.pack import Pack

TEXTS = ["plain", "naïve café", "日本語 😀", "a\nb\t", "", "x" * 5000]


def encoded(seed: int, width: int, height: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 4), np.uint8)
    file, image = io.BytesIO(), Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(file, form)
    return file.getvalue()


def write_data(folder, count: int = 24, seed: int = 0) -> str:
    """A JSON file of rows with none to three images of several formats, sizes and modes."""
    draw, rows = random.Random(seed), []
    os.makedirs(folder, exist_ok=True)
    for number in range(count):
        names = []
        for k in range(draw.choice([0, 1, 1, 1, 2, 3])):
            form, mode = draw.choice([("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "P")])
            names.append(f"{number}_{k}.{form.lower()}")
            content = encoded(number, draw.randrange(1, 200), draw.randrange(1, 200), form, mode)
            Path(folder, names[-1]).write_bytes(content)
        roles = ("human", "gpt") * draw.randrange(1, 4)
        turns = [{"from": role, "value": draw.choice(TEXTS)} for role in roles]
        for _ in names:
            turns[draw.randrange(len(turns))]["value"] += "\n<image>"
        if draw.random() < 0.2:
            turns.insert(0, {"from": "system", "value": draw.choice(TEXTS)})
        row = {"id": draw.choice([number, f"näme {number}"]), "conversations": turns}
        rows.append(row | ({"image": names[0] if len(names) == 1 else names} if names else {}))
    path = os.path.join(folder, "data.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False)
    return path


def run(data, out, **options) -> str:
    assert Pack(data=str(data), out=str(out), **{"workers": 0, "shards": 4} | options).run() == 0
    return str(out)


def contents(folder) -> dict[str, str]:
    files = [os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(file, folder): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def with_tfds(out, split="train") -> list[dict]:
    """The rows as TFDS reads them, images not decoded."""
    builder, rows = tfds.builder_from_directory(out), []
    parser = ExampleParserNp(builder.info.features.get_serialized_info())
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for row in map(parser.parse_example, builder.as_data_source(split, deserialize_method=raw)):
        turns = zip(row["conversations"]["from"], row["conversations"]["value"], strict=True)
        turns = [{"from": role.decode(), "value": text.decode()} for role, text in turns]
        rows.append({"id": row["id"].decode(), "images": list(row["images"]), "turns": turns})
    return rows


def read_all(out) -> Iterator[bytes]:
    """The stored rows of all shards."""
    for file in sorted(Path(out).glob("*.array_record-*")):
        yield from ArrayRecordReader(str(file)).read_all()


def expected(data) -> list[dict]:
    source = open_source(data)
    records = [source[i] for i in range(len(source))]
    return [
        {
            "id": record.id,
            "images": [image if isinstance(image, bytes) else Path(image).read_bytes() for image in record.images],
            "turns": list(record.turns),
        }
        for record in records
    ]


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


KILLS = """
import os, signal, sys
from llava_jax.prepare import shards
from llava_jax.prepare.pack import Pack
data, out = sys.argv[1:3]
load, replace, left = shards.Examples.load, os.replace, 0
def event():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def loads(*args):
    event()
    return load(*args)
def replaces(*args):
    event()
    replace(*args)
    event()
"""
"""Start of a program whose processes kill themselves at their N-th event, `left`: a row read, or before and after a
file gets its name."""
