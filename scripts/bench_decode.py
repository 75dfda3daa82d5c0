"""Measures how fast answers are written, in tokens per second, beside transformers' `generate` with its KV cache.

    python scripts/bench_decode.py [--sizes mini,100m] [--rows 1,8] [--tokens 128] [--rounds 7]

Both use the same random weights in float32 and all threads. Both read the same prompts of one image and some text, and
write the same number of greedy tokens. The script first checks that the tokens are the same, which also compiles. Then
it measures the two alternately in one process. `answer` counts the full call, with vision tower and prefill. `decode`
leaves out the time of an answer of one token. Figures are medians, with the lowest and the highest.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from bench_models import SIZES, count, image_id, machine, parameters_of, pixel_values, torch_model

from llava_jax.inference.detokenizer import Detokenizer
from llava_jax.inference.engine import Engine, Prompt
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.text.encode import IMAGE_TOKEN_ID


class NoText:
    """Replaces the tokenizer, which is not measured."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="mini,100m", help=f"model sizes, of {', '.join(SIZES)}")
    parser.add_argument("--rows", default="1,8", help="batch sizes")
    parser.add_argument("--text", type=int, default=60, help="number of a prompt's text tokens")
    parser.add_argument("--tokens", type=int, default=128, help="number of tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurements")
    args = parser.parse_args()
    print(machine())
    print("| parameters | rows | prompt | answer, transformers | here | ratio | decode, transformers | here | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        config = SIZES[size]
        theirs = torch_model(config).eval()
        parameters = parameters_of(theirs)
        for rows in map(int, args.rows.split(",")):
            tokens, tiles = prompts(config, rows, args.text)
            calls = (transformers_call(theirs, config, tokens, tiles), call(config, parameters, tokens, tiles))
            for max_new_tokens in (1, args.tokens):
                check(*(run(max_new_tokens) for run in calls))
            seconds = np.array([times(run, args.tokens) for _ in range(args.rounds) for run in calls])
            cells = [f"{count(parameters) / 1e6:.0f}M", str(rows), str(tokens.shape[1])]
            for written, spent in ((args.tokens, seconds[:, 0]), (args.tokens - 1, seconds[:, 0] - seconds[:, 1])):
                rates = rows * written / spent.reshape(-1, 2).T
                cells += [f"{np.median(rate):,.0f} ({rate.min():,.0f}-{rate.max():,.0f})" for rate in rates]
                cells.append(f"{np.median(rates[1] / rates[0]):.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def prompts(config: LlavaConfig, rows: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids with an image in the middle, int32 [rows, T], and the images' tiles, uint8 [rows, H, W, 3]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, image_id(config), (rows, text + config.processor.features_per_tile)).astype(np.int32)
    tokens[:, text // 2 : text // 2 + config.processor.features_per_tile] = IMAGE_TOKEN_ID
    side = config.vision.image_size
    return tokens, rng.integers(0, 256, (rows, side, side, 3), np.uint8)


def call(config: LlavaConfig, parameters: dict, tokens: np.ndarray, tiles: np.ndarray) -> Callable[[int], np.ndarray]:
    """Returns a function that writes some tokens of each row, by what `Llava.generate` runs on the device."""
    engine = Engine(abstract_params(config)[0], parameters, eos_ids=())

    def run(max_new_tokens: int) -> np.ndarray:
        layouts = [config.processor.layout()]
        prompts = [Prompt(row, tile[None], layouts, max_new_tokens, temperature=0.0, top_p=1.0, seed=0)
                   for row, tile in zip(tokens, tiles, strict=True)]
        answers = [Detokenizer(NoText(), (), (), max_new_tokens) for _ in prompts]
        for _ in engine.generate(prompts, answers):
            pass
        return np.array([answer.tokens for answer in answers])

    return run


def transformers_call(model, config: LlavaConfig, tokens: np.ndarray, tiles: np.ndarray) -> Callable:
    import torch

    ids = torch.from_numpy(np.where(tokens == IMAGE_TOKEN_ID, image_id(config), tokens).astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values(tiles)}

    @torch.inference_mode()
    def run(max_new_tokens: int) -> np.ndarray:
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        return written[:, ids.shape[1] :].numpy()

    return run


def check(theirs: np.ndarray, ours: np.ndarray) -> None:
    if not np.array_equal(theirs, ours):
        raise SystemExit(f"the answers differ in {(theirs != ours).sum()} of {ours.size} tokens")


def times(run: Callable, max_new_tokens: int) -> tuple[float, float]:
    """Returns the seconds of an answer of `max_new_tokens` tokens, and of an answer of one token."""
    marks = [time.perf_counter()]
    for tokens in (max_new_tokens, 1):
        run(tokens)
        marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


if __name__ == "__main__":
    main()
