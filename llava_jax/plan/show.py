"""Formats plans as text for people and as plain data for programs."""

import dataclasses
import math
from collections import Counter
from importlib.metadata import version

from llava_jax.plan.predict import KNOWN_ERRORS, Prediction, rate_range, time_range
from llava_jax.plan.replay import Times
from llava_jax.plan.serve import Phase, Serving
from llava_jax.plan.step import Memory
from llava_jax.plan.topologies import GIB, Slice


def versions() -> dict[str, str]:
    """Returns the versions of the packages that the figures depend on."""
    return {name: version(name) for name in ("jax", "libtpu")}


def header(recipe: str, where: Slice, mesh: dict[str, int], notes: list[str]) -> str:
    """Returns the lines above all stages: recipe, slice, mesh, versions and notes."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    found = ", ".join(map(" ".join, versions().items()))
    return "\n".join([f"{recipe} on {where.about}", f"mesh {axes}; {found}", *notes,
                      f"Nothing here was measured on a TPU. Predictions were off by {KNOWN_ERRORS}."])


def text(plan: Prediction, price: float | None = None) -> str:
    """Returns the plan of a stage as text of at most 110 columns. `price` is that of a chip for an hour."""
    memory = plan.memory
    lines = [
        f"stage {plan.stage}: a step of {plan.rows:,} sequences, {plan.tokens:,} tokens and {plan.images:,} tiles", "",
        _row("parameters", f"{plan.parameters:,}", "arithmetic"),
        _row("  trained", f"{plan.trained_parameters:,}", f"{plan.trained_parameters / plan.parameters:.2%} of them"),
        _fits(memory, "a device (half a chip)" if plan.where.chip.devices == 2 else "a chip"),
        _row("  trained parameters, float32", _bytes(memory.trained), "arithmetic, as the next three"),
        _row("  frozen parameters", _bytes(memory.frozen)),
        _row("  optimizer", _bytes(memory.optimizer)),
        _row("  batch", _bytes(memory.batch)),
        _row("  temporaries", _bytes(memory.temporaries), "the compiler: activations, gradients, gathered weights"),
        _row("  peak", _bytes(memory.peak), "the compiler"),
        *([_row("  in the host's memory", _bytes(memory.host), "the compiler")] if memory.host else []), "",
    ]
    if plan.profile is None:
        return "\n".join([*lines, "  No time is predicted for a program that does not fit."])
    return "\n".join([*lines, *_times(plan), "", *_hours(plan, price)])


def _times(plan: Prediction) -> list[str]:
    times, found, clock = plan.times, plan.profile, plan.where.chip.clock
    parts = Counter()
    for (part, _), count in found.by_part().items():
        parts[part] += count / clock
    return [
        _row("step", _duration(times.step), f"predicted: {_seconds(times.step)}, the sum of cycles, kernels and waits"),
        _row("  cycles", _seconds(times.cycles), f"the compiler: {found.cycles / 1e6:,.1f} M at {clock / 1e9:.3f} GHz"),
        *[_row(f"    {part}", _seconds(seconds)) for part, seconds in parts.most_common()],
        _row("  kernels", _seconds(times.kernels), f"the compiler: schedules of {len(found.kernels)} Pallas kernels"),
        _row("  waits", _seconds(times.waits), "a replay of the schedule: collectives that nothing hides"), "",
        _row("model TFLOPs of a step and chip", f"{plan.model_flops / plan.where.chips / 1e12:,.3g}",
             "formula: causal attention halved, no recomputation"),
        _row("model FLOP utilisation (MFU)", spread(*rate_range(100 * plan.mfu), " %"), "predicted"),
        _row("tokens/s and chip", spread(*rate_range(plan.per_chip(plan.tokens))), "predicted, sequences filled"),
        _row("tiles/s and chip", spread(*rate_range(plan.per_chip(plan.images))), "predicted, slots filled"),
    ]


def _hours(plan: Prediction, price: float | None) -> list[str]:
    if plan.length is None:
        return ["  Neither recipe nor data say how long the stage is: give --rows-per-epoch."]
    hours = time_range(plan.hours)
    lines = [_row("steps", f"{plan.length.steps:,}", plan.length.source),
             _row("hours", spread(*hours), "predicted, of steps alone")]
    if price is not None:
        costs = [end * plan.where.chips * price for end in hours]
        lines.append(_row("cost", spread(*costs), f"chip-hours at {price:g}"))
    return lines


def data(plan: Prediction, price: float | None = None) -> dict:
    """Returns the plan of a stage as plain data: seconds, bytes of one device, rates of one chip."""
    result = {
        "stage": plan.stage, **_program_data(plan.memory, plan.compile_seconds, plan.times),
        "rows": plan.rows, "tokens": plan.tokens, "images": plan.images, "parameters": plan.parameters,
        "trained_parameters": plan.trained_parameters, "model_flops": plan.model_flops,
        "steps": plan.length and plan.length.steps, "steps_source": plan.length and plan.length.source,
    }
    if (found := plan.profile) is None:
        return result
    return result | {
        "cycles": found.cycles,
        "cycles_by_part": {f"{part} {way}".strip(): count for (part, way), count in sorted(found.by_part().items())},
        "ici_bytes": found.ici_bytes, "dcn_bytes": found.dcn_bytes, "step_seconds_range": time_range(plan.times.step),
        "mfu": plan.mfu, "mfu_range": rate_range(plan.mfu), "hours": plan.hours,
        "hours_range": plan.hours and time_range(plan.hours),
        "tokens_per_second_per_chip": plan.per_chip(plan.tokens),
        "images_per_second_per_chip": plan.per_chip(plan.images),
    } | ({"cost": plan.hours * plan.where.chips * price} if price is not None and plan.hours is not None else {})


def serving_text(plan: Serving) -> str:
    """Returns the plan of a server as text."""
    memory, slots = plan.largest, f"{plan.slots:,} slots"
    lines = [
        f"a server of {slots} of {plan.context:,} tokens", "", _fits(memory, "a device"),
        _row("  parameters", _bytes(memory.frozen), "arithmetic, as the next two"),
        _row("  keys and values", _bytes(plan.slots * plan.slot_bytes), f"{_bytes(plan.slot_bytes)} for a slot"),
        _row("  other inputs", _bytes(memory.batch - plan.slots * plan.slot_bytes)),
        _row("  temporaries", _bytes(memory.temporaries), "the compiler"),
        _row("  peak", _bytes(memory.peak), "the compiler, of the largest program"),
        _row("slots that fit", f"{plan.possible_slots:,}", "with the same temporaries"), "",
    ]
    if not plan.fits:
        return "\n".join(lines[:-1])
    for name, phase, filled in (("contexts full", plan.decode, 1), ("half full", plan.decode_half, 0.5)):
        lines += [_row(f"tokens/s per chip, {name}", f"{plan.tokens_per_second(phase):,.0f}",
                       f"predicted, {slots} decode"), _phase(phase, "  a step of decode"),
                  _row("  of the HBM bandwidth", f"{100 * plan.bandwidth(phase, filled):.0f} %",
                       "weights and cache read once")]
    return "\n".join([*lines, "", _row("first token", _seconds(plan.first_token_seconds),
                                      f"predicted, {plan.prompt_tokens:,} tokens, one image, no other prompts"),
                      *[_phase(phase, f"  {phase.name}") for phase in plan.prompt],
                      _row(plan.batch.name, _seconds(plan.batch.times.step), "full; between two decode steps")])


def _phase(phase: Phase, name: str) -> str:
    parts = dataclasses.asdict(phase.times)
    return _row(name, _seconds(phase.times.step),
                ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in parts.items() if seconds))


def serving_data(plan: Serving) -> dict:
    """Returns the plan of a server as plain data; bytes of one device."""
    result = {"slots": plan.slots, "context": plan.context, "slot_bytes": plan.slot_bytes,
              "possible_slots": plan.possible_slots, "fits": plan.fits, "prompt_tokens": plan.prompt_tokens,
              "phases": [{"phase": phase.name, **_program_data(phase.memory, phase.compile_seconds, phase.times)}
                         for phase in (*plan.phases, plan.decode_half)]}
    return result if not plan.fits else result | {
        "tokens_per_second_per_chip": plan.tokens_per_second(plan.decode),
        "tokens_per_second_per_chip_half_full": plan.tokens_per_second(plan.decode_half),
        "hbm_bandwidth_fraction": plan.bandwidth(plan.decode, 1),
        "hbm_bandwidth_fraction_half_full": plan.bandwidth(plan.decode_half, 0.5),
        "first_token_seconds": plan.first_token_seconds,
    }


def _program_data(memory: Memory, compile_seconds: float, times: Times | None) -> dict:
    found = {"fits": memory.fits, "memory": dataclasses.asdict(memory) | {"peak": memory.peak},
             "compile_seconds": round(compile_seconds, 1)}
    return found | ({"step_seconds": times.step, "seconds": dataclasses.asdict(times)} if times else {})


def spread(low: float, high: float, unit: str = "") -> str:
    """Formats both ends, the lower one with two digits that count."""
    digits = 1 - math.floor(math.log10(low)) if low else 0
    return " to ".join(f"{round(end, digits):,.{max(0, digits)}f}" for end in (low, high)) + unit


def _duration(seconds: float) -> str:
    low, high = time_range(seconds)
    return spread(low, high, " s") if high >= 0.1 else spread(1e3 * low, 1e3 * high, " ms")


def _fits(memory: Memory, name: str) -> str:
    limit = f"{memory.limit / GIB:.2f} GiB"
    if memory.fits:
        return _row(f"memory of {name}", "fits", f"{100 * memory.peak / memory.limit:.0f} % of {limit}")
    more = f"{(memory.peak - memory.limit) / GIB:.2f} GiB more than the {limit} there are"
    return _row(f"memory of {name}", "DOES NOT FIT", more)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<34}{value:>18}  {note}".rstrip()


def _bytes(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _seconds(count: float) -> str:
    return f"{count * 1e3:,.1f} ms" if count >= 1e-3 else f"{count * 1e6:,.1f} us"
