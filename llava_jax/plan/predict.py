"""What a compiled step says about a run: time, memory, throughput, hours. Nothing here is measured on a TPU."""

from dataclasses import dataclass

import numpy as np

from llava_jax import config
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.plan.cycles import Profile, profile
from llava_jax.plan.data import Length
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import Slice
from llava_jax.train.metrics import model_flops
from llava_jax.train.optimizer import trainable_paths


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one device. The sum of the first three is the prediction; the rest are lower bounds."""

    cycles: float
    """the compiler's cycles over the clock"""
    kernels: float
    """Pallas kernels, by their FLOPs or bytes, whichever takes longer"""
    exposed: float
    """collectives that nothing hides, by their bytes"""
    mxu: float
    """all matrix products at the peak"""
    hbm: float
    ici: float
    dcn: float | None
    """None where no data sheet gives the network's rate"""

    @property
    def step(self) -> float:
        return self.cycles + self.kernels + self.exposed


@dataclass(frozen=True)
class Prediction:
    """A stage on a slice."""

    stage: str
    where: Slice
    memory: Memory
    rows: int
    """of a step"""
    tokens: int
    """places of a step's rows, all taken to hold tokens"""
    images: int
    """image slots of a step, all taken to hold images"""
    model_flops: float
    """of a step, by formula"""
    compile_seconds: float
    profile: Profile | None
    """None where the program does not fit, so that the compiler gives none"""
    times: Times | None
    length: Length | None
    """of the stage; None if neither recipe nor data tell"""

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in the predicted time."""
        return self.model_flops / self.times.step / (self.where.chip.flops * self.where.chips)

    @property
    def hours(self) -> float | None:
        return self.length.steps * self.times.step / 3600 if self.length and self.times else None

    def per_chip(self, count: int) -> float:
        """A step's tokens or images per second and chip."""
        return count / self.times.step / self.where.chips


def predict(recipe: config.Recipe, name: str, where: Slice, model: LlavaConfig, program: Program,
            length: Length | None) -> Prediction:
    """Reads a compiled step of the stage `name`."""
    stage = recipe.stages[name]
    rows, data = stage.batch_size, stage.data
    found = profile(program.hlo, program.slices) if program.hlo else None
    return Prediction(name, where, program.memory, rows, rows * data.sequence_length, rows * data.tiles_per_sequence,
                      stage_flops(stage, model), program.seconds, found, times(found, where) if found else None, length)


def stage_flops(stage: config.Stage, model: LlavaConfig) -> float:
    """Model FLOPs of a step by formula, each row one conversation as long as it and all image slots taken."""
    data = stage.data
    positions = np.broadcast_to(np.arange(data.sequence_length), (stage.batch_size, data.sequence_length))
    trained = {path.split("/")[0] for path in trainable_paths(stage, list(abstract_params(model)[1]))}
    return model_flops(model, trained, positions, np.ones_like(positions), stage.batch_size * data.tiles_per_sequence)


def times(found: Profile, where: Slice) -> Times:
    """The seconds of a profile on a slice's devices."""
    chip = where.chip
    flops, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    ici, dcn = chip.ici / chip.devices, chip.dcn and chip.dcn / chip.devices
    kernels = sum(op.times * max(op.flops / flops, op.bytes / bandwidth) for op in found.kernels)
    exposed = 0.0
    for op in found.exposed:
        for each in op.collectives:
            exposed += op.times * max(each.ici_bytes / ici, each.dcn_bytes / dcn if dcn else 0.0)
    return Times(found.cycles / chip.clock, kernels, exposed, found.flops / flops, found.bytes / bandwidth,
                 found.ici_bytes / ici, found.dcn_bytes / dcn if dcn else None)
