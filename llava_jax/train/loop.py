"""Trains the stages of a recipe one after the other, then writes the finished model."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from llava_jax import config
from llava_jax.errors import UserError
from llava_jax.models import lora
from llava_jax.models.llava import abstract_params, choose_attention
from llava_jax.parallel.processes import LOAD_TIMEOUT, WORK_TIMEOUT, allgather_object, should_stop
from llava_jax.train import output, preflight
from llava_jax.train.checkpoint import DamagedCheckpoint
from llava_jax.train.lock import lock_directory
from llava_jax.train.metrics import Log
from llava_jax.train.parameters import open_parameters
from llava_jax.train.setup import TrainContext, setup
from llava_jax.train.stage import StageTrainer
from llava_jax.train.stop import Stopped, StopSignal
from llava_jax.weights import peft, save_hf, save_native, save_peft


def train(recipe: config.Recipe) -> Path:
    """Sets a recipe up and trains it; see `train_stages`."""
    with lock_directory(output.directory(recipe)):
        return train_stages(setup(recipe))


def train_stages(context: TrainContext) -> Path:
    """Trains every stage, from where an earlier run was stopped, and returns the finished model's directory.

    The caller has locked the output directory. Raises Stopped after SIGTERM or SIGINT, and UserError for a recipe or
    data that cannot be used.
    """
    recipe = context.recipe
    output.remove_leftovers(context.directory)
    if allgather_object("the finished model", output.has_model(recipe))[0]:
        return context.directory / "model"
    print_setup(context)
    with jax.set_mesh(context.mesh), StopSignal() as stop:
        while True:
            try:
                preflight.check_stages(context)
                with contextlib.closing(Log(context.directory, recipe)) as log:
                    for name in recipe.stages:
                        train_stage(context, name, log, stop)
                return write_model(context)
            except DamagedCheckpoint as damaged:
                damaged.checkpoints.set_aside(damaged.step, damaged.problem)


def train_stage(context: TrainContext, name: str, log: Log, stop: StopSignal) -> None:
    """Trains one stage to its end, from its newest checkpoint if there is one."""
    with contextlib.closing(StageTrainer(context, name, log)) as trainer:
        if trainer.is_finished():
            return
        trainer.open()
        for step in range(trainer.start + 1, trainer.total_steps + 1):
            batch = next(trainer.data)
            stop.has_steps = True
            trainer.train_step(step, batch)
            stopping = should_stop(stop.number)
            trainer.report(step)
            trainer.save(step, stopping)
            if stopping:
                raise Stopped(f"stopped at step {step} of stage {name}; the same command goes on from there", stopping)
            trainer.evaluate(step)
        trainer.checkpoints.wait()
        stop.has_steps = False
        if stopping := max(allgather_object(f"stages.{name} is trained", stop.number)):
            raise Stopped(f"stopped at the end of stage {name}; the same command goes on from there", stopping)


def print_setup(context: TrainContext) -> None:
    """Prints which devices, dtype, attention, rematerialisation, adapters and quantised kernels the run uses."""
    if jax.process_index() == 0:
        mesh = " x ".join(f"{axis} {size}" for axis, size in context.mesh.shape.items())
        device = context.mesh.devices.flat[0]
        attention = choose_attention(context.recipe.model.attention, device.platform, context.model, context.dtype)
        remat = ", ".join(f"{stage.remat} ({name})" for name, stage in context.recipe.stages.items())
        print(f"training on {context.mesh.size} {device.device_kind}, {mesh}; {context.dtype}, attention {attention}, "
              f"remat {remat}", flush=True)
        if context.model.lora:
            shapes = {path: x.shape for path, x in abstract_params(context.model)[1].items()}
            print(lora.describe(context.model.lora, shapes), flush=True)
        if (kind := context.recipe.model.quantize) != "none":
            print(f"frozen kernels of the decoder's layers are stored in {kind}", flush=True)


def write_model(context: TrainContext) -> Path:
    """Writes the finished model, and returns its directory. Adapters are merged, and `adapter/` beside it has them.

    It is in Hugging Face's layout, or in the native one if that has no form for the model.
    """
    model, (parameters, trained) = context.model, open_parameters(context)
    allgather_object("the trained parameters are loaded", None, LOAD_TIMEOUT)
    if model.lora:
        base = context.recipe.model.llava or context.recipe.model.language
        adapted = model, parameters
        try:
            _write(context.directory / "adapter", lambda folder: save_peft(folder, *adapted, base, trained=trained))
        except UserError as error:  # the layout has no place for what was trained; the merged model has it
            if jax.process_index() == 0:
                print(f"{context.directory / 'adapter'}: not written: {error}", flush=True)
        model, parameters = peft.merge(model, parameters)
    save = save_native if preflight.hf_problem(context) else save_hf
    _write(context.directory / "model", lambda folder: save(
        folder, model, parameters, context.tokenizer_directory, dtype="float32"))
    return context.directory / "model"


def _write(target: Path, save: Callable[[Path], None]) -> None:
    """Writes a folder by `save`, also in a bucket, where config.json comes last. Replaces that of a killed run."""
    if jax.process_index() == 0 and target.exists():
        epath.Path(target).rmtree()
    allgather_object(f"{target.name} may be written", None)
    if isinstance(target, Path):
        save(target)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / target.name)
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((Path(folder) / target.name).iterdir(), key=lambda path: path.name == "config.json"):
                with path.open("rb") as file, (target / path.name).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 2**22)
    allgather_object(f"{target.name} is in the bucket", None, WORK_TIMEOUT)
