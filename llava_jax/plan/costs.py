"""Finds the collectives of optimised HLO, and what they send."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.plan.hlo import Computation, Instruction
from llava_jax.plan.topologies import Chip

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional", "after-all", "partition-id",
        "replica-id", "opt-barrier", "recv"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
TRANSFER = "_xla_megascale_transfer_type"
"""Attribute of an instruction that sends to other slices, after the reduction within every slice."""


@dataclass(frozen=True)
class Collective:
    """Describes a collective operation, and what one device sends in it."""

    kind: str
    bytes: float
    """Bytes of the complete array: the result of an all-gather, the operand of a reduction."""
    group: int
    """Number of participating devices."""
    slices: int
    """Number of slices that they belong to."""
    channel: str
    """Name of its channel, or of the instruction if it has none."""

    @property
    def key(self) -> tuple:
        """Identity of the operation, shared by all its pieces."""
        return self.slices, self.channel

    @property
    def ici_bytes(self) -> float:
        """Bytes sent within a slice along a ring, the lower bound of any algorithm."""
        return self._sent(self.group // self.slices)

    @property
    def dcn_bytes(self) -> float:
        """Bytes sent to other slices, if every device of a slice sends its share."""
        return self._sent(self.slices) / (self.group // self.slices)

    def transfer(self, chip: Chip) -> tuple[str, float]:
        """Returns the network that limits it, and its seconds there."""
        # An all-reduce sends twice the bytes of an all-gather at twice the measured rate: it uses both axes of a torus.
        rate = chip.ici / chip.devices * (2 if self.kind == "all-reduce" else 1)
        within, between = self.ici_bytes / rate, self.dcn_bytes / chip.dcn * chip.devices if chip.dcn else 0.0
        return ("dcn", between) if between > within else ("ici", within)

    def _sent(self, ring: int) -> float:
        if self.kind == "collective-permute":
            return self.bytes if ring > 1 else 0.0
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (ring - 1) / ring


def is_collective(instruction: Instruction) -> bool:
    between = instruction.opcode == "send" and TRANSFER in instruction.attributes
    return between or instruction.opcode.removesuffix("-start") in COLLECTIVES


def collective(instruction: Instruction, computation: Computation, slices: Sequence[int]) -> Collective | None:
    """Returns the collective operation of an instruction, or None. `slices` has the slice of every device."""
    if not is_collective(instruction):
        return None
    channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
    if instruction.opcode == "send":
        kind = instruction.attribute(rf'{TRANSFER}="(\w+)"').lower().replace("_", "-")
        count = len(set(slices))
        return Collective(kind, instruction.shape[0].bytes, count, count, channel)
    kind = instruction.opcode.removesuffix("-start")
    reads = [operand.shape for operand in computation.operands(instruction)]
    if kind in ("all-gather", "collective-broadcast"):
        # The shape of an asynchronous start has the operands before the results.
        arrays = instruction.shape[len(reads):] if instruction.opcode.endswith("-start") else instruction.shape
    else:
        arrays = [array for shape in reads for array in shape]
    if kind == "all-reduce" and _is_sliced(instruction, computation):
        kind = "reduce-scatter"
    group = first_group(instruction, len(slices))
    spans = {slices[device] for device in group}
    return Collective(kind, sum(array.bytes for array in arrays), len(group), len(spans), channel)


def _is_sliced(reduction: Instruction, computation: Computation) -> bool:
    """Returns whether every device uses only its part of the result, which is XLA's reduce-scatter on TPUs."""
    users = [user for user in computation.instructions.values() if reduction.name in user.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def first_group(instruction: Instruction, devices: int) -> list[int]:
    """Returns the devices of the first group of a collective, of which all groups have as many."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])]
        strides = {name: math.prod(size for _, size in axes[i + 1 :]) for i, (name, _) in enumerate(axes)}
        group = [0]
        # `:(m)k` of an axis is its part of size k that has m before it.
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2]):
            size = dict(axes)[name]
            count = int(part or size)
            stride = strides[name] * size // (int(before or 1) * count)
            group = [first + i * stride for first in group for i in range(count)]
        ids = _numbers(instruction.attribute(r"device_ids=[(\[]([\d,]+)[)\]]"))
        return [ids[i] for i in group] if ids else group
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape(_numbers(found[2]))
        return ids.transpose(_numbers(found[3]) or None).reshape(_numbers(found[1]))[0].tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text)
    return _numbers(found[1]) if found else list(range(devices))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]
