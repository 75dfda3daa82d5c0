"""Predicts time, memory, throughput and hours of a stage from its compiled step. Nothing is measured on a TPU."""

from dataclasses import dataclass

import numpy as np

from llava_jax import config
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.plan.cycles import Profile, profile
from llava_jax.plan.data import Length
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import Slice
from llava_jax.train.metrics import model_flops, trained_parts
from llava_jax.train.optimizer import trainable_paths


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one device: three parts of the prediction, and four lower bounds."""

    cycles: float
    """Cycles of the compiler over the clock."""
    kernels: float
    """Pallas kernels, by FLOPs or bytes, whichever takes longer."""
    exposed: float
    """Collectives without overlap, by their bytes."""
    mxu: float
    """Lower bound: matrix products at the peak rate."""
    hbm: float
    """Lower bound: bytes of HBM."""
    ici: float
    """Lower bound: bytes within a slice."""
    dcn: float | None
    """Lower bound: bytes between slices; None if no data sheet gives the rate of the network."""

    @property
    def step(self) -> float:
        """Predicted seconds of a step."""
        return self.cycles + self.kernels + self.exposed


@dataclass(frozen=True)
class Prediction:
    """Predicts a stage on a slice."""

    stage: str
    where: Slice
    memory: Memory
    rows: int
    """Number of packed sequences of a step."""
    tokens: int
    """Number of tokens of a step if all sequences are full."""
    images: int
    """Number of tiles of a step if all slots of tiles are full."""
    parameters: int
    """Number of parameters of the model, adapters included."""
    trained_parameters: int
    """Number of parameters that the stage trains."""
    model_flops: float
    """Model FLOPs of a step by formula."""
    compile_seconds: float
    profile: Profile | None
    """Profile of the program; None if it does not fit, because then the compiler gives no program."""
    times: Times | None
    length: Length | None
    """Length of the stage; None if neither recipe nor data give it."""

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak FLOPs of the chips in the predicted time."""
        return self.model_flops / self.times.step / (self.where.chip.flops * self.where.chips)

    @property
    def hours(self) -> float | None:
        return self.length.steps * self.times.step / 3600 if self.length and self.times else None

    def per_chip(self, count: int) -> float:
        """Returns a count of a step, such as its tokens, per second and chip."""
        return count / self.times.step / self.where.chips


def predict(recipe: config.Recipe, name: str, where: Slice, model: LlavaConfig, program: Program,
            length: Length | None) -> Prediction:
    """Predicts the stage `name` from its compiled step."""
    stage = recipe.stages[name]
    rows, data = stage.batch_size, stage.data
    found = profile(program.hlo, program.slices) if program.hlo else None
    sizes = {path: x.size for path, x in abstract_params(model)[1].items()}
    return Prediction(name, where, program.memory, rows, rows * data.sequence_length, rows * data.tiles_per_sequence,
                      sum(sizes.values()), sum(sizes[path] for path in trainable_paths(stage, list(sizes))),
                      stage_flops(stage, model), program.seconds, found, times(found, where) if found else None, length)


def stage_flops(stage: config.Stage, model: LlavaConfig) -> float:
    """Returns the model FLOPs of a step, if every sequence is one conversation and all image slots are full."""
    data = stage.data
    positions = np.broadcast_to(np.arange(data.sequence_length), (stage.batch_size, data.sequence_length))
    trained = trained_parts(trainable_paths(stage, list(abstract_params(model)[1])))
    return model_flops(model, trained, positions, np.ones_like(positions), stage.batch_size * data.tiles_per_sequence)


def times(found: Profile, where: Slice) -> Times:
    """Returns the seconds of a profile on the devices of a slice."""
    chip = where.chip
    flops, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    ici, dcn = chip.ici / chip.devices, chip.dcn and chip.dcn / chip.devices
    kernels = sum(op.times * max(op.flops / flops, op.bytes / bandwidth) for op in found.kernels)
    exposed = sum(op.times * max(collective.ici_bytes / ici, collective.dcn_bytes / dcn if dcn else 0.0)
                  for op in found.exposed for collective in op.collectives)
    return Times(found.cycles / chip.clock, kernels, exposed, found.flops / flops, found.bytes / bandwidth,
                 found.ici_bytes / ici, found.dcn_bytes / dcn if dcn else None)
