"""Compares the train step with its equivalent in transformers and PyTorch, with equal random weights and rows.

    python scripts/bench_train.py [--sizes 30m,100m] [--rounds 7]        on a CPU, float32
    python scripts/bench_train.py --packing                              packed rows against padded batches
    python scripts/bench_train.py --device gpu [--sizes 7b] [--layers 16]  on a GPU, bfloat16, both stages

Ours is the step that `llava_jax.train` runs. Theirs is LlavaForConditionalGeneration (sdpa) with fused AdamW, the
vision tower without gradients. Stage 2 trains projector and decoder, stage 1 the projector alone. Before anything is
timed, the losses of three steps must agree in float32 within 1e-4 (on a GPU, where the large model is too large for
both, those of the size `mini`). On a CPU the two take turns in one process with all threads; on a GPU one follows the
other, both recompute activations (`full` here, gradient checkpointing there). Compilation is left out. Figures are
medians, with the lowest and the highest. Tokens are all those of the rows, visual ones included.
"""

import argparse
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU both need room in turn

import jax
import numpy as np
from bench_models import SIZES, count, image_id, machine, parameters_of, pixel_values, torch_model
from bench_packing import grouped_batches, made_up

from llava_jax.config import Data, Mesh, Optimizer, Stage
from llava_jax.data.packing import pack
from llava_jax.data.workers import keep_freed_memory
from llava_jax.models.llava import LlavaConfig, Parameters, abstract_params, choose_attention, init_params
from llava_jax.parallel.sharding import make_mesh, parameter_shardings
from llava_jax.text.encode import IGNORE, IMAGE_TOKEN_ID
from llava_jax.train.metrics import model_flops, peak_flops
from llava_jax.train.optimizer import make_optimizer, trainable_paths
from llava_jax.train.step import init_state, make_train_step

Batch = dict[str, np.ndarray]
"""Rows in the format of train/step.py, without the axis of micro-batches."""

StepFunction = Callable[[Batch], float]
"""Runs one step on a batch and returns its loss."""

RATE = 1e-4
PROMPT_TOKENS = 36
"""Number of unsupervised text tokens of a record."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--sizes", default="",
                        help=f"model sizes, of {', '.join(SIZES)}; default: 30m,100m on a CPU, 7b on a GPU")
    parser.add_argument("--rows", type=int, default=0, help="rows per step; default: 4, on a GPU 8")
    parser.add_argument("--text", type=int, default=0, help="text tokens of a row; default: 368, on a GPU 1472")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers in stage 2; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--packing", action="store_true", help="compare packed rows with padded batches")
    args = parser.parse_args()
    gpu = args.device == "gpu"
    if not gpu:
        keep_freed_memory()  # as `python -m llava_jax.train` does, here for both
    print(machine(), flush=True)
    if args.packing:
        for size in (args.sizes or "30m").split(","):
            packing(SIZES[size], args.rounds)
        return
    print("| parameters | stage | decoder layers | step | transformers, tokens/s | here | ratio | MFU here |")
    print("|---|---|---|---|---|---|---|---|")
    for size in (args.sizes or ("7b" if gpu else "30m,100m")).split(","):
        for stage in (1, 2) if gpu else (2,):
            config = SIZES[size]
            if stage == 2 and args.layers:
                config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=args.layers))
            batch = full_rows(config, args.rows or (8 if gpu else 4), args.text or (1472 if gpu else 368))
            if gpu:
                agree(SIZES["mini"], full_rows(SIZES["mini"], 2, 64), stage)
                seconds = np.array([apart(make, config, stage, batch, args.rounds) for make in (theirs, ours)])
            else:
                runs = agree(config, batch, stage)
                seconds = in_turn(runs, [[batch], [batch]], args.rounds)
            show(config, stage, batch, seconds)


def show(config: LlavaConfig, stage: int, batch: Batch, seconds: np.ndarray) -> None:
    rates = batch["tokens"].size / seconds
    cells = [f"{count(abstract_params(config)[1]) / 1e6:,.0f}M", str(stage), str(config.text.num_layers),
             " x ".join(map(str, batch["tokens"].shape)), *map(spread, rates), f"{np.median(rates[1] / rates[0]):.2f}"]
    peak = peak_flops(jax.devices()[0])
    trained = {"projector"} if stage == 1 else {"projector", "decoder"}
    flops = model_flops(config, trained, batch["positions"], batch["segment_ids"], len(batch["tiles"]))
    cells.append(f"{flops / np.median(seconds[1]) / peak:.1%}" if peak else
                 f"{flops / np.median(seconds[1]) / 1e9:.0f} GFLOP/s")
    print(f"| {' | '.join(cells)} |", flush=True)


def spread(rates: np.ndarray) -> str:
    return f"{np.median(rates):,.0f} ({rates.min():,.0f}-{rates.max():,.0f})"


def full_rows(config: LlavaConfig, rows: int, text: int) -> Batch:
    """Makes rows without padding: one conversation with one image each."""
    length = text + config.processor.features_per_tile
    return collate(config, [[(length, 1)]] * rows, length, 1)


def collate(config: LlavaConfig, rows: Sequence[Sequence[tuple[int, int]]], length: int, slots: int) -> Batch:
    """Makes random rows of conversations (tokens, images), supervised after their images and PROMPT_TOKENS."""
    rng, side = np.random.default_rng(0), config.vision.image_size
    shape = len(rows), length
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["visual_index"] = np.full(shape, -1, np.int32)
    batch["labels"] = np.full(shape, IGNORE, np.int32)
    batch["tiles"] = rng.integers(0, 256, (len(rows), slots, side, side, 3), np.uint8)
    batch["tile_segment_ids"] = np.zeros((len(rows), slots), np.int32)
    for row, conversations in enumerate(rows):
        start = image = 0
        for number, (size, images) in enumerate(conversations, 1):
            at = slice(start, start + size)
            tokens = rng.integers(3, image_id(config), size)
            per_tile = config.processor.features_per_tile
            visual = images * per_tile
            tokens[2 : 2 + visual] = IMAGE_TOKEN_ID
            batch["visual_index"][row, start + 2 : start + 2 + visual] = image * per_tile + np.arange(visual)
            learned = min(PROMPT_TOKENS + visual, size - 1)
            batch["tokens"][row, at], batch["positions"][row, at] = tokens, np.arange(size)
            batch["labels"][row, start + learned : start + size] = tokens[learned:]
            batch["segment_ids"][row, at] = number
            batch["tile_segment_ids"][row, image : image + images] = number
            start, image = start + size, image + images
    return batch


def ours(config: LlavaConfig, stage: int, dtype: str, parameters: Parameters | None = None) -> StepFunction:
    """Returns the step that `llava_jax.train` runs, on the first device. The default is random weights."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    platform = mesh.devices.flat[0].platform
    remat = "none" if platform == "cpu" else "full"
    graph, shapes = abstract_params(config, dtype, choose_attention("auto", platform, config, dtype), remat)
    shardings = parameter_shardings({path: x.shape for path, x in shapes.items()}, mesh)
    recipe = stage_of(stage)
    rates = trainable_paths(recipe, list(shapes))
    tx = make_optimizer(recipe, rates, 10**9)
    dtypes = {path: "float32" if path in rates else dtype for path in shapes}
    if parameters is None:
        make = lambda: {path: x.astype(dtypes[path]) for path, x in init_params(config).items()}  # noqa: E731
        parameters = jax.jit(make, out_shardings=shardings)()
    else:
        parameters = {path: jax.device_put(x.astype(dtypes[path]), shardings[path]) for path, x in parameters.items()}
    frozen = {path: x for path, x in parameters.items() if path not in rates}
    with jax.set_mesh(mesh):
        state = init_state(tx, {path: parameters[path] for path in rates})
        step = make_train_step(graph, tx, state)

    def run(batch: Batch) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, jax.device_put({name: x[None] for name, x in batch.items()}))
        return float(metrics["loss"])

    return run


def stage_of(stage: int) -> Stage:
    rates = (("projector/.*", RATE), ("decoder/.*", RATE if stage == 2 else None), ("vision/.*", None))
    return Stage(learning_rates=rates, data=Data(path=""), optimizer=Optimizer(warmup_ratio=0))


def theirs(config: LlavaConfig, stage: int, dtype: str, model=None) -> StepFunction:
    """Returns a step of transformers' model in a plain loop of PyTorch. The default is a new model."""
    import torch

    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    if model is None:
        model = torch_model(config, device, dtype)
    model = model.to(device).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_("vision_tower" not in name and (stage == 2 or "multi_modal_projector" in name))
    if device != "cpu":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)

    def run(batch: Batch) -> float:
        loss = model(**{name: x.to(device) for name, x in hub_batch(config, batch, model.dtype).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def hub_batch(config: LlavaConfig, batch: Batch, dtype) -> dict:
    """Converts rows of one conversation each to the inputs of transformers."""
    import torch

    tokens = np.where(batch["tokens"] == IMAGE_TOKEN_ID, image_id(config), batch["tokens"])
    inputs = {"input_ids": tokens, "labels": batch["labels"], "attention_mask": batch["segment_ids"]}
    inputs = {name: torch.from_numpy(x.astype(np.int64)) for name, x in inputs.items()}
    used = batch["tile_segment_ids"] > 0
    if used.any():
        inputs["pixel_values"] = pixel_values(batch["tiles"][used]).to(dtype)
    return inputs


def agree(config: LlavaConfig, batch: Batch, stage: int) -> tuple[StepFunction, StepFunction]:
    """Returns (theirs, ours) with equal weights in float32, after three steps with equal losses."""
    model = torch_model(config)
    parameters = parameters_of(model)
    runs = theirs(config, stage, "float32", model), ours(config, stage, "float32", parameters)
    for step in range(3):
        losses = [run(batch) for run in runs]
        if not abs(losses[0] - losses[1]) <= 1e-4:
            raise SystemExit(f"step {step}: the losses differ: {losses[0]:.6f} there, {losses[1]:.6f} here")
    return runs


def in_turn(runs: tuple[StepFunction, StepFunction], batches: Sequence[Sequence[Batch]], rounds: int) -> np.ndarray:
    """Returns the seconds of both steps on their batches, [2, rounds], measured alternately."""
    return np.array([[timed(run, own) for run, own in zip(runs, batches, strict=True)] for _ in range(rounds)]).T


def apart(make: Callable, config: LlavaConfig, stage: int, batch: Batch, rounds: int) -> list[float]:
    """Returns the seconds of steps of one framework alone, and frees the device's memory."""
    run = make(config, stage, "float32" if jax.devices()[0].platform == "cpu" else "bfloat16")
    timed(run, [batch] * 2)
    seconds = [timed(run, [batch]) for _ in range(rounds)]
    del run
    gc.collect()
    import torch
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds


def timed(run: StepFunction, batches: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    return time.perf_counter() - start


def packing(config: LlavaConfig, rounds: int, batch_size: int = 16, batches: int = 8) -> None:
    """Compares supervised tokens per second on the lengths of LLaVA-1.5's mix, scaled as this model's images are.

    The original groups batches by modality and length, and pads them to the longest. Here the same records are packed.
    A step has as many positions as an average batch of the original.
    """
    rng = np.random.default_rng(0)
    tokens, words, images = made_up(rng, 0.02)
    scale = config.processor.features_per_tile / 576
    tokens = np.maximum((tokens * scale).astype(int), PROMPT_TOKENS + 2 + images * config.processor.features_per_tile)
    groups = [group for group in grouped_batches(words, images > 0, rng) if len(group) == batch_size]
    groups = [groups[i] for i in rng.permutation(len(groups))[:batches]]
    records = np.concatenate(groups)
    padded = [collate(config, [[(tokens[i], images[i])] for i in group], tokens[group].max(), 1) for group in groups]

    length, slots = int(2560 * scale), 3
    packed = pack(tokens[records], images[records], length, slots)
    rows = [[(tokens[records[i]], images[records[i]]) for i in row] for row in packed]
    per_step = max(round(sum(batch["tokens"].size for batch in padded) / batches / length), 1)
    rows += [[]] * (-len(rows) % per_step)
    steps = [collate(config, rows[at : at + per_step], length, slots) for at in range(0, len(rows), per_step)]

    runs = agree(config, padded[0], 2)
    for run, own in zip(runs, (padded, steps), strict=True):
        timed(run, own[:2])
    learned = [sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in own) for own in (padded, steps)]
    assert learned[0] == learned[1], learned
    fill = [sum((batch["segment_ids"] > 0).sum() for batch in own) / sum(batch["tokens"].size for batch in own)
            for own in (padded, steps)]
    seconds = in_turn(runs, (padded, steps), rounds)
    rates = learned[0] / seconds
    print(f"{count(abstract_params(config)[1]) / 1e6:.0f}M parameters, {len(records)} records, "
          f"{learned[0]:,} supervised tokens\n"
          f"transformers: {len(padded)} padded batches, {fill[0]:.0%} tokens, {spread(rates[0])} supervised tokens/s\n"
          f"here: {len(steps)} steps of {per_step} packed rows of {length}, {fill[1]:.0%} tokens, "
          f"{spread(rates[1])} supervised tokens/s\nratio {np.median(rates[1] / rates[0]):.2f}", flush=True)


if __name__ == "__main__":
    main()
