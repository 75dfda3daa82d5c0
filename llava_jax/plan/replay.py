"""Replays a compiled program on one device: every executed instruction in the order of the schedule."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llava_jax.plan import costs, kernels
from llava_jax.plan.hlo import Computation, Instruction, Module, parse
from llava_jax.plan.topologies import Slice

PARTS = ("vision", "projector", "decoder", "loss", "optimizer")
"""Names of the scopes that the model and the step open."""
NESTING = ("fusion", "call", "custom-call", "async-start")
"""Opcodes whose computations are parts of the instruction."""
SETTLED_ROUNDS = 4
"""Number of rounds of a loop that are replayed. Further rounds are like the last of them."""


@dataclass(frozen=True)
class Op:
    """Represents an instruction that runs `times` times in a step. Costs are those of one run."""

    instruction: Instruction
    times: int
    collectives: tuple[costs.Collective, ...]
    """Collectives that it starts or runs."""
    awaits: tuple[tuple, ...] = ()
    """Keys of the collectives for whose end it waits."""
    kernel: kernels.Kernel | None = None
    """The Pallas kernel that it is. The compiler gives kernels no cycles."""

    @property
    def cycles(self) -> int:
        """Cycles of all runs."""
        return self.instruction.cycles * self.times

    @property
    def asynchronous(self) -> bool:
        """Whether its collectives continue while later instructions run."""
        return self.instruction.opcode == "send" or "-start" in self.instruction.opcode + self.instruction.name

    @property
    def scope(self) -> str | None:
        """Outermost of PARTS in whose scope it was traced; None outside of them."""
        name = self.instruction.op_name
        found = re.search(rf"\b({'|'.join(PARTS)})\b", name) if name.startswith("jit(") else None
        return found[1] if found else None


@dataclass(frozen=True)
class Loop:
    """Represents a loop of the schedule."""

    rounds: int
    body: "tuple[Op | Loop, ...]"


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one device."""

    cycles: float
    """Cycles of the compiler over the clock."""
    kernels: float
    """Pallas kernels, by the cycles of their own schedules."""
    waits: float
    """Waiting for collectives: those that nothing hides, and the remainder of those that are hidden in part."""

    @property
    def step(self) -> float:
        """Predicted seconds of a step."""
        return self.cycles + self.kernels + self.waits


@dataclass(frozen=True)
class Profile:
    """Holds the schedule of a program on one device."""

    schedule: tuple[Op | Loop, ...]

    @property
    def ops(self) -> list[Op]:
        return list(_flat(self.schedule))

    @property
    def cycles(self) -> int:
        """Cycles that the compiler estimates; kernels and waiting have none."""
        return sum(op.cycles for op in self.ops)

    @property
    def ici_bytes(self) -> float:
        """Bytes that a device sends within its slice."""
        return sum(collective.ici_bytes * op.times for op in self.ops for collective in op.collectives)

    @property
    def dcn_bytes(self) -> float:
        """Bytes that a device sends to other slices."""
        return sum(collective.dcn_bytes * op.times for op in self.ops for collective in op.collectives)

    @property
    def kernels(self) -> list[Op]:
        return [op for op in self.ops if op.kernel]

    def by_part(self) -> Counter[str]:
        """Returns cycles by part. Instructions outside of all scopes belong to the main part of their loop."""
        return +_by_part(self.schedule, False)  # without zeros


def profile(text: str, slices: Sequence[int], rounds: int = 1) -> Profile:
    """Returns the profile of a module's text. `slices` has the slice of every device of the program.

    `rounds`: rounds of outer loops whose length is known only at run time. Such loops inside of them count once.
    """
    module = parse(text)
    schedule = tuple(_executed(module, module.entry, 1, slices, (), rounds))
    # XLA may spread a collective over several fusions, or over the rounds of a loop. All pieces have its channel. It
    # is counted in the piece that runs least often, which starts it.
    first: dict[tuple, Op] = {}
    for op in _flat(schedule):
        for collective in op.collectives:
            if collective.key not in first or op.times < first[collective.key].times:
                first[collective.key] = op

    def counted(step: Op | Loop) -> Op | Loop:
        if isinstance(step, Loop):
            return replace(step, body=tuple(map(counted, step.body)))
        kept = tuple(collective for collective in step.collectives if first[collective.key] is step)
        return replace(step, collectives=kept)

    return Profile(tuple(map(counted, schedule)))


def times(found: Profile, where: Slice, steps: int = 1) -> Times:
    """Replays a profile on a device of a slice. Collectives of one network share its links and run one by one.

    `steps`: number of steps of kernels whose grid is known only at run time.
    """
    chip = where.chip
    seconds = {id(op): op.instruction.cycles / chip.clock for op in found.ops}
    seconds |= {id(op): op.kernel.seconds(chip, steps) for op in found.kernels}
    state: dict = {"now": 0.0, "waits": 0.0}  # also: when a network is free, when a collective ends

    def wait(until: float) -> None:
        state["waits"] += max(0.0, until - state["now"])
        state["now"] = max(until, state["now"])

    def run(schedule: Sequence[Op | Loop]) -> None:
        for step in schedule:
            if isinstance(step, Loop):
                repeat(step)
                continue
            for collective in step.collectives:
                network, duration = collective.transfer(chip)
                state[network] = state[collective.key] = max(state["now"], state.get(network, 0.0)) + duration
            state["now"] += seconds[id(step)]
            ends = step.awaits if step.asynchronous else (*step.awaits, *(each.key for each in step.collectives))
            wait(max((state.get(key, 0.0) for key in ends), default=0.0))

    def repeat(loop: Loop) -> None:
        before = {}
        for _ in range(min(loop.rounds, SETTLED_ROUNDS)):
            before = dict(state)
            run(loop.body)
        for key in before:
            state[key] += max(0, loop.rounds - SETTLED_ROUNDS) * (state[key] - before[key])

    run(found.schedule)
    total = sum(op.times * seconds[id(op)] for op in found.kernels)
    return Times(found.cycles / chip.clock, total, state["waits"])


def _flat(schedule: Sequence[Op | Loop]) -> Iterator[Op]:
    for step in schedule:
        yield from _flat(step.body) if isinstance(step, Loop) else (step,)


def _by_part(schedule: Sequence[Op | Loop], inside: bool) -> Counter[str]:
    counts = Counter()
    for op in schedule:
        if isinstance(op, Op):
            counts[op.scope] += op.cycles
    bare = counts.pop(None, 0)
    counts[counts.most_common(1)[0][0] if inside and counts else "other"] += bare
    return sum((_by_part(loop.body, True) for loop in schedule if isinstance(loop, Loop)), counts)


def _executed(module: Module, computation: Computation, runs: int, slices: Sequence[int], state: Sequence[Instruction],
              unknown: int) -> Iterator[Op | Loop]:
    """Yields what a computation executes, calls included."""
    for instruction in computation.instructions.values():
        opcode, called = instruction.opcode, instruction.calls
        if opcode == "while":
            body = module.computations[instruction.attribute(r"body=%?([\w.\-]+)")]
            entry = computation.source(computation.instructions[instruction.operands[0]], state)
            carried = [computation.source(each, state) for each in computation.operands(entry)]
            count = module.trip_count(instruction, carried)
            rounds, inner = (unknown, 1) if count is None else (count, unknown)
            yield Loop(rounds, tuple(_executed(module, body, runs * rounds, slices, carried, inner)))
        elif opcode == "call" or opcode == "custom-call" and called in module.computations:
            yield from _executed(module, module.computations[called], runs, slices, (), unknown)
        elif opcode not in costs.FREE or costs.is_collective(instruction):
            yield _op(module, computation, instruction, runs, slices)


def _op(module: Module, computation: Computation, instruction: Instruction, runs: int, slices: Sequence[int]) -> Op:
    if kernels.is_kernel(instruction):
        return Op(instruction, runs, (), kernel=kernels.kernel(instruction, computation))
    start, ends = instruction, "-done" in instruction.opcode + instruction.name
    if instruction.opcode.endswith("-done"):
        while start is not None and "-start" not in start.opcode and start.opcode != "send":
            start = computation.instructions.get(start.operands[0]) if start.operands else None
    parts = _parts(module, computation, start) if start else ()
    found = tuple(filter(None, (costs.collective(*part, slices) for part in parts)))
    if ends:
        return Op(instruction, runs, (), tuple(collective.key for collective in found))
    return Op(instruction, runs, found)


def _parts(module: Module, computation: Computation, instruction: Instruction
           ) -> Iterator[tuple[Instruction, Computation]]:
    """Yields an instruction, or those inside a fusion or an asynchronous operation, with their computations."""
    if instruction.opcode in NESTING and instruction.calls in module.computations:
        inside = module.computations[instruction.calls]
        for part in inside.instructions.values():
            yield from _parts(module, inside, part)
    else:
        yield instruction, computation
