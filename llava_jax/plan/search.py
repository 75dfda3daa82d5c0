"""Searches the fastest mesh, micro-batches and recomputation of a stage on a slice.

One formula excludes candidates that need too much memory, another orders the others. The most promising candidates are
compiled, several at a time, each in its own process.
"""

import dataclasses
import json
import math
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from llava_jax import config
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel.sharding import make_mesh
from llava_jax.plan.meshes import fits, meshes
from llava_jax.plan.predict import stage_flops
from llava_jax.plan.step import abstract_step, device_bytes
from llava_jax.plan.topologies import GIB, Slice

VMEM_BYTES = 128 * 2**20
"""Maximum size of a chip's VMEM, which may contain activations instead of HBM."""

HOST_BYTES_PER_SECOND = 8e9
"""Approximate rate between a device and its host's memory; used only to order the candidates."""

RECOMPUTED = {"none": 0.0, "save_dots": 0.1, "save_attention": 0.7, "save_qkv": 0.75, "offload": 0.75, "full": 1.0}
"""Share of a forward pass that a remat policy (models/layers.py) computes again."""


@dataclass(frozen=True)
class Candidate:
    """Describes one way to run a stage, with estimates by formula."""

    mesh: config.Mesh
    gradient_accumulation: int
    remat: str
    attention: str
    offload: bool
    """Whether the optimizer's moments are in the host's memory."""
    memory: int
    """Lower bound of the bytes that one device needs."""
    seconds: float
    """Rough estimate of the seconds of a step."""

    def flags(self, stage: str) -> list[str]:
        """Returns the options of train's command line."""
        axes = dataclasses.asdict(self.mesh)
        return [*(part for axis, size in axes.items() for part in (f"--mesh.{axis}", str(size))),
                f"--stages.{stage}.gradient_accumulation", str(self.gradient_accumulation),
                f"--stages.{stage}.remat", self.remat,
                "--model.attention", self.attention, *[f"--stages.{stage}.optimizer.offload"] * self.offload]


@dataclass(frozen=True)
class CompiledCandidate:
    """Holds the result of compiling a candidate."""

    candidate: Candidate
    plan: dict
    """Plan of the stage as plain data (`show.data`); empty after an error."""
    error: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.plan.get("fits"))


def candidates(recipe: config.Recipe, name: str, where: Slice, model: LlavaConfig) -> list[Candidate]:
    """Returns the ways to run a stage that divide over the slice and may fit, the most promising first.

    The batch size of the recipe does not change, because it affects what is learned.
    """
    devices = where.jax_devices()
    stage, work = recipe.stages[name], stage_flops(recipe.stages[name], model)
    found = []
    for axes in meshes(where):
        groups = axes.data * axes.fsdp
        changed = dataclasses.replace(recipe, mesh=axes)
        if stage.batch_size % groups or not fits(changed, devices, model):
            continue
        _, (state, frozen, batch) = abstract_step(changed, name, make_mesh(axes, devices), model)
        fixed, gradients = device_bytes((state.step, state.trainable, frozen, batch)), device_bytes(state.trainable)
        moments = device_bytes(state.optimizer) + device_bytes(state.optimizer, "pinned_host")
        rows = stage.batch_size // groups
        for gradient_accumulation in (count for count in range(1, rows + 1) if rows % count == 0):
            for remat in policies():
                # Micro-batches need a copy of all gradients; without them a gradient may live as short as its layer.
                needed = (fixed + saved_bytes(model, stage, axes, gradient_accumulation, remat)
                          + gradients * (gradient_accumulation > 1))
                for offload in (False, True):
                    memory = needed + moments * (not offload)
                    seconds = _seconds(stage, work, where, model, axes, gradient_accumulation, remat)
                    seconds += 2 * moments / HOST_BYTES_PER_SECOND * offload
                    if memory <= where.chip.memory:
                        found += [Candidate(axes, gradient_accumulation, remat, attention, offload, memory, seconds)
                                  for attention in attentions(recipe, stage)]
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory))


def search(recipe: str, overrides: Sequence[str], stage: str, where: Slice, candidates: Sequence[Candidate],
           tries: int, jobs: int, report: Callable[[str], None]) -> list[CompiledCandidate]:
    """Compiles candidates, `jobs` at a time, until `tries` of them fit. Returns them, the fastest first.

    A candidate is skipped if it needs more memory than one that did not fit. Candidates that do not fit do not count,
    up to three times `tries`, because the compiler rejects them quickly.
    """
    waiting, running, done = list(candidates), {}, []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            wanted = min(tries - sum(compiled.fits for compiled in done), 4 * tries - len(done), jobs) - len(running)
            for candidate in waiting[: max(0, wanted)]:
                running[pool.submit(_compile, recipe, overrides, stage, where, candidate)] = waiting.pop(0)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                candidate, compiled = running.pop(future), future.result()
                done.append(compiled)
                if compiled.plan and not compiled.fits:
                    waiting = [other for other in waiting if not _needs_more(other, candidate)]
                report(f"{len(done)} compiled: {' '.join(candidate.flags(stage))}: {_result(compiled)}")
    return sorted(done, key=lambda compiled: (not compiled.fits, compiled.plan.get("step_seconds", math.inf),
                                              compiled.plan.get("memory", {}).get("peak", math.inf)))


def policies() -> tuple[str, ...]:
    """Returns the remat policies of a recipe."""
    return typing.get_args(typing.get_type_hints(config.Stage)["remat"])


def attentions(recipe: config.Recipe, stage: config.Stage) -> tuple[str, ...]:
    """Returns the attention implementations to try."""
    # On short sequences XLA may be faster than the kernel, whose blocks are mostly padding. On long ones it fills HBM.
    if recipe.model.attention == "auto" and stage.data.sequence_length <= 1024:
        return "splash", "xla"
    return (recipe.model.attention,)


def saved_bytes(model: LlavaConfig, stage: config.Stage, mesh: config.Mesh, gradient_accumulation: int,
                remat: str) -> int:
    """Returns a lower bound of the bytes of activations that one device keeps in HBM for the backward pass.

    These are the input of every layer and, by policy, the results of its products, in bfloat16. The logits and
    short-lived arrays are not included.
    """
    text = model.text
    tokens = stage.batch_size // gradient_accumulation // (mesh.data * mesh.fsdp) * stage.data.sequence_length
    heads = text.head_dim * (text.num_heads + 2 * text.num_kv_heads) / mesh.tensor
    hidden = text.intermediate_size / mesh.tensor
    mixed = text.num_heads * text.head_dim / mesh.tensor
    dots = 2 * text.hidden_size + heads + 2 * hidden
    kept = {"full": text.hidden_size, "offload": 0, "save_qkv": text.hidden_size + heads,
            "save_attention": text.hidden_size + heads + mixed,
            "save_dots": dots, "none": dots + text.hidden_size + mixed + hidden}
    return max(0, int(2 * tokens * text.num_layers * kept[remat]) - VMEM_BYTES)


def _seconds(stage: config.Stage, work: float, where: Slice, model: LlavaConfig, mesh: config.Mesh,
             gradient_accumulation: int, remat: str) -> float:
    """Estimates the seconds of a step: the longer of products at 60 % of the peak and bytes over the links, plus 20 %
    of the shorter."""
    chip, text = where.chip, model.text
    flops = work * (1 + RECOMPUTED[remat] / 3) / where.chips
    layer = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    layer += 3 * text.hidden_size * text.intermediate_size
    weights = 2 * (text.num_layers * layer + 2 * text.hidden_size * text.vocab_size) / mesh.tensor
    tokens = stage.batch_size // (mesh.data * mesh.fsdp) * stage.data.sequence_length
    moved = gradient_accumulation * 4 * weights * (1 - 1 / mesh.fsdp)
    moved += 8 * text.num_layers * tokens * text.hidden_size * 2 * (1 - 1 / mesh.tensor)
    products, links = flops / (0.6 * chip.flops), moved * chip.devices / chip.ici
    return max(products, links) + 0.2 * min(products, links)


def _needs_more(other: Candidate, candidate: Candidate) -> bool:
    """Returns whether `other` has the same mesh and needs at least as much memory as `candidate`."""
    same = all(getattr(other, name) == getattr(candidate, name) for name in ("mesh", "attention", "offload"))
    return same and other.memory >= candidate.memory and (
        other.gradient_accumulation <= candidate.gradient_accumulation)


def _compile(recipe: str, overrides: Sequence[str], stage: str, where: Slice, candidate: Candidate
             ) -> CompiledCandidate:
    command = [sys.executable, "-m", "llava_jax.plan", recipe, "--topology", where.name, "--stage", stage, "--json",
               *overrides, *candidate.flags(stage)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return CompiledCandidate(candidate, json.loads(done.stdout)["stages"][0])
    except (json.JSONDecodeError, KeyError, IndexError):
        lines = done.stderr.strip().splitlines()
        return CompiledCandidate(candidate, {}, lines[-1] if lines else f"exit code {done.returncode}")


def _result(compiled: CompiledCandidate) -> str:
    if compiled.error:
        return compiled.error
    plan, gib = compiled.plan, compiled.plan["memory"]["peak"] / GIB
    if not compiled.fits:
        return f"does not fit ({gib:.1f} GiB)"
    return f"{plan['step_seconds'] * 1e3:,.0f} ms, {gib:.1f} GiB, MFU {100 * plan['mfu']:.1f} %"
