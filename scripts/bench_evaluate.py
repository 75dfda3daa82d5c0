"""Measures the answers per second of a benchmark: many questions at once against one at a time.

    python scripts/bench_evaluate.py [--model runs/mini/model] [--data runs/mini/data] [--questions 256]
                                     [--batches 1,8,32,64] [--rounds 3]

The questions are the miniature's, with answers of one word. A first round compiles, and checks that all batch sizes
give the same texts. Then the batch sizes alternate. The time includes opening and decoding of images. The figures
are medians, with the lowest and the highest value.
"""

import argparse
import time

import numpy as np
from bench_models import machine

import llava_jax
from llava_jax.evaluate.runner.generation import ask
from llava_jax.evaluate.tasks.scenes import Scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/mini/model")
    parser.add_argument("--data", default="runs/mini/data")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    llava, task, sizes = llava_jax.load(args.model), Scenes(), [int(size) for size in args.batches.split(",")]
    questions = task.load(args.data)[: args.questions]

    def seconds(size: int) -> float:
        start = time.perf_counter()
        answers = [answer.text for answer in ask(llava, task, questions, size)]
        if answers != texts.setdefault(sizes[0], answers):
            raise SystemExit(f"a batch of {size} gives other answers than a batch of {sizes[0]}")
        return time.perf_counter() - start

    texts: dict[int, list[str]] = {}
    for size in sizes:
        seconds(size)
    rates = len(questions) / np.array([[seconds(size) for size in sizes] for _ in range(args.rounds)])
    print("| questions at once | a second | ratio |\n|---|---|---|")
    for column, size in enumerate(sizes):
        of_size = rates[:, column]
        print(f"| {size} | {np.median(of_size):,.1f} ({of_size.min():,.1f}-{of_size.max():,.1f}) | "
              f"{np.median(of_size / rates[:, 0]):.2f} |")


if __name__ == "__main__":
    main()
