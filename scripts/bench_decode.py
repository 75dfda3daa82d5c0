"""How fast answers are written: tokens per second here and by transformers' `generate` with its KV cache.

    python scripts/bench_decode.py [--sizes mini,100m] [--rows 1,8] [--tokens 128] [--rounds 7]

Both have the same random weights in float32 and all threads, read the same prompts of one image and some text, and
write the same number of greedy tokens; that these are the same tokens is checked first, which compiles too. Then they
take turns in one process. `answer` counts the whole call, with the vision tower and the reading of the prompt;
`decode` leaves out the time that an answer of one token takes. Figures are medians, with the lowest and the highest.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from bench_models import SIZES, count, image_id, machine, parameters_of, pixel_values, torch_model

from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.engine import Engine, Job
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.text.encode import IMAGE_TOKEN_ID


class NoText:
    """Stands for the tokenizer, which is no part of what is measured."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="mini,100m", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rows", default="1,8", help="answers at once")
    parser.add_argument("--text", type=int, default=60, help="tokens of a prompt besides those of its image")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(machine())
    print("| parameters | rows | prompt | answer, transformers | here | ratio | decode, transformers | here | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        config = SIZES[size]
        theirs = torch_model(config).eval()
        parameters = parameters_of(theirs)
        for rows in map(int, args.rows.split(",")):
            tokens, images = prompts(config, rows, args.text)
            calls = (transformers_call(theirs, config, tokens, images), call(config, parameters, tokens, images))
            for limit in (1, args.tokens):
                check(*(run(limit) for run in calls))
            seconds = np.array([times(run, args.tokens) for _ in range(args.rounds) for run in calls])
            cells = [f"{count(parameters) / 1e6:.0f}M", str(rows), str(tokens.shape[1])]
            for written, each in ((args.tokens, seconds[:, 0]), (args.tokens - 1, seconds[:, 0] - seconds[:, 1])):
                rates = rows * written / each.reshape(-1, 2).T
                cells += [f"{np.median(rate):,.0f} ({rate.min():,.0f}-{rate.max():,.0f})" for rate in rates]
                cells.append(f"{np.median(rates[1] / rates[0]):.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def prompts(config: LlavaConfig, rows: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with an image in the midst of them, int32 [rows, T], and the images, uint8 [rows, H, W, 3]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, image_id(config), (rows, text + config.processor.features_per_tile)).astype(np.int32)
    tokens[:, text // 2 : text // 2 + config.processor.features_per_tile] = IMAGE_TOKEN_ID
    side = config.vision.image_size
    return tokens, rng.integers(0, 256, (rows, side, side, 3), np.uint8)


def call(config: LlavaConfig, parameters: dict, tokens: np.ndarray, images: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that writes so many tokens of each row, by what `Llava.generate` runs on the device."""
    engine = Engine(abstract_params(config)[0], parameters, ends=())

    def run(limit: int) -> np.ndarray:
        jobs = [Job(row, image[None], limit, 0.0, 1.0, 0) for row, image in zip(tokens, images, strict=True)]
        answers = [Detokenizer(NoText(), (), (), limit) for _ in jobs]
        for _ in engine.run(jobs, answers):
            pass
        return np.array([answer.tokens for answer in answers])

    return run


def transformers_call(model, config: LlavaConfig, tokens: np.ndarray, images: np.ndarray) -> Callable:
    import torch

    ids = torch.from_numpy(np.where(tokens == IMAGE_TOKEN_ID, image_id(config), tokens).astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values(images)}

    @torch.inference_mode()
    def run(limit: int) -> np.ndarray:
        written = model.generate(**inputs, max_new_tokens=limit, do_sample=False, use_cache=True)
        return written[:, ids.shape[1] :].numpy()

    return run


def check(theirs: np.ndarray, ours: np.ndarray) -> None:
    if not np.array_equal(theirs, ours):
        raise SystemExit(f"the answers differ: in {(theirs != ours).sum()} of {ours.size} tokens")


def times(run: Callable, limit: int) -> tuple[float, float]:
    """Seconds of an answer of `limit` tokens, and of one of a single token."""
    marks = [time.perf_counter()]
    for tokens in (limit, 1):
        run(tokens)
        marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


if __name__ == "__main__":
    main()
