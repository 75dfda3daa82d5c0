"""Predictions as text for people and as plain data for programs."""

import dataclasses
from importlib.metadata import PackageNotFoundError, version

from llava_jax.plan.cycles import PARTS
from llava_jax.plan.inference import Phase
from llava_jax.plan.predict import Prediction
from llava_jax.plan.search import Found
from llava_jax.plan.step import Memory
from llava_jax.plan.topologies import GIB, Slice

DIRECTIONS = ("forward", "recompute", "backward")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def text(plan: Prediction, price: float | None = None) -> str:
    """A stage's plan, in lines of at most 110 columns. `price`: of a chip, for an hour."""
    lines = [f"stage {plan.stage}: a step of {plan.rows:,} rows, {plan.tokens:,} tokens and {plan.images:,} images", ""]
    lines += _memory(plan)
    if plan.profile is None:
        return "\n".join([*lines, "", "  No time is predicted for a program that does not fit."])
    lines += ["", *_time(plan), "", *_cycles(plan), "", *_rates(plan), "", *_hours(plan, price)]
    return "\n".join(lines)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<34}{value:>14}  {note}".rstrip()


def _scaled(count: float, unit: str = "") -> str:
    """A number with three to four digits and a power of a thousand."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:,.1f} {prefix}{unit}"
    return f"{count:,.1f} {unit}".rstrip()


def _memory(plan: Prediction) -> list[str]:
    memory = plan.memory
    share = f"{100 * memory.peak / memory.limit:.0f} % of {memory.limit / GIB:.2f} GiB"
    more = f"{(memory.peak - memory.limit) / GIB:.2f} GiB more than the {memory.limit / GIB:.2f} GiB there are"
    each = "a device (half a chip)" if plan.where.chip.devices == 2 else "a chip"
    return [
        _row(f"memory of {each}", "fits" if memory.fits else "DOES NOT FIT", share if memory.fits else more),
        _row("  trained parameters, float32", _bytes(memory.trained), "arithmetic, as the next three"),
        _row("  frozen parameters", _bytes(memory.frozen)),
        _row("  optimizer", _bytes(memory.optimizer)),
        _row("  batch", _bytes(memory.batch)),
        _row("  temporaries", _bytes(memory.temporaries), "the compiler: activations, gradients, gathered weights"),
        _row("  peak", _bytes(memory.peak), "the compiler"),
        *([_row("  in the host's memory", _bytes(memory.host), "the compiler")] if memory.host else []),
    ]


def _time(plan: Prediction) -> list[str]:
    times, found, chip = plan.times, plan.profile, plan.where.chip
    kernels = f"arithmetic: FLOPs or bytes of {len(found.kernels)} Pallas kernels (no cycles given)"
    alone = f"arithmetic: bytes of {len(found.exposed)} collectives that no computation hides"
    bounds = [_row("  matrix units", _seconds(times.mxu), f"arithmetic: {_scaled(found.flops, 'FLOP')} in the program"),
              _row("  HBM", _seconds(times.hbm), f"arithmetic: {_scaled(found.bytes, 'B')} of operands and results"),
              _row("  links within a slice", _seconds(times.ici), f"arithmetic: {_scaled(found.ici_bytes, 'B')} sent")]
    if plan.where.count > 1:
        value = _seconds(times.dcn) if times.dcn is not None else "rate unknown"
        bounds.append(_row("  links between slices", value, f"arithmetic: {_scaled(found.dcn_bytes, 'B')} sent"))
    return [
        _row("step", _seconds(times.step), "predicted: the sum of"),
        _row("  cycles", _seconds(times.cycles),
             f"the compiler: {found.cycles / 1e6:,.1f} M at {chip.clock / 1e9:.3f} GHz"),
        _row("  kernels", _seconds(times.kernels), kernels),
        _row("  exposed collectives", _seconds(times.exposed), alone),
        _row("lower bounds, each alone", ""), *bounds,
    ]


def _cycles(plan: Prediction) -> list[str]:
    """The table of parts and directions, in million cycles, and the kinds below it."""
    parts, total = plan.profile.by_part(), plan.profile.cycles
    names = [name for name in (*PARTS, "other") if any(part == name for part, _ in parts)]
    columns = "".join(f"{name:>12}" for name in (*DIRECTIONS, "all", "share"))
    lines = [f"  {'M cycles (the compiler)':<26}{columns}"]
    for name in names:
        row = [parts.get((name, way), 0) for way in DIRECTIONS]
        whole = sum(count for (part, _), count in parts.items() if part == name)
        cells = "".join(f"{count / 1e6:>12,.1f}" if count else f"{'':>12}" for count in row)
        lines.append(f"  {'  ' + name:<26}{cells}{whole / 1e6:>12,.1f}{100 * whole / max(total, 1):>10.1f} %")
    kinds = [f"{kind} {count / 1e6:,.1f}" for kind, count in plan.profile.by_kind().most_common() if count]
    return [*lines, "    by kind: " + ", ".join(kinds)]


def _rates(plan: Prediction) -> list[str]:
    chips = plan.where.chips
    return [
        _row("model FLOPs of a step and chip", _scaled(plan.model_flops / chips),
             "formula: causal attention halved, nothing computed again"),
        _row("hardware FLOPs", _scaled(plan.profile.flops * plan.where.chip.devices),
             "products in the program, what is computed again included"),
        _row("model FLOP utilisation (MFU)", f"{100 * plan.mfu:.1f} %", "predicted"),
        _row("tokens/s and chip", f"{plan.per_chip(plan.tokens):,.0f}",
             f"predicted; {plan.per_chip(plan.tokens) * chips:,.0f} in all, rows filled"),
        _row("images/s and chip", f"{plan.per_chip(plan.images):,.2f}",
             f"predicted; {plan.per_chip(plan.images) * chips:,.1f} in all, slots filled"),
    ]


def _hours(plan: Prediction, price: float | None) -> list[str]:
    if plan.length is None:
        return ["  How long the stage is, neither recipe nor data tell: give --rows-per-epoch."]
    lines = [_row("steps", f"{plan.length.steps:,}", plan.length.source),
             _row("hours", f"{plan.hours:,.2f}", "predicted, of steps alone")]
    if price is not None:
        cost = plan.hours * plan.where.chips * price
        lines.append(_row("cost", f"{cost:,.2f}", f"{plan.hours * plan.where.chips:,.1f} chip-hours at {price:g}"))
    return lines


def header(recipe: str, where: Slice, mesh: dict[str, int], notes: list[str]) -> str:
    """What is planned, for all stages."""
    found = versions()
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    return "\n".join([f"{recipe} on {where.about}",
                      f"{f'mesh {axes}; ' if axes else ''}jax {found['jax']}, libtpu {found['libtpu']}",
                      *notes, "Nothing here was measured on a TPU."])


def data(plan: Prediction, price: float | None = None) -> dict:
    """The same as plain data; times in seconds, memory in bytes of one device, rates of one chip."""
    result = {
        "stage": plan.stage, "fits": plan.memory.fits,
        "memory": _memory_data(plan.memory),
        "rows": plan.rows, "tokens": plan.tokens, "images": plan.images, "model_flops": plan.model_flops,
        "compile_seconds": round(plan.compile_seconds, 1),
        "steps": plan.length and plan.length.steps, "steps_source": plan.length and plan.length.source,
    }
    if plan.profile is None:
        return result
    found, times = plan.profile, plan.times
    result |= {
        "cycles": found.cycles,
        "cycles_by_part": {f"{part} {way}".strip(): count for (part, way), count in sorted(found.by_part().items())},
        "cycles_by_kind": dict(found.by_kind()),
        "hardware_flops": found.flops * plan.where.devices, "hbm_bytes": found.bytes,
        "ici_bytes": found.ici_bytes, "dcn_bytes": found.dcn_bytes,
        "step_seconds": times.step, "seconds": dataclasses.asdict(times),
        "mfu": plan.mfu, "tokens_per_second_per_chip": plan.per_chip(plan.tokens),
        "images_per_second_per_chip": plan.per_chip(plan.images), "hours": plan.hours,
    }
    if price is not None and plan.hours is not None:
        result["cost"] = plan.hours * plan.where.chips * price
    return result


def ranking(found: list[Found], stage: str) -> str:
    """What a search compiled, the best first, and the flags of the best."""
    lines = [f"{'':>29} {'tokens/s':>9}  data x fsdp x tensor,",
             f"{'step':>10} {'MFU':>7} {'memory':>10} {'and chip':>9}  gradient_accumulation, remat, attention"]
    for each in found:
        way, plan = each.candidate, each.plan
        name = (f"{way.mesh.data} x {way.mesh.fsdp} x {way.mesh.tensor}, {way.gradient_accumulation}, {way.remat}, "
                f"{way.attention}{', moments on the host' * way.offload}")
        if not plan:
            lines.append(f"{'error':>10} {'':>7} {'':>10} {'':>9}  {name}: {each.error}")
            continue
        memory = _bytes(plan["memory"]["peak"])
        if each.fits:
            lines.append(f"{_seconds(plan['step_seconds']):>10} {100 * plan['mfu']:>5.1f} % {memory:>10} "
                         f"{plan['tokens_per_second_per_chip']:>9,.0f}  {name}")
        else:
            lines.append(f"{'too large':>10} {'':>7} {memory:>10} {'':>9}  {name}")
    if found and found[0].fits:
        return "\n".join([*lines, "", f"best: {' '.join(found[0].candidate.flags(stage))}"])
    return "\n".join([*lines, "", "Nothing that was compiled fits: more chips, shorter rows, or more --tries."])


def phase_text(phase: Phase) -> str:
    """Prefill's or decode's plan."""
    memory = phase.memory
    fits = f"{100 * memory.peak / memory.limit:.0f} % of {_bytes(memory.limit)}"
    lines = [
        phase.name, "",
        _row("memory of a device", "fits" if memory.fits else "DOES NOT FIT",
             fits if memory.fits else f"{_bytes(memory.peak - memory.limit)} more than there is"),
        _row("  parameters, bfloat16", _bytes(memory.frozen), "arithmetic, as the next two"),
        _row("  keys and values", _bytes(phase.cache)),
        _row("  other inputs", _bytes(max(0, memory.batch - phase.cache if phase.name == "decode" else memory.batch))),
        _row("  temporaries", _bytes(memory.temporaries), "the compiler; prefill's hold the cache that it makes"),
        _row("  peak", _bytes(memory.peak), "the compiler"),
    ]
    if phase.times is None:
        return "\n".join(lines)
    what = "tokens read" if phase.name == "prefill" else "tokens written"
    return "\n".join([
        *lines, "",
        _row("time", _seconds(phase.times.step), f"predicted, for {phase.tokens:,} {what}"),
        _row("  cycles", _seconds(phase.times.cycles), f"the compiler: {phase.profile.cycles / 1e6:,.1f} M"),
        _row("  kernels", _seconds(phase.times.kernels), "arithmetic"),
        _row("  exposed collectives", _seconds(phase.times.exposed), "arithmetic"),
        _row("matrix units alone", _seconds(phase.times.mxu), "arithmetic"),
        _row(f"{what} per second", f"{phase.tokens_per_second:,.0f}", "predicted, all rows"),
        *([_row("  if HBM were all", f"{phase.roof:,.0f}", f"arithmetic: {_bytes(phase.needed)} of weights and cache"),
           _row("  of the HBM bandwidth", f"{100 * phase.bandwidth:.0f} %", "predicted")]
          if phase.name == "decode" else []),
    ])


def phase_data(phase: Phase) -> dict:
    """The same as plain data; bytes of one device."""
    result = {"phase": phase.name, "fits": phase.memory.fits, "memory": _memory_data(phase.memory),
              "cache": phase.cache, "tokens": phase.tokens, "compile_seconds": round(phase.compile_seconds, 1)}
    if phase.times is None:
        return result
    return result | {
        "cycles": phase.profile.cycles, "seconds": dataclasses.asdict(phase.times), "step_seconds": phase.times.step,
        "tokens_per_second": phase.tokens_per_second, "hbm_bytes_needed": phase.needed,
        "tokens_per_second_at_hbm_bandwidth": phase.roof, "hbm_bandwidth_fraction": phase.bandwidth,
    }


def _memory_data(memory: Memory) -> dict:
    return dataclasses.asdict(memory) | {"peak": memory.peak}


def _bytes(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _seconds(count: float) -> str:
    return f"{count * 1e3:,.1f} ms" if count >= 1e-3 else f"{count * 1e6:,.1f} us"
