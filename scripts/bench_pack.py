"""Measures `prepare pack`: size, speed of packing and reading, and the change of the tiles by re-encoding.

Draws pictures of 640 x 480 and 640 x 427 pixels (noise of all scales with hard edges, JPEG of quality 90), or uses
the pictures of `--images FOLDER`. Reading is measured in one process.

With `--rows`, packs conversations without images: rows a second by workers, hosts and Beam, memory, and what a kill
costs. 10,000,000 rows are 7 GB and take an hour of one core.

    python scripts/bench_pack.py
    python scripts/bench_pack.py --rows 1000000
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
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
SHARDS = 40
"""Number of shards of a set without images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of pictures")
    parser.add_argument("--images", default="", help="folder of pictures, instead of drawn ones")
    parser.add_argument("--workers", type=int, help="processes that pack; default: 1, with --rows 1 and 2")
    parser.add_argument("--rows", type=int, default=0, help="number of rows without images, instead of pictures")
    parser.add_argument("--folder", default=None, help="folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.rows:
            return measure_rows(Path(folder), args.rows, args.workers)
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
                Pack(data=data, out=out, image_root="/", workers=args.workers or 1, shard_size="16MB", **options).run()
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


def measure_rows(folder: Path, count: int, workers: int | None) -> None:
    write_rows(folder / "data.jsonl", count)
    start = time.perf_counter()
    open_source(folder / "data.jsonl")
    size = (folder / "data.jsonl").stat().st_size / 1e9
    print(f"{count:,} rows, {size:.2f} GB; indexed in {time.perf_counter() - start:.1f} s")
    print("| pack | time | rows/s | memory of all processes, without maps of files |\n|---|---|---|---|")
    ways = {"1 worker": [["--workers", "1"]], "2 workers": [["--workers", "2"]]}
    ways["2 hosts, 1 worker each"] = [["--workers", "1", "--hosts", "2", "--host", host] for host in ("0", "1")]
    if importlib.util.find_spec("apache_beam"):
        ways["Beam's DirectRunner"] = [["--runner", "DirectRunner"]]
        processes = ["--runner-options", "direct_num_workers=2", "direct_running_mode=multi_processing"]
        ways["Beam's DirectRunner, 2 processes"] = [["--runner", "DirectRunner", *processes]]
    if workers is not None:
        ways = {f"{workers} workers": [["--workers", str(workers)]]}
    for name, commands in ways.items():
        seconds, memory = pack_rows(folder, commands)
        print(f"| {name} | {seconds:.0f} s | {count / seconds:,.0f} | {memory / 1e6:.0f} MB |", flush=True)
        shutil.rmtree(folder / "out")
    command = [["--workers", str(2 if workers is None else workers)]]
    before, _ = pack_rows(folder, command, kill_at=0.5)
    kept = len(list(folder.glob("out/.pack/*[0-9].json"))) / SHARDS
    after, _ = pack_rows(folder, command)
    print(f"\nkilled (SIGKILL) after {before:.0f} s, when {kept:.0%} of the shards were finished; then {after:.0f} s")


def write_rows(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for i in range(count):
            texts = [f"What is {i} plus {i + 1}? " + "word " * 10, f"{2 * i + 1}. " + "answer words follow here " * 12,
                     "And then?", f"Then {i * 3}. " * 8]
            turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
            file.write(json.dumps({"id": f"row {i}", "conversations": turns}) + "\n")


def pack_rows(folder: Path, commands: list[list[str]], kill_at: float = 1.0) -> tuple[float, float]:
    """Returns seconds and greatest memory of commands that run at once, killed when this part of the shards is done."""
    pack = [sys.executable, "-m", "llava_jax.prepare", "pack", str(folder / "data.jsonl"), str(folder / "out"),
            "--shards", str(SHARDS)]
    start, memory = time.perf_counter(), 0.0
    with open(folder / "log", "w") as log:
        running = [subprocess.Popen([*pack, *command], stdout=log, stderr=log, start_new_session=True)
                   for command in commands]
        try:
            while any(process.poll() is None for process in running):
                memory = max(memory, sum(map(anonymous_bytes, descendants({process.pid for process in running}))))
                if kill_at < 1 and len(list(folder.glob("out/.pack/*[0-9].json"))) >= kill_at * SHARDS:
                    break
                time.sleep(0.2)
        finally:  # also on Ctrl-C, which does not reach other sessions
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if kill_at == 1 and any(process.returncode for process in running):
        raise RuntimeError((folder / "log").read_text()[-3000:])
    return time.perf_counter() - start, memory


def descendants(processes: set[int]) -> set[int]:
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    while more := {child for child, parent in parents.items() if parent in processes} - processes:
        processes = processes | more
    return processes


def anonymous_bytes(process: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])
    return 0


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
