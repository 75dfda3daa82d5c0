"""Where a compiled program spends its time: every executed instruction with its cycles, summed in several ways."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava_jax.plan import costs
from llava_jax.plan.hlo import Computation, Instruction, Module, parse
from llava_jax.plan.loops import Known, trips

PARTS = ("vision", "projector", "decoder", "loss", "optimizer")
"""The scopes that the model's and the step's code opens, by which instructions are told apart."""


@dataclass(frozen=True)
class Op:
    """An instruction that runs, `times` times in a step."""

    instruction: Instruction
    times: int
    loops: tuple[str, ...]
    """the bodies of the loops around it, outermost first"""
    flops: float
    """of its matrix products, once"""
    bytes: float
    """to and from HBM, once"""
    collectives: tuple[costs.Collective, ...]
    """that run in it, once"""
    kernel: bool
    """a Pallas kernel: the compiler gives it no cycles"""
    started: bool = False
    """whether it runs beside what comes between its start and its end"""

    @property
    def cycles(self) -> int:
        """Of all its times; none for what runs beside the rest."""
        return 0 if self.started else self.instruction.cycles * self.times

    @property
    def hides(self) -> bool:
        """Whether its collectives run beside computation: started and awaited apart, or fused with it."""
        name, opcode = self.instruction.name, self.instruction.opcode
        fused = opcode == "fusion" and (self.instruction.cycles > 0 or "-start" in name)
        return self.started or fused or opcode == "send" or opcode.endswith("-start")

    @property
    def scope(self) -> str | None:
        """The outermost of PARTS in whose scope it was traced; None outside of all."""
        name = self.instruction.op_name
        found = re.search(rf"\b({'|'.join(PARTS)})\b", name) if name.startswith("jit(") else None
        return found[1] if found else None

    @property
    def direction(self) -> str:
        """forward, recompute (the forward pass again, in the backward pass) or backward."""
        name = self.instruction.op_name
        if "rematted_computation" in name:
            return "recompute"
        return "backward" if "transpose(" in name else "forward"

    @property
    def kind(self) -> str:
        """products, kernels, collectives, copies, or elementwise for all else."""
        opcode = self.instruction.opcode
        if self.flops and not self.kernel:
            return "products"
        if self.kernel:
            return "kernels"
        if self.collectives:
            return "collectives"
        return "copies" if opcode.startswith(("copy", "slice", "dynamic-slice")) else "elementwise"


@dataclass(frozen=True)
class Profile:
    """The executed instructions of a program on one device."""

    ops: tuple[Op, ...]

    @property
    def cycles(self) -> int:
        """All that the compiler estimates; kernels and collectives that stand alone have none."""
        return sum(op.cycles for op in self.ops)

    @property
    def flops(self) -> float:
        """Of all matrix products and known kernels, what is computed again included."""
        return sum(op.flops * op.times for op in self.ops)

    @property
    def bytes(self) -> float:
        """Read from HBM and written there; what a hidden collective brings is written once."""
        brought = sum(each.bytes * op.times for op in self.ops if op.hides for each in op.collectives)
        return brought + sum(op.bytes * op.times for op in self.ops)

    @property
    def ici_bytes(self) -> float:
        return sum(each.ici_bytes * op.times for op in self.ops for each in op.collectives)

    @property
    def dcn_bytes(self) -> float:
        return sum(each.dcn_bytes * op.times for op in self.ops for each in op.collectives)

    @property
    def kernels(self) -> list[Op]:
        return [op for op in self.ops if op.kernel and not op.instruction.cycles]

    @property
    def exposed(self) -> list[Op]:
        """Collectives during which a device does nothing else."""
        return [op for op in self.ops if op.collectives and not op.hides]

    def by_part(self) -> Counter[tuple[str, str]]:
        """Cycles by (part, direction). What has no scope of its own goes to the part that fills its loop."""
        return self._by(lambda op, part: (part, "" if part == "optimizer" else op.direction))

    def by_kind(self) -> Counter[str]:
        return self._by(lambda op, part: op.kind)

    def _by(self, key) -> Counter:
        loops: dict[tuple[str, ...], Counter[str]] = {}
        for op in self.ops:
            if op.scope and op.loops:
                loops.setdefault(op.loops, Counter())[op.scope] += op.cycles
        counts = Counter()
        for op in self.ops:
            own = op.scope or (loops[op.loops].most_common(1)[0][0] if op.loops in loops else "other")
            counts[key(op, own)] += op.cycles
        return +counts  # without zeros


def profile(text: str, slices: Sequence[int]) -> Profile:
    """The profile of a module's text; `slices` names the slice of each of the program's devices."""
    module = parse(text)
    ops = list(_executed(module, module.entry, 1, (), slices, {}))
    # A collective that is spread over several fusions, and even over the rounds of a loop, is in each of them under one
    # channel; it runs as often as the one that runs least, which begins it.
    begins: dict[tuple, int] = {}
    for i, op in enumerate(ops):
        for each in op.collectives:
            if each.channel and (each.key not in begins or op.times < ops[begins[each.key]].times):
                begins[each.key] = i
    return Profile(tuple(dataclasses.replace(op, collectives=tuple(
        each for each in op.collectives if begins.get(each.key, i) == i)) for i, op in enumerate(ops)))


def _executed(module: Module, computation: Computation, times: int, loops: tuple[str, ...], slices: Sequence[int],
              known: Known) -> Iterator[Op]:
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            body = module.computations[instruction.attribute(r"body=%?([\w.\-]+)")]
            count, entry = trips(module, computation, instruction, known)
            # A loop whose length is known at run time alone counts as one round.
            count = 1 if count is None else count
            yield from _executed(module, body, times * count, (*loops, body.name), slices, entry)
            continue
        if opcode in ("call", "async-start") or opcode == "custom-call" and instruction.calls in module.computations:
            inner = _executed(module, module.computations[instruction.calls], times, loops, slices, {})
            yield from (dataclasses.replace(op, started=op.started or opcode == "async-start") for op in inner)
        elif opcode == "conditional":
            names = re.findall(r"%?([\w.\-]+)", instruction.attribute(r"branch_computations=\{([^}]*)\}") or "")
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            branches = [list(_executed(module, module.computations[name], times, loops, slices, {}))
                        for name in names]
            yield from max(branches, key=lambda ops: sum(op.cycles for op in ops), default=[])
        if opcode in costs.FREE and not costs.is_collective(instruction):
            continue
        inner = [(instruction, computation)]
        if opcode == "fusion":
            inside = module.computations[instruction.calls]
            inner = [(each, inside) for each in inside.instructions.values()]
        found = (costs.collective(each, place, slices) for each, place in inner)
        kernel = costs.KERNEL in instruction.attributes
        work = costs.kernel_flops(instruction, computation) if kernel else sum(costs.flops(*pair) for pair in inner)
        yield Op(instruction, times, loops, work, costs.hbm_bytes(instruction, computation, module),
                 tuple(filter(None, found)), kernel)
