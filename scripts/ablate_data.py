"""Repeats the paper's ablation of the instruction data (Visual Instruction Tuning, table 4) with the miniature.

    python scripts/ablate_data.py [--out runs/ablate_data] [--pictures 10000] [--epochs 3] [--questions 100]

The rules teacher writes three kinds of records about the miniature's pictures, in the paper's proportion (58K, 23K and
77K of 158K). Stage 1 is trained once. Stage 2 starts from it with five data sets for the same number of epochs. Every
model then gets one question of each kind about every held-out picture.

In the paper GPT-4 gives each answer 1 to 10 points, and a model's score is its points relative to those of GPT-4's own
answers. Here the points of an answer are the F1 score of its facts. Precision is the share of its claims that the boxes
do not contradict. Recall is its number of different true facts relative to that of the rules teacher's answer.
Text that synthesize/evidence does not read, such as the conclusion of an argument, does not count.

Existing files are kept. The output is a Markdown table.
"""

import argparse
import dataclasses
import json
import random
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from llava_jax import load
from llava_jax.annotations import drawn_scenes as scenes
from llava_jax.annotations.context import AnnotationSource, Context, open_contexts
from llava_jax.annotations.vocabulary import Vocabulary
from llava_jax.config import Data, Model, Recipe, load_recipe
from llava_jax.inference.llava import Request
from llava_jax.synthesize.evidence.checker import EvidenceChecker
from llava_jax.synthesize.evidence.claims import all_claims
from llava_jax.synthesize.parse import Reject, parse
from llava_jax.synthesize.prompts import KINDS, read_questions
from llava_jax.synthesize.rules import RulesTeacher
from llava_jax.train.loop import train

SHARES = {"conversation": 58 / 158, "detail_description": 23 / 158, "complex_reasoning": 77 / 158}
OPTIONS = dict(zip(KINDS, ("conversation", "detail", "complex"), strict=True))
# Share of each kind's records in a set, and the paper's scores: conversation, detail, complex, all.
SETS = {
    "full data": ((1, 1, 1), (83.1, 75.3, 96.5, 85.1)),
    "detail + complex": ((0, 1, 1), (81.5, 73.3, 90.8, 81.9)),
    "conversation + 5 % detail + 10 % complex": ((1, 0.05, 0.1), (81.0, 68.4, 91.5, 80.5)),
    "conversation": ((1, 0, 0), (76.5, 59.8, 84.9, 73.8)),
    "no instruction tuning": (None, (22.0, 24.0, 18.5, 21.5)),
}
NUM_TEST = 500  # held-out pictures
WORDS = Vocabulary(tuple(f"{colour} {shape}" for colour, shape in scenes.PAIRS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablate_data"))
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--questions", type=int, default=100, help="held-out pictures, each with one of each kind")
    args = parser.parse_args()
    data = args.out / "data"
    write_data(data, args.pictures)
    questions = draw_questions(data, args.questions)
    print("| data | records | conversation | detail | complex | all | paper: conversation | detail | complex | all |")
    print("|---" * 10 + "|")
    for name, (parts, paper) in SETS.items():
        folder = args.out / re.sub(r"\W+", "_", name)
        records = write_set(data, folder, parts) if parts else 0
        if not (folder / "scores.json").exists():
            model = tune(args.out, data, folder, args.epochs) if parts else align(args.out, data)
            folder.mkdir(parents=True, exist_ok=True)
            scores = score(model, questions, data, folder / "answers.json")
            (folder / "scores.json").write_text(json.dumps(scores))
        scores = json.loads((folder / "scores.json").read_text())
        cells = [f"{x:.1f}" for x in (*scores, *paper)]
        print(f"| {name} | {records:,} | {' | '.join(cells)} |", flush=True)


def write_data(data: Path, pictures: int) -> None:
    """Writes pictures, captions for stage 1 and the records of three kinds."""
    if (data / "instruct" / "manifest.json").exists():
        return
    scenes.write(data, train=pictures, test=NUM_TEST)
    captions = data / "annotations/captions_train.json"
    source = ["--captions", captions, "--names", "file", "--prefix", "train/"]
    counts = [word for kind, share in SHARES.items() for word in (f"--{OPTIONS[kind]}", round(share * pictures))]
    boxes = ["--instances", data / "annotations/instances_train.json"]
    synthesize("run", *source, *boxes, *counts, "--teacher", "rules", "--out", data / "instruct")
    synthesize("pairs", captions, "--prefix", "train/", "--out", data / "captions.json")


def synthesize(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "llava_jax.synthesize", *map(str, words)], check=True)


def write_set(data: Path, folder: Path, parts: tuple[float, float, float]) -> int:
    """Writes the records of one set, shuffled. Returns their number."""
    records = []
    for kind, part in zip(KINDS, parts, strict=True):
        rows = json.loads((data / "instruct" / f"{kind}.json").read_text())
        records += random.Random(kind).sample(rows, round(part * len(rows)))
    random.Random(0).shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.json").write_text(json.dumps(records))
    return len(records)


def align(out: Path, data: Path) -> Path:
    """Trains stage 1 of the miniature. Returns the model."""
    mini = load_recipe("mini")
    stage = mini.stages["align"]
    captions = dataclasses.replace(stage.data, path=str(data / "captions.json"), image_root=str(data), validation="")
    stages = {"align": dataclasses.replace(stage, data=captions)}
    return fit(Recipe(mini.model, stages, str(out / "stage1"), log_every=100))


def tune(out: Path, data: Path, folder: Path, epochs: float) -> Path:
    """Trains stage 2 on a set of records, starting from stage 1. Returns the model."""
    stage = dataclasses.replace(
        load_recipe("mini").stages["instruct"], batch_size=8, steps=None, epochs=epochs,
        data=Data(str(folder / "records.json"), image_root=str(data), sequence_length=512, tiles_per_sequence=4),
    )
    return fit(Recipe(Model(llava=str(align(out, data))), {"instruct": stage}, str(folder / "run"), log_every=100))


def fit(recipe: Recipe) -> Path:
    """Trains in a process of its own, which frees its memory. A finished run is not repeated."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return Path(pool.submit(train, recipe).result())


def draw_questions(data: Path, pictures: int) -> list[tuple[str, Context, str, str]]:
    """Returns (kind, picture, question, the rules teacher's answer) for each kind and held-out picture."""
    annotations = data / "annotations"
    contexts = open_contexts(AnnotationSource(
        str(annotations / "captions_test.json"), str(annotations / "instances_test.json"), names="file",
        prefix="test/"))
    teacher, draw, found = RulesTeacher(), random.Random(0), []
    pool = read_questions("detail_description")
    for context in contexts[:pictures]:
        for kind in KINDS:
            try:
                turns = parse(kind, teacher.answer(kind, context), question=draw.choice(pool))
            except Reject:  # too short, because there is little to see
                continue
            index = 2 * draw.randrange(len(turns) // 2)
            found.append((kind, context, turns[index]["value"], turns[index + 1]["value"]))
    return found


def score(model: Path, questions: list[tuple[str, Context, str, str]], data: Path, answers: Path) -> list[float]:
    """Returns the scores of conversation, detail, complex and all in percent, and writes the answers to a file."""
    llava = load(model)
    requests = [Request(question, [data / context.image], max_new_tokens=256) for _, context, question, _ in questions]
    points, kept = {kind: [] for kind in KINDS}, []
    texts = [completion.text for completion in llava.batch(requests, batch_size=32)]
    for (kind, context, question, expected), text in zip(questions, texts, strict=True):
        point = f1(context, question, text, expected)
        if point is not None:
            points[kind].append(point)
        kept.append({"kind": kind, "image": context.image, "question": question, "reference": expected,
                     "answer": text, "points": point})
    answers.write_text(json.dumps(kept, indent=1))
    return [100 * fmean(found) for found in (*points.values(), sum(points.values(), []))]


def f1(context: Context, question: str, answer: str, expected: str) -> float | None:
    """Returns the points of an answer, 0..1, or None if the expected answer has no claim that can be checked."""
    true, false = facts(context, question, answer)
    wanted, _ = facts(context, question, expected)
    if not wanted:
        return None
    if not true:
        return 0.0
    precision, recall = len(true) / (len(true) + len(false)), min(1, len(true) / len(wanted))
    return 2 * precision * recall / (precision + recall)


def facts(context: Context, question: str, answer: str) -> tuple[set, set]:
    """Returns the different claims of an answer: the true ones, and the false ones."""
    checker, true, false = EvidenceChecker(context, WORDS), set(), set()
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    for claim in all_claims(turns, WORDS):
        verdict = checker(claim)
        if verdict is not None:
            about = claim.a.text.removeprefix("the ").removeprefix("a "), claim.b and claim.b.text
            (false if verdict else true).add((claim.kind, *about, claim.values, claim.negated))
    return true, false


if __name__ == "__main__":
    main()
