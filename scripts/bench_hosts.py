"""Measures what each of several hosts reads and computes for one epoch: bytes and CPU seconds.

python scripts/bench_hosts.py [--hosts 1 8 64] [--records 2048]

The data are pictures of 640 x 480 as JPEG files beside a JSON file, and the same as a packed set. A host runs alone in
this process and receives the lengths that others measure from a complete table. Figures are means of up to four hosts.
In the first epoch the hosts measure the lengths of all records in shares, or each host all; later epochs know them.
Bytes are those of read calls (Linux), and of the rows of a JSON file, which is mapped into memory.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_pipeline import ROW_LENGTH, SLOTS, TOKENIZER, write

from llava_jax.data.examples import DataSpec
from llava_jax.data.json_rows import JsonRows
from llava_jax.data.lengths import Lengths
from llava_jax.data.pipeline import Batches
from llava_jax.data.sources import open_mixture
from llava_jax.images import ImageProcessor
from llava_jax.prepare.pack import Pack
from llava_jax.text.templates import TEMPLATES
from llava_jax.text.tokenizer import Tokenizer

BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--records", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, data = write(folder, options.records)
        packed = os.path.join(folder, "packed")
        with contextlib.redirect_stdout(io.StringIO()):
            Pack(data=data, out=packed, workers=1).run()
        print("| data | hosts | each measures all: MB, CPU s | its share: MB, CPU s | later: MB, CPU s |\n"
              "|---|---|---|---|---|", flush=True)
        for name, path in (("JSON and files", data), ("packed set", packed)):
            for hosts in options.hosts:
                figures = [f"{read / 1e6:.1f}, {cpu:.2f}" for read, cpu in run(path, hosts)]
                print(f"| {name} | {hosts} | {' | '.join(figures)} |", flush=True)


class Share(Lengths):
    """Lengths of which a host measures one of `count` parts. `whole` has those that the other hosts measure."""

    def __init__(self, spec: DataSpec, index: int, count: int, whole: Lengths):
        super().__init__(spec)
        self.index, self.count, self.whole = index, count, whole

    def add(self, numbers: np.ndarray, found: Sequence) -> None:
        self._table[numbers] = self.whole[numbers]

    def save(self) -> None:
        pass


def run(data: str, hosts: int) -> np.ndarray:
    """Returns the bytes read and the CPU seconds of a host: measuring all, its share, and in the next epoch."""
    spec = DataSpec(mixture=open_mixture(data), tokenizer=Tokenizer.load(TOKENIZER), template=TEMPLATES["vicuna_v1"],
                    processor=ImageProcessor(), sequence_length=ROW_LENGTH, tiles_per_sequence=SLOTS)
    whole = Lengths(spec)
    records = np.arange(len(spec.mixture.sources[0]))
    whole.add(records, spec("lengths", records.tolist()))
    spec.tiles(0)  # imports what it needs
    figures = []
    for index in sorted({hosts * part // 4 for part in range(4)}):
        batches = Batches(spec, BATCH_SIZE, epochs=1, process_index=index, process_count=hosts)
        batches._lengths = Share(spec, 0, 1, whole)
        alone = measure(batches)
        batches._lengths = Share(spec, index, hosts, whole)
        figures.append([alone, measure(batches), measure(batches)])
    return np.mean(figures, axis=0)


def measure(batches: Batches) -> tuple[float, float]:
    with RowBytes() as rows:
        before, start = read_bytes(), time.process_time()
        for _ in batches:
            pass
        return read_bytes() - before + rows.count, time.process_time() - start


class RowBytes:
    """Counts the bytes of the JSON rows that are read in its block."""

    def __enter__(self) -> "RowBytes":
        self.count, self.original = 0, JsonRows.__getitem__

        def read(rows: JsonRows, index: int) -> Any:
            start, stop, _ = rows._offsets[index].tolist()
            self.count += stop - start
            return self.original(rows, index)

        JsonRows.__getitem__ = read
        return self

    def __exit__(self, *_: Any) -> None:
        JsonRows.__getitem__ = self.original


def read_bytes() -> int:
    """Returns the number of bytes that this process has read."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


if __name__ == "__main__":
    main()
