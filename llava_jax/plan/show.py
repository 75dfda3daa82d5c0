"""Formats plans, which are plain data, as text of at most 120 columns."""

import math
from collections import Counter

from llava_jax.plan.predict import ERRORS, rate_range, time_range
from llava_jax.plan.topologies import GIB, Slice


def header(about: dict, where: Slice) -> str:
    """Returns the lines above all stages: recipe, slice, mesh, versions and notes."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in about["mesh"].items())
    versions = ", ".join(map(" ".join, about["versions"].items()))
    return "\n".join([f"{about['recipe']} on {where.about}", f"mesh {mesh}; {versions}", *about["notes"],
                      "Nothing here was measured on a TPU. Predictions were off by "
                      f"{ERRORS[0]:+.0%} to {ERRORS[1]:+.0%} tokens/s in five published runs of MaxText."])


def text(plan: dict, where: Slice, price: float | None = None) -> str:
    """Returns the plan of a stage as text. `price` is that of a chip for an hour."""
    memory, count, trained = plan["memory"], plan["parameters"], plan["trained_parameters"]
    lines = [
        f"stage {plan['stage']}: a step of {plan['rows']:,} sequences, {plan['tokens']:,} tokens and "
        f"{plan['images']:,} tiles", "",
        _row("parameters", f"{count:,}", "arithmetic"),
        _row("  trained", f"{trained:,}", f"{trained / count:.2%} of them"),
        _fits(memory, "a device (half a chip)" if where.chip.devices == 2 else "a chip"),
        _row("  trained parameters, float32", _bytes(memory["trained"]), "arithmetic, as the next three"),
        _row("  frozen parameters", _bytes(memory["frozen"])), _row("  optimizer", _bytes(memory["optimizer"])),
        _row("  batch", _bytes(memory["batch"])),
        _row("  temporaries", _bytes(memory["temporaries"]), "the compiler: activations, gradients, gathered weights"),
        _row("  peak", _bytes(memory["peak"]), "the compiler"),
        *([_row("  in the host's memory", _bytes(memory["host"]), "the compiler")] if memory["host"] else []), ""]
    if "seconds" not in plan:
        return "\n".join([*lines, "  No time is predicted for a program that does not fit."])
    seconds, clock, parts = plan["seconds"], where.chip.clock, Counter(plan["cycles_by_part"])
    lines += [
        _row("step", _duration(plan["step_seconds"]),
             f"predicted: {_seconds(plan['step_seconds'])}, the sum of cycles, kernels and waits"),
        _row("  cycles", _seconds(seconds["cycles"]),
             f"the compiler: {plan['cycles'] / 1e6:,.1f} M at {clock / 1e9:.3f} GHz"),
        *[_row(f"    {part}", _seconds(cycles / clock)) for part, cycles in parts.most_common()],
        _row("  kernels", _seconds(seconds["kernels"]),
             f"the compiler: schedules of {plan['pallas_kernels']} Pallas kernels"),
        _row("  waits", _seconds(seconds["waits"]), "a replay of the schedule: collectives that nothing hides"), "",
        _row("model TFLOPs of a step and chip", f"{plan['model_flops'] / where.chips / 1e12:,.3g}",
             "formula: causal attention halved, no recomputation"),
        _row("model FLOP utilisation (MFU)", spread(*rate_range(100 * plan["mfu"]), " %"), "predicted"),
        _row("tokens/s and chip", spread(*rate_range(plan["tokens_per_second_per_chip"])),
             "predicted, sequences filled"),
        _row("tiles/s and chip", spread(*rate_range(plan["images_per_second_per_chip"])), "predicted, slots filled"),
        ""]
    if plan["hours"] is None:
        return "\n".join([*lines, "  Neither recipe nor data say how long the stage is: give --rows-per-epoch."])
    lines += [_row("steps", f"{plan['steps']:,}", plan["steps_source"]),
              _row("hours", spread(*plan["hours_range"]), "predicted, of steps alone")]
    if price is not None:
        lines.append(_row("cost", spread(*time_range(plan["cost"])), f"chip-hours at {price:g}"))
    return "\n".join(lines)


def serving_text(plan: dict) -> str:
    """Returns the plan of a server as text."""
    memory = max((phase["memory"] for phase in plan["phases"]), key=lambda memory: memory["peak"])
    cache, slots = plan["slots"] * plan["slot_bytes"], f"{plan['slots']:,} slots"
    lines = [
        f"a server of {slots} of {plan['context']:,} tokens", "", _fits(memory, "a device"),
        _row("  parameters", _bytes(memory["frozen"]), "arithmetic, as the next two"),
        _row("  keys and values", _bytes(cache), f"{_bytes(plan['slot_bytes'])} for a slot"),
        _row("  other inputs", _bytes(memory["batch"] - cache)),
        _row("  temporaries", _bytes(memory["temporaries"]), "the compiler"),
        _row("  peak", _bytes(memory["peak"]), "the compiler, of the largest program"),
        _row("slots that fit", f"{plan['possible_slots']:,}", "with the same temporaries")]
    if not plan["fits"]:
        return "\n".join(lines)
    *prompt, batch, full, half = plan["phases"]
    lines.append("")
    for name, suffix, phase in (("contexts full", "", full), ("half full", "_half_full", half)):
        lines += [_row(f"tokens/s per chip, {name}", f"{plan['tokens_per_second_per_chip' + suffix]:,.0f}",
                       f"predicted, {slots} decode"), _phase(phase, "  a step of decode"),
                  _row("  of the HBM bandwidth", f"{100 * plan['hbm_bandwidth_fraction' + suffix]:.0f} %",
                       "weights and cache read once")]
    return "\n".join([*lines, "", _row("first token", _seconds(plan["first_token_seconds"]),
                                      f"predicted, {plan['prompt_tokens']:,} tokens, one image, no other prompts"),
                      *[_phase(phase, f"  {phase['phase']}") for phase in prompt],
                      _row(batch["phase"], _seconds(batch["step_seconds"]), "full; between two decode steps")])


def spread(low: float, high: float, unit: str = "") -> str:
    """Formats both ends, the lower one with two digits that count."""
    digits = 1 - math.floor(math.log10(low)) if low else 0
    return " to ".join(f"{round(end, digits):,.{max(0, digits)}f}" for end in (low, high)) + unit


def _phase(phase: dict, name: str) -> str:
    parts = [f"{part} {_seconds(seconds)}" for part, seconds in phase["seconds"].items() if seconds]
    return _row(name, _seconds(phase["step_seconds"]), ", ".join(parts))


def _duration(seconds: float) -> str:
    low, high = time_range(seconds)
    return spread(low, high, " s") if high >= 0.1 else spread(1e3 * low, 1e3 * high, " ms")


def _fits(memory: dict, name: str) -> str:
    limit, more = f"{memory['limit'] / GIB:.2f} GiB", memory["peak"] - memory["limit"]
    if more <= 0:
        return _row(f"memory of {name}", "fits", f"{100 * memory['peak'] / memory['limit']:.0f} % of {limit}")
    return _row(f"memory of {name}", "DOES NOT FIT", f"{more / GIB:.2f} GiB more than the {limit} there are")


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<34}{value:>18}  {note}".rstrip()


def _bytes(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _seconds(count: float) -> str:
    return f"{count * 1e3:,.1f} ms" if count >= 1e-3 else f"{count * 1e6:,.1f} us"
