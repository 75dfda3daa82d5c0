"""Counts the rounds of loops in optimised HLO, whose text for TPUs does not state them.

The whole numbers of a program (counters, bounds, steps) are mostly constants. They are evaluated from the text, and a
loop is run with nothing but them.
"""

import operator
from typing import Any

from llava_jax.plan.hlo import Computation, Instruction, Module

Value = int | list | None
"""Value of an instruction: a whole number, a list for a tuple, or None if it is unknown."""

INTEGERS = {"s32", "u32", "s64", "u64", "pred"}
IDENTITIES = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier"}
ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne}
MAX_ROUNDS = 100_000
"""Number of rounds after which a loop counts as one of unknown length."""


def trip_count(module: Module, computation: Computation, loop: Instruction, arguments: list[Value]
               ) -> tuple[int | None, Value]:
    """Returns the rounds of a `while` in `computation`, and the loop's state on entry.

    `arguments` are the known values of the computation's parameters. The rounds are None if they depend on what the
    program computes.
    """
    entry = state = evaluate(module, computation, loop.operands[0], arguments)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    for rounds in range(MAX_ROUNDS):
        proceed = evaluate(module, condition, condition.root.name, [state])
        if proceed is None:
            break
        if not proceed:
            return rounds, entry
        state = evaluate(module, body, body.root.name, [state])
    return None, entry


def evaluate(module: Module, computation: Computation, name: str, arguments: list[Value]) -> Value:
    """Returns the value of an instruction, as far as it follows from constants and `arguments`."""
    found: dict[str, Value] = {}

    def value(name: str) -> Value:
        if name not in found:
            instruction = computation.instructions.get(name)
            found[name] = None if instruction is None else compute(instruction)
        return found[name]

    def compute(instruction: Instruction) -> Value:
        opcode, shape = instruction.opcode, instruction.shape
        if len(shape) == 1 and (shape[0].dims or shape[0].dtype not in INTEGERS):
            return None
        if opcode == "parameter":
            number = int(instruction.attributes)
            return arguments[number] if number < len(arguments) else None
        if opcode == "constant":
            return int(instruction.attributes) if instruction.attributes.lstrip("-").isdigit() else None
        if opcode == "tuple":
            return [value(operand) for operand in instruction.operands]
        if opcode in IDENTITIES:
            return value(instruction.operands[0])
        if opcode == "get-tuple-element":
            source = value(instruction.operands[0])
            return source[int(instruction.attribute(r"index=(\d+)"))] if isinstance(source, list) else None
        if opcode == "fusion":
            inside = module.computations[instruction.calls]
            return evaluate(module, inside, inside.root.name, [value(operand) for operand in instruction.operands])
        function: Any = ARITHMETIC.get(opcode) or opcode == "compare" and COMPARISONS.get(
            instruction.attribute(r"direction=(\w+)"))
        values = [value(operand) for operand in instruction.operands] if function else [None]
        return None if None in values else function(*values)

    return value(name)
