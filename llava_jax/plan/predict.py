"""Predicts time, memory, throughput and hours of a stage from its compiled step. Nothing is measured on a TPU."""

import dataclasses

import numpy as np

from llava_jax import config
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.plan.replay import Profile, profile, times
from llava_jax.plan.step import Program
from llava_jax.plan.topologies import Slice
from llava_jax.train.metrics import model_flops, trained_parts
from llava_jax.train.optimizer import trainable_paths

ERRORS = (-0.10, 0.23)
"""Predicted over published tokens/s, less 1, of five runs of MaxText: the least and the greatest (README.md)."""


def time_range(seconds: float) -> tuple[float, float]:
    """Returns the least and the greatest time that a predicted time stands for, by the known errors."""
    return seconds * (1 + ERRORS[0]), seconds * (1 + ERRORS[1])


def rate_range(rate: float) -> tuple[float, float]:
    """Returns the least and the greatest rate, such as tokens/s or MFU, that a predicted rate stands for."""
    return rate / (1 + ERRORS[1]), rate / (1 + ERRORS[0])


def predict_program(program: Program, where: Slice, found: Profile | None, steps: int = 1) -> dict:
    """Returns memory and time of a program as plain data. `steps` is that of `times`."""
    memory = dataclasses.asdict(program.memory) | {"peak": program.memory.peak}
    plan = {"fits": program.memory.fits, "memory": memory, "compile_seconds": round(program.seconds, 1)}
    if found is None:  # the compiler gives no program if it does not fit
        return plan
    seconds = times(found, where, steps)
    return plan | {"step_seconds": seconds.step, "seconds": dataclasses.asdict(seconds)}


def predict(recipe: config.Recipe, name: str, where: Slice, model: LlavaConfig, program: Program,
            length: tuple[int, str] | None, price: float | None = None) -> dict:
    """Returns the plan of the stage `name` as plain data: seconds, bytes of one device, rates of one chip.

    Its model FLOPs are those of sequences of one conversation each, with all slots of tiles full. `length` is that
    of `data.length`, and `price` that of a chip for an hour.
    """
    stage, data = recipe.stages[name], recipe.stages[name].data
    rows, images = stage.batch_size, stage.batch_size * data.tiles_per_sequence
    sizes = {path: x.size for path, x in abstract_params(model)[1].items()}
    trained = trainable_paths(stage, list(sizes))
    positions = np.broadcast_to(np.arange(data.sequence_length), (rows, data.sequence_length))
    flops = model_flops(model, trained_parts(trained), positions, np.ones_like(positions), images)
    found = profile(program.hlo, program.slices) if program.hlo else None
    plan = {
        "stage": name, **predict_program(program, where, found), "rows": rows, "tokens": rows * data.sequence_length,
        "images": images, "parameters": sum(sizes.values()),
        "trained_parameters": sum(sizes[path] for path in trained), "model_flops": flops,
        "steps": length and length[0], "steps_source": length and length[1]}
    if found is None:
        return plan
    step, chips = plan["step_seconds"], where.chips
    mfu, hours = flops / step / (where.chip.flops * chips), length and length[0] * step / 3600
    plan |= {
        "cycles": found.cycles, "cycles_by_part": dict(sorted(found.by_part().items())),
        "pallas_kernels": len(found.kernels), "ici_bytes": found.ici_bytes, "dcn_bytes": found.dcn_bytes,
        "step_seconds_range": time_range(step),
        "mfu": mfu, "mfu_range": rate_range(mfu), "hours": hours, "hours_range": hours and time_range(hours),
        "tokens_per_second_per_chip": plan["tokens"] / step / chips,
        "images_per_second_per_chip": images / step / chips}
    return plan | ({"cost": hours * chips * price} if price is not None and hours is not None else {})
