"""Optimised HLO text, read: computations of instructions, their shapes, operands and attributes.

The text is what XLA prints for a scheduled module. An instruction begins on a line of its own, indented by two spaces,
and may go on over further lines (a kernel's metadata holds line breaks); a computation ends with a line that is `}`, or
`}` and the name of the core that it runs on.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

from llava_jax.errors import UserError

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2,
              "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_START = re.compile(r"  (ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Array:
    """An array's type; `fast` where it lies in the chip's own memory (VMEM or SMEM) and not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * ITEM_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    """the result's arrays; one unless it is a tuple"""
    operands: tuple[str, ...]
    attributes: str
    """everything behind the operands"""
    root: bool = False

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def cycles(self) -> int:
        """The compiler's estimate of what it takes; 0 where it gives none."""
        return int(self.attribute(r'"estimated_cycles":"?(\d+)') or 0)

    @cached_property
    def op_name(self) -> str:
        """Where in the traced program it comes from, scopes joined by slashes; "" if unknown."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @cached_property
    def calls(self) -> str | None:
        """The computation inside a fusion, a call or an asynchronous operation."""
        return self.attribute(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """The module of a text; UserError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    current, entry, lines = None, None, []

    def flush() -> None:
        if lines:
            instruction = _instruction("\n".join(lines))
            current.instructions[instruction.name] = instruction
            lines.clear()

    for line in text.splitlines():
        if current is None:
            if not line.startswith(" ") and (found := _HEADER.match(line)):
                current = computations[found[2]] = Computation(found[2])
                entry = current if found[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            flush()
            current = None
        elif _START.match(line):
            flush()
            lines.append(line)
        elif lines:
            lines.append(line)
    if entry is None:
        raise UserError("no HLO module: the text has no ENTRY computation")
    return Module(computations, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a printed shape such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
                 for dtype, dims, layout in _ARRAY.findall(shape))


def _instruction(text: str) -> Instruction:
    root, name, rest = _START.match(text).groups()
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _balanced("(" + rest) - 1
    inside, attributes = rest[: end - 1], rest[end:].lstrip(", ")
    if opcode in ("constant", "parameter"):  # a value, a number: no operands
        return Instruction(name, opcode, arrays(shape), (), inside, bool(root))
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside))
    return Instruction(name, opcode, arrays(shape), operands, attributes, bool(root))


def _split(text: str) -> list[str]:
    """Operands, which older texts write with their types: at commas outside of brackets and comments."""
    text = re.sub(r"/\*.*?\*/|\[[^\]]*\]|\{[^}]*\}", "", text)
    return [part for part in text.split(",") if part.strip()]


def _balanced(text: str) -> int:
    """The length of the parenthesised part that `text` begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise UserError(f"unbalanced parentheses: {text[:80]}")
