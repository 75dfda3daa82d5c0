"""A recipe, stage by stage: data in, steps, metrics, checkpoints; then the finished model in Hugging Face layout."""

import contextlib
import copy
import math
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.data.pipeline import Batches
from llava_jax.data.records import REASONS
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.models.attention import resolve
from llava_jax.models.llava import Parameters
from llava_jax.processes import group as processes
from llava_jax.processes.group import agree, gather, total
from llava_jax.training import output
from llava_jax.training.checkpoint import fingerprint
from llava_jax.training.metrics import Log, Progress, model_flops, peak_flops
from llava_jax.training.optimizer import make_optimizer, schedule, trainable_paths
from llava_jax.training.samples import Samples
from llava_jax.training.start import Run, begin, load_parameters
from llava_jax.training.step import init_state, make_loss, make_train_step
from llava_jax.weights import save_huggingface

AHEAD = 2
"""Steps that may wait on the devices. The loop runs ahead of them, and all that it ran ahead is done before a stop."""


class Stopped(Exception):
    """A signal asked the run to stop; everything up to the last step is on disk."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def train(recipe: config.Recipe) -> Path:
    """Runs every stage of a recipe, or goes on where an earlier run of it was stopped; returns the model's directory.

    Raises Stopped after SIGTERM or SIGINT, UserError for a recipe or data that cannot be used.
    """
    run = begin(recipe)
    if jax.process_index() == 0:
        mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        device = run.mesh.devices.flat[0]
        attention = resolve(recipe.model.attention, device.platform)
        remat = ", ".join(f"{stage.remat} ({name})" for name, stage in recipe.stages.items())
        print(f"training on {run.mesh.size} {device.device_kind}, {mesh}; {run.dtype}, attention {attention}, "
              f"remat {remat}", flush=True)
    with jax.set_mesh(run.mesh), StopSignal() as stop, contextlib.closing(Log(run.directory, recipe)) as log:
        for name in recipe.stages:
            train_stage(run, name, log, stop)
        return finish(run)


def finish(run: Run) -> Path:
    """Writes the model's directory, unless it is there."""
    target = run.directory / "model"
    # In a bucket a directory cannot appear at once, so the file that is copied last tells.
    local = isinstance(target, Path)
    if gather("the finished model", (target if local else target / "config.json").exists())[0]:
        return target
    parameters = load_parameters(run, lambda path: "float32", before=None)
    if local:
        save_huggingface(target, run.model, parameters, run.tokenizer_directory)
        return target
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(Path(folder) / "model", run.model, parameters, run.tokenizer_directory)
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((Path(folder) / "model").iterdir(), key=lambda path: path.name == "config.json"):
                with path.open("rb") as file, (target / path.name).open("wb") as there:
                    shutil.copyfileobj(file, there, 2**22)
    gather("the model is in the bucket", None, seconds=None)
    return target


def train_stage(run: Run, name: str, log: Log, stop: "StopSignal") -> None:
    """Trains one stage to its end, from its newest checkpoint if there is one."""
    recipe, stage = run.recipe, run.recipe.stages[name]
    checkpoints = run.checkpoints(name)
    latest = checkpoints.latest()
    meta = checkpoints.meta(latest) if latest is not None else {"skipped": {}}
    if meta.get("total_steps") == latest and latest is not None:
        checkpoints.close()
        return

    rates = trainable_paths(stage, list(run.shardings))
    parameters = load_parameters(run, lambda path: "float32" if path in rates else run.dtype, before=name)
    trainable = {path: x for path, x in parameters.items() if path in rates}
    frozen = {path: x for path, x in parameters.items() if path not in rates}
    del parameters
    mark = fingerprint(frozen)
    if meta.setdefault("frozen", mark) != mark:
        raise UserError(f"{checkpoints.directory}: made with other frozen parameters than the recipe's checkpoints "
                         "hold now; give another --output, or bring those checkpoints back")
    if "total_steps" not in meta:
        meta["total_steps"] = stage.steps or count_steps(run, stage)
    steps = meta["total_steps"]
    tx = make_optimizer(stage, rates, steps)
    state = init_state(tx, trainable, stage.optimizer.offload)
    del trainable
    batches = read_data(run, stage, stage.data.path)
    agree(f"stages.{name}", {"records": list(batches.order.mixture.counts), "steps": steps, "checkpoint": latest})
    data = iter(batches)
    log.rewind(list(recipe.stages), name, latest or 0)
    if latest is not None:
        state = checkpoints.restore(latest, state)
        data.set_state(meta["data"])
    train_step, loss = make_train_step(run.graphs[name], tx, state), make_loss(run.graphs[name])
    samples = Samples(run, stage) if recipe.sample_every else None
    factor = schedule(steps, stage.optimizer.warmup_ratio)
    peak_rate = max(rates.values())
    progress = Progress(name, steps, done=latest or 0)
    window = Window(run, {path.split("/")[0] for path in rates})
    try:
        for step in range(latest or 0, steps):
            batch = next(data)
            if step == 0:
                output.claim(recipe)
            state, metrics = train_step(state, frozen, on_devices(run, batch, stage.accumulate))
            window.add(metrics, batch)
            jax.block_until_ready(window.steps[-1 - AHEAD :][:1])
            done = step + 1
            progress.step()
            logs, saves = done % recipe.log_every == 0 or done == steps, checkpoints.due(done) or done == steps
            stopping = processes.stopping(stop.asked)
            if logs or saves or stopping:
                window.move_skipped(meta["skipped"])
            if logs:
                line = window.close() | {"learning_rate": peak_rate * float(factor(step)), "skipped": meta["skipped"]}
                progress.show(done, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s",
                              (steps - done) * line["seconds"] / line["steps"])
                if not math.isfinite(line["loss"]):
                    raise UserError(f"stages.{name}: the loss is {line['loss']} at step {done}; start again in "
                                     "another output directory with lower learning rates, or set optimizer.clip")
                log.write({"stage": name, "step": done} | line)
            if stage.data.validation and (done % recipe.validate_every == 0 or done == steps):
                mean = validate(run, stage, loss, state.trainable, frozen)
                log.write({"stage": name, "step": done, "validation_loss": mean})
                progress.note(f"{name} {done}/{steps}  validation loss {mean:.3f}")
            if samples and (done % recipe.sample_every == 0 or done == steps):
                answers = samples.answer(state.trainable | frozen)
                log.write({"stage": name, "step": done, "samples": answers})
                progress.note("\n".join(f"  {a['question']!r} -> {a['answer']!r} ({a['expected']!r})" for a in answers))
            if saves or stopping:
                meta["data"] = data.get_state()
                gather(f"stages.{name}, checkpoint of step {done}", None)
                checkpoints.save(done, state, copy.deepcopy(meta))
            if stopping and done < steps:
                raise Stopped(f"stopped at step {done} of stage {name}; the same command goes on from there", stopping)
    finally:
        progress.close()
        data.close()
        checkpoints.close()


def read_data(run: Run, stage: config.Stage, path: str, **changes) -> Batches:
    """This process's share of a stage's packed rows; `changes` replace options of `Batches`."""
    data, model = stage.data, run.model
    options = dict(
        rows=stage.rows, mixture=open_mixture(path, data.image_root), tokenizer=run.tokenizer,
        template=data.template or model.template, tokens_per_image=model.tokens_per_image,
        image_size=model.vision.image_size, image_mode=model.image_mode, row_length=data.row_length,
        images_per_row=data.images_per_row, bad_rows=data.bad_rows, workers=data.workers, seed=run.recipe.seed,
        process_index=jax.process_index(), process_count=jax.process_count())
    return Batches(**options | changes)


def count_steps(run: Run, stage: config.Stage) -> int:
    """Steps of the stage's epochs, from the number of packed rows that one pass over its data makes."""
    if jax.process_index() == 0:
        print(f"counting the packed rows of {stage.data.path}", flush=True)
    packed = sum(gather("the packed rows", read_data(run, stage, stage.data.path).count_rows(), seconds=3600))
    return max(1, math.floor(stage.epochs * packed / stage.rows))


def on_devices(run: Run, batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, jax.Array]:
    """A step's rows on the mesh, cut into micro-batches on a leading axis; what only the host reads stays there."""
    sharding = NamedSharding(run.mesh, P(None, ("replica", "fsdp")))
    names = ("tokens", "labels", "positions", "segment_ids", "images")
    return {name: jax.make_array_from_process_local_data(
                sharding, batch[name].reshape(micro_batches, -1, *batch[name].shape[1:])) for name in names}


def validate(run: Run, stage: config.Stage, loss: Callable, trainable: Parameters, frozen: Parameters) -> float:
    """Mean loss over all learned tokens of the stage's validation data."""
    sums = np.zeros(2)
    batch_size = stage.rows // stage.accumulate
    for batch in read_data(run, stage, stage.data.validation, rows=batch_size, shuffle=False, epochs=1):
        rows = jax.tree.map(lambda x: x[0], on_devices(run, batch, micro_batches=1))
        sums += [float(value) for value in loss(trainable, frozen, rows)]
    return float(sums[0] / max(sums[1], 1))


class Window:
    """The figures of the steps since the last line of metrics."""

    def __init__(self, run: Run, trained: set[str]):
        self.run, self.trained, self.skipped = run, trained, Counter()
        self.peak = peak_flops(run.mesh.devices.flat[0])
        self.open()

    def open(self) -> None:
        self.steps: list[dict[str, jax.Array]] = []
        self.counts = dict.fromkeys(("tokens", "images", "flops", "places", "slots"), 0)
        self.start = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
        """A step: the device's metrics, which are not waited for, and its rows."""
        images = int((batch["image_segment_ids"] > 0).sum())
        flops = model_flops(self.run.model, self.trained, batch["positions"], batch["segment_ids"], images)
        self.steps.append(metrics)
        self.skipped += Counter(dict(zip(REASONS, batch["skipped"].tolist(), strict=True)))
        tokens = int((batch["segment_ids"] > 0).sum())
        counts = {"tokens": tokens, "images": images, "flops": flops, "places": batch["tokens"].size,
                  "slots": batch["image_segment_ids"].size}
        for name, count in counts.items():
            self.counts[name] += count

    def move_skipped(self, sums: dict[str, int]) -> None:
        """Adds to `sums`, by reason, the rows that were skipped on the way to the steps so far, on all processes."""
        counts = total("skipped rows", [self.skipped.pop(reason, 0) for reason in REASONS])
        for reason, count in zip(REASONS, counts, strict=True):
            if count:
                sums[reason] = sums.get(reason, 0) + count

    def close(self) -> dict[str, float]:
        """The line: losses weighted by learned tokens, rates by wall-clock seconds; then a new window."""
        steps = jax.device_get(self.steps)
        seconds = time.perf_counter() - self.start
        learned = np.array([int(step["supervised_tokens"]) for step in steps])
        losses = np.array([float(step["loss"]) for step in steps])
        counts = dict(zip(self.counts, total("metrics", self.counts.values()), strict=True))
        flops = counts["flops"] / seconds
        line = {
            "loss": float((losses * learned).sum() / max(learned.sum(), 1)),
            "grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
            "steps": len(steps),
            "seconds": round(seconds, 4),
            "tokens": int(counts["tokens"]),
            "supervised_tokens": int(learned.sum()),
            "images": int(counts["images"]),
            "row_fill": round(counts["tokens"] / counts["places"], 4),
            "slot_fill": round(counts["images"] / counts["slots"], 4),
            "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "model_flops_per_second": flops,
            "mfu": round(flops / self.peak / self.run.mesh.size, 4) if self.peak else None,
        }
        self.open()
        return line


class StopSignal:
    """Within it, SIGTERM and SIGINT ask for a stop after the current step; a second one stops at once.

    `asked` is the signal's number, or 0.
    """

    def __enter__(self) -> "StopSignal":
        self.asked = 0
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
