"""What single instructions of optimised HLO cost: floating-point operations, bytes of HBM, bytes between chips."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava_jax.plan.hlo import Array, Computation, Instruction, Module

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "async-start", "partition-id", "replica-id", "opt-barrier", "send", "recv"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
TRANSFER = "_xla_megascale_transfer_type"
"""marks what is sent to other slices, after the reduction within each"""
KERNEL = 'custom_call_target="tpu_custom_call"'


def flops(instruction: Instruction, computation: Computation) -> float:
    """Of a dot or a convolution, which is what XLA makes of a matrix product on a TPU; 0 for anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (each.shape[0] for each in computation.operands(instruction))
    result = instruction.shape[0]
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2.0 * result.size * math.prod(left.dims[axis] for axis in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    settings = {name: value.split("x") for name, value in re.findall(r"(\w+)=(\S+)", window)}
    products = right.dims[labels[2].index("i")] * math.prod(result.dims[labels[3].index(label)] for label in "bf")
    for axis in range(len(settings.get("size", ()))):
        get = lambda name, default: settings[name][axis] if name in settings else default  # noqa: E731, B023
        products *= _valid(
            left.dims[labels[1].index(str(axis))], int(get("size", 1)), result.dims[labels[3].index(str(axis))],
            int(get("stride", 1)), int(get("pad", "0_0").split("_")[0]), int(get("lhs_dilate", 1)),
            int(get("rhs_dilate", 1)))
    return 2.0 * products


@lru_cache
def _valid(length: int, size: int, results: int, stride: int, pad: int, dilate: int, spread: int) -> int:
    """Pairs of a result and a kernel position along one axis that meet an element and not padding or a hole.

    Batched products become convolutions whose window is mostly holes.
    """
    places = np.arange(results)[:, None] * stride + np.arange(size) * spread - pad
    return int(((places % dilate == 0) & (places >= 0) & (places // dilate < length)).sum())


def kernel_flops(kernel: Instruction, computation: Computation) -> float:
    """Of splash attention's Pallas kernels, by their shapes and blocks; 0 for a kernel that is not known.

    A causal kernel visits the blocks on and below the diagonal whole (it has tables of them, int8, among its operands;
    without a mask it has none). Forward it makes two products of a block of scores' size, in the fused backward five.
    """
    found = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", kernel.op_name + kernel.name)
    heads = [each.shape[0] for each in computation.operands(kernel)
             if each.shape and each.shape[0].dtype in ("bf16", "f32") and len(each.shape[0].dims) >= 3]
    if not found or len(heads) < 2:
        return 0.0
    query, key = heads[0], heads[1]
    length, keys = query.dims[-2], key.dims[-2]
    block = max(_blocks(kernel, "block_q", length), _blocks(kernel, "block_kv", keys))
    products = {"fwd": 2, "dkv": 5, "dq": 3}[found[1]]
    causal = any(array.dtype == "s8" for each in computation.operands(kernel) for array in each.shape)
    seen = length * keys * ((1 + block / length) / 2 if causal else 1)
    return 2.0 * products * math.prod(query.dims[:-2]) * seen * query.dims[-1]


def _blocks(kernel: Instruction, name: str, default: int) -> int:
    found = kernel.attribute(rf'\\?"{name}\\?": (\d+)')
    return min(int(found), default) if found else default


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that an instruction reads from HBM and writes there: operands and results that lie in HBM.

    Of an operand that a fusion only slices, the slices count; of a result that it only updates, the update. What a
    collective inside a fusion moves passes through and counts with the collective.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0.0
    if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        target, source = instruction.shape[0], instruction.shape[1]
        return target.bytes * ((not target.fast) + (not source.fast))
    reads = [each.shape for each in computation.operands(instruction)]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.calls]
        return _fused_bytes(instruction, reads, inside)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _slow(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _slow(reads[1])
    return _slow(instruction.shape) + sum(_slow(shape) for shape in reads)


def _fused_bytes(fusion: Instruction, reads: list[tuple[Array, ...]], inside: Computation) -> float:
    parameters = {int(each.attributes): each.name
                  for each in inside.instructions.values() if each.opcode == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for each in inside.instructions.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    moved = {array for each in inside.instructions.values() if is_collective(each)
             for shape in (each.shape, *(operand.shape for operand in inside.operands(each))) for array in shape}
    moved = {(array.dtype, array.dims) for array in moved}
    keep = lambda shape: [array for array in shape if (array.dtype, array.dims) not in moved]  # noqa: E731
    total = 0.0
    for number, shape in enumerate(reads):
        uses = users.get(parameters.get(number, ""), [])
        if uses and all(use.opcode in ("dynamic-slice", "slice") for use in uses):
            total += 0 if shape[0].fast else sum(use.shape[0].bytes for use in uses)
        elif not (uses and all(_is_updated(use, parameters[number]) for use in uses)):
            total += _slow(keep(shape))
    root = inside.root
    while root.opcode in ("bitcast", "copy") and root.operands:
        root = inside.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        update = inside.instructions[root.operands[1]]
        return total + (0 if fusion.shape[0].fast else update.shape[0].bytes)
    return total + _slow(keep(fusion.shape))


def _is_updated(use: Instruction, name: str) -> bool:
    return use.opcode == "dynamic-update-slice" and use.operands[0] == name


def _slow(shape: Sequence[Array]) -> float:
    return sum(array.bytes for array in shape if not array.fast)


@dataclass(frozen=True)
class Collective:
    """What one device sends in one collective operation."""

    kind: str
    bytes: float
    """of the whole array: what an all-gather makes, what a reduction reads"""
    group: int
    """devices that take part"""
    slices: int
    """slices that they lie on"""
    channel: str | None = None

    @property
    def key(self) -> tuple:
        """The same in all pieces of one operation; what goes between slices has channels of its own."""
        return self.kind, self.slices, self.channel

    @property
    def ici_bytes(self) -> float:
        """Sent within a slice, along a ring (its lower bound for any algorithm)."""
        return self._sent(self.group // self.slices)

    @property
    def dcn_bytes(self) -> float:
        """Sent to other slices, where every device of a slice carries its share."""
        return self._sent(self.slices) / (self.group // self.slices)

    def _sent(self, ring: int) -> float:
        if self.kind == "collective-permute":
            return self.bytes if ring > 1 else 0.0
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (ring - 1) / ring


def is_collective(instruction: Instruction) -> bool:
    between = instruction.opcode == "send" and TRANSFER in instruction.attributes
    return between or instruction.opcode.removesuffix("-start") in COLLECTIVES


def collective(instruction: Instruction, computation: Computation, slices: Sequence[int]) -> Collective | None:
    """The collective operation that an instruction is; None if it is none. `slices`: the slice of every device."""
    if not is_collective(instruction):
        return None
    channel = instruction.attribute(r"channel_id=(\d+)")
    if instruction.opcode == "send":
        kind = instruction.attribute(rf'{TRANSFER}="(\w+)"').lower().replace("_", "-")
        count = len(set(slices))
        return Collective(kind, instruction.shape[0].bytes, count, count, channel)
    kind = instruction.opcode.removesuffix("-start")
    reads = [each.shape for each in computation.operands(instruction)]
    if kind in ("all-gather", "collective-broadcast"):
        # A started one holds its operands and results side by side.
        arrays = instruction.shape[len(reads):] if instruction.opcode.endswith("-start") else instruction.shape
    else:
        arrays = [array for shape in reads for array in shape]
    if kind == "all-reduce" and _is_sliced(instruction, computation):
        kind = "reduce-scatter"
    groups = replica_groups(instruction, len(slices))
    spans = {slices[device] for device in groups[0]}
    return Collective(kind, sum(array.bytes for array in arrays), len(groups[0]), len(spans), channel)


def _is_sliced(reduction: Instruction, computation: Computation) -> bool:
    """Whether each device goes on with its part alone, inside one fusion: XLA's reduce-scatter on TPUs."""
    users = [each for each in computation.instructions.values() if reduction.name in each.operands]
    return bool(users) and all(use.opcode == "dynamic-slice" for use in users)


def replica_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of devices of a collective, [groups, members], from any of the ways in which HLO writes them."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", found[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        order = re.search(r"device_ids=\(([^)]*)\)|device_ids=\[([^\]]*)\]", text)
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if order and (listed := _numbers(order[1] or order[2])):
            ids = np.array(listed).reshape(sizes)
        return _over_axes(ids, names, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(math.prod(_numbers(found[2]))).reshape(_numbers(found[2]))
        return (ids.transpose(_numbers(found[3])) if found[3] else ids).reshape(_numbers(found[1]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        return np.array(json.loads(found[1].replace("{", "[").replace("}", "]").join("[]")))
    return np.arange(devices)[None]


def _over_axes(ids: np.ndarray, names: list[str], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes of a mesh; of an axis, `:(m)k` is its part of size k that has m before it."""
    shape, labels = [], []
    for name, size in zip(names, ids.shape, strict=True):
        parts = sorted((int(before), int(part)) for other, before, part in chosen if other == name and part)
        if not parts:
            shape, labels = [*shape, size], [*labels, (name, None)]
            continue
        done = 1
        for before, part in parts:
            shape += [before // done, part]
            labels += [(name, "rest"), (name, before)]
            done = before * part
        shape, labels = [*shape, size // done], [*labels, (name, "rest")]
    wanted = [(name, int(before) if part else None) for name, before, part in chosen]
    inside = [labels.index(label) for label in wanted]
    outside = [axis for axis in range(len(labels)) if axis not in inside]
    return ids.reshape(shape).transpose(outside + inside).reshape(-1, math.prod(shape[axis] for axis in inside))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]
