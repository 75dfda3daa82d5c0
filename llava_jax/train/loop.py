"""A recipe, stage by stage: data in, steps, metrics, checkpoints; then the finished model in Hugging Face layout."""

import contextlib
import copy
import math
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import config
from llava_jax.cli import STOPPED
from llava_jax.data.examples import DataSpec
from llava_jax.data.pipeline import Batches
from llava_jax.data.records import REASONS
from llava_jax.data.sources import open_mixture
from llava_jax.errors import UserError
from llava_jax.models.llava import LlavaConfig, Parameters, choose_attention
from llava_jax.parallel import processes
from llava_jax.parallel.processes import (
    LOAD_TIMEOUT,
    WORK_TIMEOUT,
    allgather_object,
    allreduce_sum,
    assert_equal_across_processes,
)
from llava_jax.text import templates
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train import output, preflight
from llava_jax.train.checkpoint import DIVERGED, Checkpoints, DamagedCheckpoint
from llava_jax.train.digests import check_finite, digests, fingerprint
from llava_jax.train.inputs import check_inputs, inputs, write_inputs
from llava_jax.train.lock import lock_directory
from llava_jax.train.metrics import Log, Progress, model_flops, peak_flops
from llava_jax.train.optimizer import make_optimizer, schedule, trainable_paths
from llava_jax.train.setup import TrainContext, load_parameters, setup
from llava_jax.train.step import init_state, make_loss, make_train_step
from llava_jax.train.validation import Evaluations
from llava_jax.weights import save_hf

MAX_STEPS_IN_FLIGHT = 2
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
    run = setup(recipe)
    with lock_directory(run.directory):
        output.remove_leftovers(run.directory)
        output.check_recipe(recipe)  # again: nobody changes the directory from here on
        if allgather_object("the finished model", output.has_model(recipe))[0]:
            return run.directory / "model"
        announce(run)
        with jax.set_mesh(run.mesh), StopSignal() as stop:
            while True:
                try:
                    check_stages(run)
                    with contextlib.closing(Log(run.directory, recipe)) as log:
                        for name in recipe.stages:
                            train_stage(run, name, log, stop)
                    return finish(run)
                except DamagedCheckpoint as damaged:
                    damaged.checkpoints.set_aside(damaged.step, damaged.problem)


def announce(run: TrainContext) -> None:
    """Prints what trains on what."""
    if jax.process_index() == 0:
        recipe = run.recipe
        mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        device = run.mesh.devices.flat[0]
        attention = choose_attention(recipe.model.attention, device.platform, run.model, run.dtype)
        remat = ", ".join(f"{stage.remat} ({name})" for name, stage in recipe.stages.items())
        print(f"training on {run.mesh.size} {device.device_kind}, {mesh}; {run.dtype}, attention {attention}, "
              f"remat {remat}", flush=True)


def check_stages(run: TrainContext) -> None:
    """Opens and tries what every stage will need that is not finished yet. Raises UserError for a mistake."""
    preflight.check_run(run)
    for name, stage in run.recipe.stages.items():
        with contextlib.closing(run.checkpoints(name)) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None and checkpoints.meta(latest)["total_steps"] == latest:
                continue
        preflight.check_image_root(name, stage.data)
        preflight.check_training_data(read_data(run, stage, stage.data.path))
        if stage.data.validation and latest is None:
            preflight.check_validation_data(read_validation(run, stage))


def finish(run: TrainContext) -> Path:
    """Writes the model's directory."""
    target = run.directory / "model"
    parameters = load_parameters(run, lambda path: "float32", before=None)
    allgather_object("the trained parameters are loaded", None, LOAD_TIMEOUT)
    check_finite(digests(parameters), f"{target}: not written", "the checkpoints that the recipe starts from hold them")
    if isinstance(target, Path):
        save_hf(target, run.model, parameters, run.tokenizer_directory)
        return target
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", run.model, parameters, run.tokenizer_directory)
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((Path(folder) / "model").iterdir(), key=lambda path: path.name == "config.json"):
                with path.open("rb") as file, (target / path.name).open("wb") as there:
                    shutil.copyfileobj(file, there, 2**22)
    allgather_object("the model is in the bucket", None, WORK_TIMEOUT)
    return target


def train_stage(run: TrainContext, name: str, log: Log, stop: "StopSignal") -> None:
    """Trains one stage to its end, from its newest checkpoint if there is one."""
    recipe, stage = run.recipe, run.recipe.stages[name]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(run.checkpoints(name)))
        latest = checkpoints.latest()
        meta = checkpoints.meta(latest) if latest is not None else {"skipped": {}}
        if "total_steps" not in meta:
            meta["total_steps"] = stage.steps or count_steps(run, stage)
        steps, start = meta["total_steps"], latest or 0
        evaluations = stack.enter_context(contextlib.closing(Evaluations(
            run, name, steps, log, lambda batch: shard_batch(run, batch, 1))))
        missing = evaluations.missing(start)
        if start == steps and not missing:
            return

        if stage.data.validation:
            evaluations.batches = read_validation(run, stage, keep=True)
        rates = trainable_paths(stage, list(run.shardings))
        trainable, frozen = split_parameters(run, name, rates, meta, checkpoints)
        tx = make_optimizer(stage, rates, steps)
        state = init_state(tx, trainable, stage.optimizer.offload)
        del trainable
        batches = read_data(run, stage, stage.data.path)
        found = inputs(run, batches)
        assert_equal_across_processes(f"stages.{name}", {"steps": steps, "checkpoint": latest, **found})
        data = stack.enter_context(contextlib.closing(iter(batches)))
        if latest is not None:
            check_inputs(run, name, found)
            state = checkpoints.restore(latest, state)
            data.set_state(meta["data"])
        log.rewind(name, start)
        train_step, loss = make_train_step(run.graphs[name], tx, state), make_loss(run.graphs[name])
        factor = schedule(steps, stage.optimizer.warmup_ratio)
        peak_rate = max(rates.values())
        progress = stack.enter_context(contextlib.closing(Progress(name, steps, done=start)))
        window = MetricsWindow(run, {path.split("/")[0] for path in rates})
        evaluations.write(missing, start, loss, state.trainable, frozen, progress)
        for step in range(start, steps):
            batch = next(data)
            stop.holding = True
            if step == start:
                output.write_recipe(recipe)
                write_inputs(run, name, found)
            rows = shard_batch(run, batch, stage.gradient_accumulation)
            state, metrics = train_step(state, frozen, rows)
            window.add(metrics, batch)
            jax.block_until_ready(window.steps[-1 - MAX_STEPS_IN_FLIGHT :][:1])
            done = step + 1
            progress.step()
            checkpoints.check()
            logs, saves = done % recipe.log_every == 0 or done == steps, checkpoints.due(done) or done == steps
            stopping = processes.should_stop(stop.asked)
            if logs or saves or stopping:
                window.move_skipped(meta["skipped"])
            if logs:
                line = window.close() | {"learning_rate": peak_rate * float(factor(step)), "skipped": meta["skipped"]}
                progress.show(done, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s",
                              (steps - done) * line["seconds"] / line["steps"])
                for figure in ("loss", "grad_norm"):
                    require_finite(name, figure, line[figure], f"at step {done}")
                log.write({"stage": name, "step": done} | line)
            if done == steps:  # the loss of a step is that before its update
                after = loss(state.trainable, frozen, jax.tree.map(lambda x: x[0], rows))[0]
                require_finite(name, "loss", float(after), f"after the last step, {steps}")
            if saves or stopping:  # before anything else that may fail
                meta["data"] = data.get_state()
                allgather_object(f"stages.{name}, checkpoint of step {done}", None)
                checkpoints.save(done, state, copy.deepcopy(meta))
            if stopping:
                raise Stopped(f"stopped at step {done} of stage {name}; the same command goes on from there", stopping)
            evaluations.write(evaluations.due(done), done, loss, state.trainable, frozen, progress)
        checkpoints.wait()
        stop.holding = False
        if asked := max(allgather_object(f"stages.{name} is trained", stop.asked)):
            raise Stopped(f"stopped at the end of stage {name}; the same command goes on from there", asked)


def split_parameters(run: TrainContext, name: str, rates: dict[str, float], meta: dict, checkpoints: Checkpoints
                     ) -> tuple[Parameters, Parameters]:
    """The parameters with which a stage starts: those that it trains, and the frozen ones.

    Raises UserError if they are not finite, or if `meta` names other frozen ones.
    """
    parameters = load_parameters(run, lambda path: "float32" if path in rates else run.dtype, before=name)
    allgather_object(f"stages.{name}: the parameters are loaded", None, LOAD_TIMEOUT)  # names who is late
    trainable = {path: x for path, x in parameters.items() if path in rates}
    frozen = {path: x for path, x in parameters.items() if path not in rates}
    found = digests(frozen)
    check_finite(found | digests(trainable), f"stages.{name}", "the checkpoints that the recipe starts from hold them")
    mark = fingerprint(found)
    if meta.setdefault("frozen", mark) != mark:
        raise UserError(f"{checkpoints.directory}: made with other frozen parameters than the recipe's checkpoints "
                        "hold now; give another --output, or bring those checkpoints back")
    return trainable, frozen


def require_finite(name: str, figure: str, value: float, when: str) -> None:
    """Raises UserError for a figure that is not finite."""
    if not math.isfinite(value):
        raise UserError(f"stages.{name}: the {figure} is {value} {when}; {DIVERGED}")


def read_data(run: TrainContext, stage: config.Stage, path: str, **changes) -> Batches:
    """This process's share of a stage's packed sequences; `changes` replace options of `Batches`."""
    spec = data_spec(stage.data, run.model, run.tokenizer, path)
    options = dict(batch_size=stage.batch_size, workers=stage.data.workers, seed=run.recipe.seed,
                   process_index=jax.process_index(), process_count=jax.process_count())
    return Batches(spec, **options | changes)


def data_spec(data: config.Data, model: LlavaConfig, tokenizer: Tokenizer, path: str) -> DataSpec:
    """Says how the records of `path` become what a stage's model reads."""
    return DataSpec(
        mixture=open_mixture(path, data.image_root), tokenizer=tokenizer,
        template=templates.get(data.template or model.template),
        processor=model.with_image_mode(data.image_mode).processor,
        sequence_length=data.sequence_length, tiles_per_sequence=data.tiles_per_sequence,
        context=model.text.max_length, exif=data.exif, max_pixels=data.max_pixels, bad_rows=data.bad_rows)


def read_validation(run: TrainContext, stage: config.Stage, keep: bool = False) -> Batches:
    """The validation data of a stage, in batches of the size of a micro-batch."""
    return read_data(run, stage, stage.data.validation,
                     batch_size=stage.batch_size // stage.gradient_accumulation, shuffle=False,
                     epochs=1, keep=keep)


def count_steps(run: TrainContext, stage: config.Stage) -> int:
    """Steps of the stage's epochs, from the number of packed rows that one pass over its data makes."""
    if jax.process_index() == 0:
        print(f"counting the packed rows of {stage.data.path}", flush=True)
    packed = sum(allgather_object("the packed rows", read_data(run, stage, stage.data.path).count_rows(), seconds=3600))
    return max(1, math.floor(stage.epochs * packed / stage.batch_size))


def shard_batch(run: TrainContext, batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, jax.Array]:
    """A step's rows on the mesh, cut into micro-batches on a leading axis; what only the host reads stays there."""
    sharding = NamedSharding(run.mesh, P(None, ("data", "fsdp")))
    names = ("tokens", "labels", "positions", "segment_ids", "tiles", "visual_index")
    return {name: jax.make_array_from_process_local_data(
                sharding, batch[name].reshape(micro_batches, -1, *batch[name].shape[1:])) for name in names}


class MetricsWindow:
    """The figures of the steps since the last line of metrics."""

    def __init__(self, run: TrainContext, trained: set[str]):
        self.run, self.trained, self.skipped = run, trained, Counter()
        self.peak = peak_flops(run.mesh.devices.flat[0])
        self.open()

    def open(self) -> None:
        self.steps: list[dict[str, jax.Array]] = []
        self.counts = dict.fromkeys(("tokens", "images", "flops", "places", "slots"), 0)
        self.start = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
        """A step: the device's metrics, which are not waited for, and its rows."""
        images = int((batch["tile_segment_ids"] > 0).sum())
        flops = model_flops(self.run.model, self.trained, batch["positions"], batch["segment_ids"], images)
        self.steps.append(metrics)
        self.skipped += Counter(dict(zip(REASONS, batch["skipped"].tolist(), strict=True)))
        tokens = int((batch["segment_ids"] > 0).sum())
        counts = {"tokens": tokens, "images": images, "flops": flops, "places": batch["tokens"].size,
                  "slots": batch["tile_segment_ids"].size}
        for name, count in counts.items():
            self.counts[name] += count

    def move_skipped(self, sums: dict[str, int]) -> None:
        """Adds to `sums`, by reason, the rows that were skipped on the way to the steps so far, on all processes."""
        counts = allreduce_sum("skipped rows", [self.skipped.pop(reason, 0) for reason in REASONS])
        for reason, count in zip(REASONS, counts, strict=True):
            if count:
                sums[reason] = sums.get(reason, 0) + count

    def close(self) -> dict[str, float]:
        """The line: losses weighted by learned tokens, rates by wall-clock seconds; then a new window."""
        steps = jax.device_get(self.steps)
        seconds = time.perf_counter() - self.start
        learned = np.array([int(step["supervised_tokens"]) for step in steps])
        losses = np.array([float(step["loss"]) for step in steps])
        counts = dict(zip(self.counts, allreduce_sum("metrics", self.counts.values()), strict=True))
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
    """Within it, SIGTERM and SIGINT ask for a stop after the current step; without one they act as they would outside.

    A further SIGTERM asks for nothing new. Ctrl-C after that stops at once, and the last checkpoint stands.

    Attributes:
      asked: the number of the signal, or 0.
      holding: whether there are steps to be saved before a stop.
    """

    def __enter__(self) -> "StopSignal":
        self.asked, self.holding = 0, False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if not self.holding:
            if callable(self.before[number]):
                self.before[number](number, frame)
            raise SystemExit(STOPPED)
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number
