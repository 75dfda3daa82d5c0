"""Predicts time, memory, throughput and hours of a stage from its compiled step. Nothing is measured on a TPU."""

from dataclasses import dataclass

import numpy as np

from llava_jax import config
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.plan.data import Length
from llava_jax.plan.replay import Profile, Times, profile, times
from llava_jax.plan.step import Memory, Program
from llava_jax.plan.topologies import Slice
from llava_jax.train.metrics import model_flops, trained_parts
from llava_jax.train.optimizer import trainable_paths

ERRORS = (-0.10, 0.23)
"""Predicted over published tokens/s, less 1, of five runs of MaxText: the least and the greatest (README.md)."""
KNOWN_ERRORS = f"{ERRORS[0]:+.0%} to {ERRORS[1]:+.0%} tokens/s in five published runs of MaxText"


def time_range(seconds: float) -> tuple[float, float]:
    """Returns the least and the greatest time that a predicted time stands for, by the known errors."""
    return seconds * (1 + ERRORS[0]), seconds * (1 + ERRORS[1])


def rate_range(rate: float) -> tuple[float, float]:
    """Returns the least and the greatest rate, such as tokens/s or MFU, that a predicted rate stands for."""
    return rate / (1 + ERRORS[1]), rate / (1 + ERRORS[0])


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
    """Predicts the stage `name` from its compiled step.

    Its model FLOPs are those of sequences of one conversation each, with all slots of tiles full.
    """
    stage, data = recipe.stages[name], recipe.stages[name].data
    rows, images = stage.batch_size, stage.batch_size * data.tiles_per_sequence
    found = profile(program.hlo, program.slices) if program.hlo else None
    sizes = {path: x.size for path, x in abstract_params(model)[1].items()}
    trained = trainable_paths(stage, list(sizes))
    positions = np.broadcast_to(np.arange(data.sequence_length), (rows, data.sequence_length))
    flops = model_flops(model, trained_parts(trained), positions, np.ones_like(positions), images)
    return Prediction(name, where, program.memory, rows, rows * data.sequence_length, images, sum(sizes.values()),
                      sum(sizes[path] for path in trained), flops, program.seconds, found,
                      times(found, where) if found else None, length)
