"""Profiles a compiled program: every executed instruction with its cycles, and sums over them."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llava_jax.plan import costs
from llava_jax.plan.hlo import Computation, Instruction, Module, parse
from llava_jax.plan.loops import Value, trip_count

PARTS = ("vision", "projector", "decoder", "loss", "optimizer")
"""Names of the scopes that the model and the step open."""


@dataclass(frozen=True)
class Op:
    """Represents an instruction that runs `times` times in a step. Costs are those of one run."""

    instruction: Instruction
    times: int
    loops: tuple[str, ...]
    """Names of the bodies of the loops around it, outermost first."""
    flops: float
    """Floating-point operations of its matrix products."""
    bytes: float
    """Bytes to and from HBM."""
    collectives: tuple[costs.Collective, ...]
    """Collectives that run in it."""
    kernel: bool
    """Whether it is a Pallas kernel, for which the compiler gives no cycles."""
    asynchronous: bool = False
    """Whether it runs beside the instructions between its start and its end."""

    @property
    def cycles(self) -> int:
        """Cycles of all runs; 0 for an asynchronous instruction."""
        return 0 if self.asynchronous else self.instruction.cycles * self.times

    @property
    def hides(self) -> bool:
        """Whether its collectives overlap with computation: asynchronous, or fused with it."""
        name, opcode = self.instruction.name, self.instruction.opcode
        fused = opcode == "fusion" and (self.instruction.cycles > 0 or "-start" in name)
        return self.asynchronous or fused or opcode == "send" or opcode.endswith("-start")

    @property
    def scope(self) -> str | None:
        """Outermost of PARTS in whose scope it was traced; None outside of them."""
        name = self.instruction.op_name
        found = re.search(rf"\b({'|'.join(PARTS)})\b", name) if name.startswith("jit(") else None
        return found[1] if found else None

    @property
    def direction(self) -> str:
        """Pass that it belongs to: forward, backward, or recompute (the forward pass inside the backward pass)."""
        name = self.instruction.op_name
        if "rematted_computation" in name:
            return "recompute"
        return "backward" if "transpose(" in name else "forward"


@dataclass(frozen=True)
class Profile:
    """Holds the executed instructions of a program on one device."""

    ops: tuple[Op, ...]

    @property
    def cycles(self) -> int:
        """Cycles that the compiler estimates; kernels and exposed collectives have none."""
        return sum(op.cycles for op in self.ops)

    @property
    def flops(self) -> float:
        """Operations of all matrix products and known kernels, recomputation included."""
        return sum(op.flops * op.times for op in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes to and from HBM; what a hidden collective receives is written once."""
        received = self._collectives(lambda collective: collective.bytes, (op for op in self.ops if op.hides))
        return received + sum(op.bytes * op.times for op in self.ops)

    @property
    def ici_bytes(self) -> float:
        return self._collectives(lambda collective: collective.ici_bytes, self.ops)

    @property
    def dcn_bytes(self) -> float:
        return self._collectives(lambda collective: collective.dcn_bytes, self.ops)

    @property
    def kernels(self) -> list[Op]:
        return [op for op in self.ops if op.kernel and not op.instruction.cycles]

    @property
    def exposed(self) -> list[Op]:
        """Collectives during which a device does nothing else."""
        return [op for op in self.ops if op.collectives and not op.hides]

    def by_part(self) -> Counter[tuple[str, str]]:
        """Returns cycles by (part, direction). Instructions outside of all scopes belong to the main part of their
        loop."""
        main: dict[tuple[str, ...], Counter[str]] = {}
        for op in self.ops:
            if op.scope and op.loops:
                main.setdefault(op.loops, Counter())[op.scope] += op.cycles
        counts = Counter()
        for op in self.ops:
            part = op.scope or (main[op.loops].most_common(1)[0][0] if op.loops in main else "other")
            counts[part, "" if part == "optimizer" else op.direction] += op.cycles
        return +counts  # without zeros

    def _collectives(self, size: Callable[[costs.Collective], float], ops: Iterator[Op] | Sequence[Op]) -> float:
        return sum(size(collective) * op.times for op in ops for collective in op.collectives)


def profile(text: str, slices: Sequence[int], rounds: Sequence[int] = ()) -> Profile:
    """Returns the profile of a module's text. `slices` has the slice of every device of the program.

    `rounds`: rounds of loops whose length is known only at run time, of the outermost first. Further ones count once.
    """
    module = parse(text)
    ops = list(_executed(module, module.entry, 1, (), slices, [], rounds))
    # XLA may spread a collective over several fusions, or over the rounds of a loop. All pieces have its channel. It
    # is counted in the piece that runs least often, which starts it.
    first: dict[tuple, int] = {}
    for i, op in enumerate(ops):
        for collective in op.collectives:
            key = collective.key
            if collective.channel and (key not in first or op.times < ops[first[key]].times):
                first[key] = i
    return Profile(tuple(dataclasses.replace(op, collectives=tuple(
        collective for collective in op.collectives if first.get(collective.key, i) == i))
        for i, op in enumerate(ops)))


def _executed(module: Module, computation: Computation, times: int, loops: tuple[str, ...], slices: Sequence[int],
              arguments: list[Value], unknown: Sequence[int]) -> Iterator[Op]:
    """Yields the instructions that a computation executes, those of loops, calls and branches included."""

    def inner(name: str) -> Iterator[Op]:
        return _executed(module, module.computations[name], times, loops, slices, [], unknown)

    for instruction in computation.instructions.values():
        opcode, called = instruction.opcode, instruction.calls
        if opcode == "while":
            body = module.computations[instruction.attribute(r"body=%?([\w.\-]+)")]
            rounds, state = trip_count(module, computation, instruction, arguments)
            further = unknown
            if rounds is None:
                rounds, further = (unknown[0], unknown[1:]) if unknown else (1, ())
            yield from _executed(module, body, times * rounds, (*loops, body.name), slices, [state], further)
        elif opcode == "async-start":
            yield from (dataclasses.replace(op, asynchronous=True) for op in inner(called))
        elif opcode == "call" or opcode == "custom-call" and called in module.computations:
            yield from inner(called)
        if opcode not in costs.FREE or costs.is_collective(instruction):
            yield _op(module, computation, instruction, times, loops, slices)


def _op(module: Module, computation: Computation, instruction: Instruction, times: int, loops: tuple[str, ...],
        slices: Sequence[int]) -> Op:
    parts = [(instruction, computation)]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.calls]
        parts = [(part, inside) for part in inside.instructions.values()]
    collectives = (costs.collective(part, parent, slices) for part, parent in parts)
    kernel = costs.KERNEL in instruction.attributes
    work = costs.kernel_flops(instruction) if kernel else sum(costs.flops(*part) for part in parts)
    return Op(instruction, times, loops, work, costs.hbm_bytes(instruction, computation, module),
              tuple(filter(None, collectives)), kernel)
