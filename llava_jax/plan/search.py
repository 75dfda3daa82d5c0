"""Looks for the fastest way to run a stage on a slice: mesh, micro-batches, recomputation.

Candidates whose memory cannot do are dropped by a formula, the rest are ordered by another, and the promising ones are
compiled, several at a time, each in a process of its own.
"""

import dataclasses
import json
import math
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llava_jax import config
from llava_jax.models.llava import LlavaConfig
from llava_jax.parallel.sharding import make_mesh
from llava_jax.plan.meshes import fits, meshes
from llava_jax.plan.predict import stage_flops
from llava_jax.plan.step import abstract_step, device_bytes
from llava_jax.plan.topologies import Slice

ON_CHIP = 128 * 2**20
"""bytes of a chip's own memory, at most, where activations may lie instead of HBM"""

HOST_LINK = 8e9
"""bytes/s between a device and its host's memory, roughly; only for the order in which candidates are compiled"""

# What a policy (models/layers.py) computes again, as a share of a forward pass, which is a third of a step.
RECOMPUTED = {"none": 0.0, "save_dots": 0.1, "save_attention": 0.7, "save_qkv": 0.75, "offload": 0.75, "full": 1.0}


@dataclass(frozen=True)
class Candidate:
    """One way to run a stage, and what formulas say of it."""

    mesh: config.Mesh
    gradient_accumulation: int
    remat: str
    attention: str
    offload: bool
    """the optimizer's moments in the host's memory"""
    memory: int
    """bytes that one device needs at least"""
    seconds: float
    """of a step, roughly"""

    def flags(self, stage: str) -> list[str]:
        """What to write on train's command line."""
        axes = dataclasses.asdict(self.mesh)
        return [*(part for axis, size in axes.items() for part in (f"--mesh.{axis}", str(size))),
                f"--stages.{stage}.gradient_accumulation", str(self.gradient_accumulation),
                f"--stages.{stage}.remat", self.remat,
                "--model.attention", self.attention, *[f"--stages.{stage}.optimizer.offload"] * self.offload]


@dataclass(frozen=True)
class Found:
    """A candidate that was compiled; `plan` is the stage's plain data (show.data), or empty with an `error`."""

    candidate: Candidate
    plan: dict
    error: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.plan.get("fits"))


def candidates(recipe: config.Recipe, name: str, where: Slice, model: LlavaConfig) -> list[Candidate]:
    """All ways that divide over the slice and that the memory formula does not exclude, the most promising first.

    The rows of a step stay as the recipe has them: they are part of what is learned.
    """
    devices = where.jax_devices()
    stage, work = recipe.stages[name], stage_flops(recipe.stages[name], model)
    found = []
    for axes in meshes(where):
        groups = axes.data * axes.fsdp
        laid = dataclasses.replace(recipe, mesh=axes)
        if stage.batch_size % groups or not fits(laid, devices, model):
            continue
        _, (state, frozen, batch) = abstract_step(laid, name, make_mesh(axes, devices), model)
        fixed, gradients = device_bytes((state.step, state.trainable, frozen, batch)), device_bytes(state.trainable)
        moments = device_bytes(state.optimizer) + device_bytes(state.optimizer, "pinned_host")
        rows = stage.batch_size // groups
        for gradient_accumulation in (count for count in range(1, rows + 1) if rows % count == 0):
            for remat in policies():
                # Sums over micro-batches are a whole copy; without them gradients can be as short-lived as layers.
                needed = (fixed + saved_bytes(model, stage, axes, gradient_accumulation, remat)
                          + gradients * (gradient_accumulation > 1))
                for offload in (False, True):
                    memory = needed + moments * (not offload)
                    seconds = _seconds(stage, work, where, model, axes, gradient_accumulation, remat)
                    seconds += 2 * moments / HOST_LINK * offload
                    if memory <= where.chip.memory:
                        found += [Candidate(axes, gradient_accumulation, remat, attention, offload, memory, seconds)
                                  for attention in attentions(recipe, stage)]
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory))


def search(recipe: str, overrides: Sequence[str], stage: str, where: Slice, ways: Sequence[Candidate], tries: int,
           jobs: int, tell: Callable[[str], None]) -> list[Found]:
    """Compiles candidates, `jobs` at a time, until `tries` of them fit; the fastest come first, what does not fit last.

    What needs more memory than something that was found not to fit is not tried. What does not fit is found out
    quickly and does not count, up to three times `tries`.
    """
    waiting, running, done = list(ways), [], []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                enough = len(running) + sum(found.fits for found in done) >= tries
                if not waiting or enough or len(running) + len(done) >= 4 * tries:
                    return
                way = waiting.pop(0)
                running.append(way)
            found = _compile(recipe, overrides, stage, where, way)
            with lock:
                running.remove(way)
                done.append(found)
                if found.plan and not found.fits:
                    waiting[:] = [other for other in waiting if not _needs_more(other, way)]
                tell(f"{len(done)} compiled: {' '.join(way.flags(stage))}: {_result(found)}")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for _ in range(jobs)]:
            future.result()
    return sorted(done, key=lambda found: (not found.fits, found.plan.get("step_seconds", math.inf),
                                           found.plan.get("memory", {}).get("peak", math.inf)))


def policies() -> tuple[str, ...]:
    """Those that a recipe can choose for recomputation."""
    return typing.get_args(typing.get_type_hints(config.Stage)["remat"])


def attentions(recipe: config.Recipe, stage: config.Stage) -> tuple[str, ...]:
    """On short rows plain XLA may beat the kernel, whose blocks are mostly padding then; on long ones it fills HBM."""
    if recipe.model.attention == "auto" and stage.data.sequence_length <= 1024:
        return "splash", "xla"
    return (recipe.model.attention,)


def saved_bytes(model: LlavaConfig, stage: config.Stage, mesh: config.Mesh, gradient_accumulation: int,
                remat: str) -> int:
    """Bytes of activations that one device keeps in HBM at least for the backward pass, in bfloat16.

    Every layer's input, and by policy the results of its products. The scores over the vocabulary and everything that
    lives shortly come on top.
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
    return max(0, int(2 * tokens * text.num_layers * kept[remat]) - ON_CHIP)


def _seconds(stage: config.Stage, work: float, where: Slice, model: LlavaConfig, mesh: config.Mesh,
             gradient_accumulation: int, remat: str) -> float:
    """Products at 60 % of the peak, or bytes over the links, whichever takes longer, and a little of the other."""
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


def _needs_more(other: Candidate, way: Candidate) -> bool:
    """Whether a candidate of the same mesh keeps at least as much."""
    return (other.mesh, other.attention, other.offload) == (way.mesh, way.attention, way.offload) and (
        other.memory >= way.memory and other.gradient_accumulation <= way.gradient_accumulation)


def _compile(recipe: str, overrides: Sequence[str], stage: str, where: Slice, way: Candidate) -> Found:
    command = [sys.executable, "-m", "llava_jax.plan", recipe, "--topology", where.name, "--stage", stage, "--json",
               *overrides, *way.flags(stage)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return Found(way, json.loads(done.stdout)["stages"][0])
    except (json.JSONDecodeError, KeyError, IndexError):
        lines = done.stderr.strip().splitlines()
        return Found(way, {}, lines[-1] if lines else f"exit code {done.returncode}")


def _result(found: Found) -> str:
    if found.error:
        return found.error
    gib = found.plan["memory"]["peak"] / 2**30
    if not found.fits:
        return f"does not fit ({gib:.1f} GiB)"
    return f"{found.plan['step_seconds'] * 1e3:,.0f} ms, {gib:.1f} GiB, MFU {100 * found.plan['mfu']:.1f} %"
