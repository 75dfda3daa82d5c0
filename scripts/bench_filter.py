"""Measures the concept-balanced filter: speed and memory, and the accuracy of the light chunker.

    python scripts/bench_filter.py [--captions 3000000] [--workers 2] [--folder DIR]
    python scripts/bench_filter.py --labelled tests/annotations/labelled_captions.tsv
    python scripts/bench_filter.py --agreement CAPTIONS --spacy-model DIR [--limit 10000]

The first makes captions like CC3M's (about ten words; common words as common as in English, by Zipf's law), runs
`python -m llava_jax.prepare filter` on them and prints time, processor time, memory and counts. Memory is that of all
processes together, read from /proc (Linux) five times a second. The second prints precision and recall against captions
labelled by hand; the rules were made with the odd lines (1, 3, ...) in view, so that the even ones say more. The third
compares the light chunker with spaCy on the captions of a file (any that the filter takes).
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava_jax.annotations.captions import CaptionFile
from llava_jax.annotations.noun_phrases import SpacyChunker, light_chunker, read_word_lists

# Words of captions: J an adjective, N a noun, Z a verb in -s, G one in -ing, D one in -ed; | separates them.
SHAPES = """a J N Z on the N|N of a J N in the N|person Z the N of N|the J N of the N at N|J N N G in a J N
a N G a N with a N in the N|J N N isolated on a J background|actor Z the N N at the N|the N and the N of a J J N
a J N N with J N and a J N|N Z to the N after a N during the N against N|portrait of a J N G in front of the N
a N D with J N on a J N N|how to Z your N with a J N|the N 's J N is D by the N|two J N and a N near the J N N in N
young N G on the N of a N N at the N of N|vector illustration of J N N with a N on N|N N , N and J N for the J N
this is one of the J N in the N of N where N Z|the J - J N has a N and N from the J N|N N N in the J N"""


def words(count: int, endings: str, rng: np.random.Generator) -> list[str]:
    """Makes distinct pronounceable words, each with one of `endings`."""
    consonants = "b br c d dr f g h k l m n p r s st t tr v w".split()
    syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]
    made: dict[str, None] = {}
    while len(made) < count:
        drawn, ends = rng.choice(syllables, (count, 3)), rng.choice(endings.split(","), count)
        made.update(dict.fromkeys("".join(word) + end for word, end in zip(drawn, ends.tolist(), strict=True)))
    return list(made)[:count]


def make_captions(path: Path, count: int, seed: int) -> None:
    """Writes lines of caption, tab, URL."""
    rng = np.random.default_rng(seed)
    lists = read_word_lists()
    known = [word for word in lists["N"] + lists["H"] if len(word) > 2]
    lists = {
        "N": known + words(30_000, "n,l,r,t,ns,ts", rng),
        "J": lists["J"] + words(6_000, "ous,ic,al,y", rng),
        "Z": words(1_500, "es", rng),
        "G": words(1_500, "ing", rng),
        "D": words(1_500, "ed", rng),
    }
    shapes = [shape.split() for shape in SHAPES.replace("\n", "|").split("|")]
    with open(path, "w") as file:
        for first in range(0, count, 50_000):
            drawn = {}
            for kind, choices in lists.items():
                weights = 1 / np.arange(1, len(choices) + 1) ** (1.0 if kind != "N" else 0.95)
                drawn[kind] = iter(rng.choice(choices, 400_000, p=weights / weights.sum()).tolist())
            for row, shape in enumerate(rng.integers(len(shapes), size=min(50_000, count - first)), first):
                text = " ".join(next(drawn[word]) if word in drawn else word for word in shapes[shape])
                file.write(f"{text}\thttps://images.example/{row:09d}/picture-of-something.jpg\n")


def memory_of(process: int) -> tuple[int, int]:
    """Returns resident bytes of a process and its descendants, and the same with shared pages counted once."""
    resident = shared_once = 0
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            resident += 1024 * int(line.split()[1]) if line.startswith("Rss:") else 0
            shared_once += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
    except OSError:  # it has just ended
        return 0, 0
    for child in children:
        more = memory_of(int(child))
        resident, shared_once = resident + more[0], shared_once + more[1]
    return resident, shared_once


def measure(count: int, workers: int, folder: Path, seed: int) -> None:
    data = folder / f"captions_{count}_{seed}.tsv"
    if not data.exists():
        make_captions(data, count, seed)
    megabytes = data.stat().st_size / 1e6
    print(f"{count:,} captions, {megabytes:.0f} MB, {workers} processes besides the main one", flush=True)
    command = [sys.executable, "-m", "llava_jax.prepare", "filter", str(data), str(folder / "kept.tsv")]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers)])
    peak = (0, 0)
    while process.poll() is None:
        peak = tuple(map(max, peak, memory_of(process.pid)))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"time: {wall:.0f} s, processor time: {used.ru_utime + used.ru_stime:.0f} s, {count / wall:,.0f} captions/s")
    print(f"peak memory: {peak[0] / 1e9:.2f} GB ({peak[1] / 1e9:.2f} GB with shared pages counted once)")


def compare(found: Iterable[Iterable[str]], wanted: Iterable[Iterable[str]]) -> str:
    """Returns precision, recall and F1 of distinct phrases over all captions, as text."""
    pairs = [(set(a), set(b)) for a, b in zip(found, wanted, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    precision, recall = right / sum(len(a) for a, _ in pairs), right / sum(len(b) for _, b in pairs)
    same = sum(a == b for a, b in pairs) / len(pairs)
    return (
        f"precision {precision:.1%}, recall {recall:.1%}, F1 {2 * precision * recall / (precision + recall):.1%}; "
        f"all phrases of a caption right: {same:.1%} of {len(pairs):,}"
    )


def labelled(path: str) -> None:
    rows = [line.split("\t") for line in Path(path).read_text().splitlines()]
    for name, part in (("odd lines", rows[::2]), ("even lines", rows[1::2])):
        captions, labels = zip(*part, strict=True)
        print(f"{name}: {compare(light_chunker(captions), [label.split(' | ') for label in labels])}")


def agreement(path: str, model: str, limit: int) -> None:
    file = CaptionFile(path)
    captions = [file.caption(row) for row in itertools.islice(file, limit)]
    start = time.perf_counter()
    wanted = SpacyChunker(model)(captions)
    print(f"spaCy, its start included: {len(captions) / (time.perf_counter() - start):,.0f} captions/s")
    print(f"light chunker against {model}: {compare(light_chunker(captions), wanted)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="folder for data, output and report; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labelled", metavar="FILE", help="lines of caption, tab, phrases separated by ' | '")
    parser.add_argument("--agreement", metavar="CAPTIONS")
    parser.add_argument("--spacy-model", default="")
    parser.add_argument("--limit", type=int, default=10_000)
    args = parser.parse_args()
    if args.labelled:
        labelled(args.labelled)
    elif args.agreement:
        agreement(args.agreement, args.spacy_model, args.limit)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            measure(args.captions, args.workers, folder, args.seed)


if __name__ == "__main__":
    main()
