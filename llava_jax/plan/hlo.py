"""Parses optimised HLO text into computations of instructions, with their shapes, operands and attributes.

The text is what XLA prints for a scheduled module. An instruction starts on its own line, indented by two spaces, and
may continue on further lines, because a kernel's metadata contains line breaks. A computation ends with a line `}`, or
`}` and the name of the core that runs it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llava_jax.errors import UserError

IDENTITIES = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier"}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)
_NEXT = re.compile(r"\n(?=  (?:ROOT )?%?[\w.\-]+ = )")
_END = re.compile(r"^\}(?:, execution_thread=.*)?$", re.MULTILINE)
_START = re.compile(r"  (ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Array:
    """Describes the type of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)  # of bf16 or f8e4m3fn; a token has none
        return math.prod(self.dims) * (1 if self.dtype == "pred" else int(bits[0]) / 8 if bits else 0)


@dataclass(frozen=True)
class Instruction:
    """Represents an instruction of a computation."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    """Arrays of the result; one unless it is a tuple."""
    operands: tuple[str, ...]
    attributes: str
    """Text behind the operands; of a constant its value, of a parameter its number."""
    root: bool = False

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def cycles(self) -> int:
        """Cycles that the compiler estimates; 0 without an estimate."""
        return int(self.attribute(r'"estimated_cycles":"?(\d+)') or 0)

    @cached_property
    def op_name(self) -> str:
        """Scopes of the traced program that it comes from, joined by slashes; "" if unknown."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @cached_property
    def calls(self) -> str | None:
        """Name of the computation inside a fusion, a call or an asynchronous operation."""
        return self.attribute(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")


@dataclass
class Computation:
    """Holds the instructions of a computation by their names."""

    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def source(self, instruction: Instruction, state: Sequence[Instruction]) -> Instruction:
        """Follows copies and tuples to the instruction that computes a value. `state`: sources of the parameter."""
        while operands := self.operands(instruction):
            if instruction.opcode == "get-tuple-element":
                index, of = int(instruction.attribute(r"index=(\d+)")), self.source(operands[0], state)
                if of.opcode == "parameter" and index < len(state):
                    return state[index]
                if of.opcode != "tuple":
                    return instruction
                instruction = self.instructions[of.operands[index]]
            elif instruction.opcode in IDENTITIES:
                instruction = operands[0]
            else:
                return instruction
        return instruction


@dataclass
class Module:
    """Holds the computations of a program by their names."""

    computations: dict[str, Computation]
    entry: Computation

    def trip_count(self, loop: Instruction, state: Sequence[Instruction]) -> int | None:
        """Returns the rounds of a `while`, or None if its condition is none of a counter and one constant.

        The counter grows by 1, as in all of JAX's loops. XLA may have peeled the first rounds off.

        Args:
          state: sources of what the loop carries, on entry.
        """
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        inside = [*condition.instructions.values()]
        if condition.root.calls:
            inside += self.computations[condition.root.calls].instructions.values()
        bounds = [each.attributes for each in inside if each.opcode == "constant"]
        counters = [each.attribute(r"index=(\d+)") for each in inside if each.opcode == "get-tuple-element"]
        directions = [each.attribute(r"direction=(\w+)") for each in inside if each.opcode == "compare"]
        if len(bounds) != 1 or len(counters) != 1 or directions != ["LT"]:
            return None
        start = state[int(counters[0])]
        return max(0, int(bounds[0]) - int(start.attributes)) if start.opcode == "constant" else None


def parse(text: str) -> Module:
    """Parses a module. Raises UserError if the text has no entry computation."""
    computations, entry = {}, None
    for block in _END.split(text):
        if header := _HEADER.search(block):
            instructions = [_instruction(part) for part in _NEXT.split(block[header.end() :].rstrip())[1:]]
            found = computations[header[2]] = Computation({each.name: each for each in instructions})
            entry = found if header[1] else entry
    if entry is None:
        raise UserError("no HLO module: the text has no ENTRY computation")
    return Module(computations, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """Parses a printed shape such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(shape))


def _instruction(text: str) -> Instruction:
    root, name, rest = _START.match(text).groups()
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _balanced("(" + rest) - 1
    inside, attributes = rest[: end - 1], rest[end:].lstrip(", ")
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, arrays(shape), (), inside, bool(root))
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside))
    return Instruction(name, opcode, arrays(shape), operands, attributes, bool(root))


def _split(text: str) -> list[str]:
    """Splits operands at commas outside of comments and of the types that older texts write before them."""
    text = re.sub(r"/\*.*?\*/|\[[^\]]*\]|\{[^}]*\}", "", text)
    return [part for part in text.split(",") if part.strip()]


def _balanced(text: str) -> int:
    """Returns the length of the parenthesised part at the start of `text`."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise UserError(f"unbalanced parentheses: {text[:80]}")
