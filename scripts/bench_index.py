"""Measures the time and memory to open a large JSON lines file.

python scripts/bench_index.py [--rows 5000000] [--folder FOLDER]

Writes a file of conversations of about 600 bytes each. Each measurement runs in a process of its own: opening the file
for the first time and again, reading 1,000 rows at random positions, and packing the first sequences of shuffled text.
Prints seconds and peak memory.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import resource, sys, time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
print(f"{{seconds:8.2f}} s  {{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:6.2f}} GiB")
"""
OPEN = "from llava_jax.data.sources import open_mixture\nmixture = open_mixture(sys.argv[1])"
READ = OPEN + "\nfor i in range(1000): mixture.sources[0][i * 7919 % len(mixture.sources[0])]"
PACK = OPEN + """
from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.images import ImageProcessor
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer
spec = DataSpec(mixture=mixture, tokenizer=Tokenizer.load(sys.argv[2]), template=TEMPLATES["vicuna_v1"],
                processor=ImageProcessor(), sequence_length=2048, tiles_per_sequence=3)
next(iter(Batches(spec, 8)))"""
TOKENIZER = Path(__file__).parent.parent / "tests" / "golden" / "tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", default=None, help="folder for the temporary file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = os.path.join(folder, "data.jsonl")
        write(path, options.rows)
        print(f"{options.rows:,} rows, {os.path.getsize(path) / 1e9:.2f} GB")
        for name, code in [("open, first time", OPEN), ("open, again", OPEN), ("open and read 1,000 rows", READ),
                           ("open and pack the first rows", PACK)]:
            command = [sys.executable, "-c", MEASURE.format(code=code), path, str(TOKENIZER)]
            print(f"{name:30}", subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


def write(path: str, rows: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(1000)]
    with open(path, "w") as file:
        for number in range(rows):
            turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": texts[number * 7 % 1000]}]
            file.write(json.dumps({"id": number, "conversations": turns}) + "\n")


if __name__ == "__main__":
    main()
