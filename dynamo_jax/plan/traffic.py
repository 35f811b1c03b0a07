"""What an instruction moves through HBM: its operands and results that are there, as far as they are touched."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_jax.plan.hlo import Array, Instruction, Program

_PART = ("dynamic-slice", "slice", "gather")  # read what they return, not all of their operand
_MULTIPLY = ("convolution", "dot")


def multiplies(program: Program, instruction: Instruction) -> bool:
    """Whether it, or what it calls, is a product of matrices."""
    if instruction.opcode in _MULTIPLY:
        return True
    return any(multiplies(program, inner) for inner in program.body(instruction.called()))


def hbm_bytes(program: Program, computation: str, instruction: Instruction) -> float:
    """Bytes that an instruction of `computation` reads from HBM and writes there, each operand and result once.

    Of an operand that a fusion only slices, the slices count; of a result that it updates in place, the update. What a
    tuple passes on untouched is not moved.
    """
    inner = program.body(instruction.called()) or (instruction,)
    alone = inner[0] is instruction
    total = 0.0
    for index, name in enumerate(instruction.operands):
        whole = _in_hbm(defined.arrays if (defined := program.find(computation, name)) else ())
        parameter = name if alone else _parameter(inner, index)
        total += min(whole, _read(inner, parameter, whole)) if whole else 0.0
    return total + _written(program, inner, instruction)


def _parameter(inner: Sequence[Instruction], index: int) -> str:
    return next((i.name for i in inner if i.opcode == "parameter" and i.index == index), "")


def _read(inner: Sequence[Instruction], parameter: str, whole: float) -> float:
    """Bytes of `parameter`, which has `whole`, that the instructions `inner` read."""
    read = 0.0
    for user in inner:
        if parameter not in user.operands or user.opcode == "tuple":
            continue
        if user.opcode in _PART and user.operands[0] == parameter:
            read += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            read += _read(inner, user.name, whole)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
            return whole
    return read


def _written(program: Program, inner: Sequence[Instruction], instruction: Instruction) -> float:
    """Bytes of the results, those of a dynamic update slice as many as the update has."""
    by_name = {i.name: i for i in inner}
    root = next((i for i in inner if i.is_root), inner[-1])
    made = [by_name.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    if len(made) != len(instruction.arrays):
        return _in_hbm(instruction.arrays)
    total = 0.0
    for array, maker in zip(instruction.arrays, made, strict=True):
        while maker is not None and maker.opcode == "bitcast":
            maker = by_name.get(maker.operands[0])
        if maker is None or not array.in_hbm:
            total += array.bytes if array.in_hbm else 0.0
        elif maker.opcode == "dynamic-update-slice":
            update = by_name.get(maker.operands[1])
            total += sum(a.bytes for a in update.arrays) if update else array.bytes
        elif maker.opcode != "parameter":
            total += array.bytes
    return total


def _in_hbm(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays if array.in_hbm)
