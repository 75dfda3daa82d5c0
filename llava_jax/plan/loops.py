"""How often the loops of optimised HLO run, as far as the text tells."""

import math

from llava_jax.plan.hlo import Computation, Instruction, Module

Known = dict[int, int]
"""The elements of a loop's state whose value on entry is known, by their number: counters, bounds, steps."""

WHOLE = {"s32", "u32", "s64", "u64"}
DEEPEST = 16
"""instructions between a number and where it is used, at most; a text that hides it deeper does not tell"""
SAME = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier"}
ARITHMETIC = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}


def trips(module: Module, computation: Computation, loop: Instruction, known: Known) -> tuple[int | None, Known]:
    """Rounds of a `while` in `computation`, whose own state is `known`, and what is known on the loop's entry.

    The rounds are None where they depend on what the program computes. Else they follow from the counter's first
    value, its step and its bound: a loop that XLA has unrolled counts by two.
    """
    state = computation.instructions[loop.operands[0]]
    entry = {}
    if state.opcode == "tuple":
        values = (_value(module, computation, name, known) for name in state.operands)
        entry = {i: value for i, value in enumerate(values) if value is not None}
    if written := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(written), entry
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    compared = _comparison(module, condition)
    if compared is None:
        return None, entry
    counter, bound, inclusive = compared
    limit = _value(module, condition, bound, entry)
    if limit is None:
        return None, entry
    # Scans count up from 0 by 1; where the text is too roundabout to show it, that is taken.
    first = entry.get(counter, 0)
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    following = None
    if body.root.opcode == "tuple":
        following = _value(module, body, body.root.operands[counter], entry | {counter: first})
    step = following - first if following is not None and following > first else 1
    return max(0, math.ceil((limit + inclusive - first) / step)), entry


def _comparison(module: Module, condition: Computation) -> tuple[int, str, bool] | None:
    """`counter < bound`: the counter's number in the state, the bound's name, and whether it is `<=`."""
    root, names = condition.root, list(condition.root.operands)
    if root.opcode == "fusion":
        inside = module.computations[root.calls]
        root = inside.root
        numbers = [inside.instructions[name] for name in root.operands]
        if any(each.opcode != "parameter" for each in numbers):
            return None
        names = [names[int(each.attributes)] for each in numbers]
    direction = root.attribute(r"direction=(\w+)")
    if root.opcode != "compare" or direction not in ("LT", "LE"):
        return None
    counter = condition.instructions[names[0]].attribute(r"index=(\d+)")
    return (int(counter), names[1], direction == "LE") if counter else None


def _value(module: Module, computation: Computation, name: str, known: Known, depth: int = DEEPEST
           ) -> int | None:
    """The value of a whole number in a computation; None if it is not known."""
    each = computation.instructions.get(name)
    if each is None or depth == 0 or len(each.shape) == 1 and (each.shape[0].dims or each.shape[0].dtype not in WHOLE):
        return None
    if each.opcode == "constant":
        return int(each.attributes) if each.attributes.lstrip("-").isdigit() else None
    if each.opcode in SAME:
        return _value(module, computation, each.operands[0], known, depth - 1)
    if each.opcode in ARITHMETIC:
        values = [_value(module, computation, operand, known, depth - 1) for operand in each.operands]
        return None if None in values else ARITHMETIC[each.opcode](*values)
    if each.opcode == "fusion":
        return _inside(module, computation, each, None, known, depth - 1)
    if each.opcode == "get-tuple-element":
        source, index = computation.instructions[each.operands[0]], int(each.attribute(r"index=(\d+)"))
        if source.opcode == "parameter":
            return known.get(index)
        if source.opcode == "tuple":
            return _value(module, computation, source.operands[index], known, depth - 1)
        if source.opcode == "fusion":
            return _inside(module, computation, source, index, known, depth - 1)
    return None


def _inside(module: Module, computation: Computation, fusion: Instruction, index: int | None, known: Known,
            depth: int) -> int | None:
    """A fusion's result, or one of its results: its computation with the operands' values put in."""
    inside = module.computations[fusion.calls]
    instructions = dict(inside.instructions)
    for name, each in inside.instructions.items():
        if each.opcode == "parameter":
            value = _value(module, computation, fusion.operands[int(each.attributes)], known, depth)
            instructions[name] = Instruction(name, "constant", each.shape, (), str(value), each.root)
    root = inside.root
    if index is not None and root.opcode != "tuple":
        return None
    name = root.name if index is None else root.operands[index]
    return _value(module, Computation(inside.name, instructions), name, {}, depth)
