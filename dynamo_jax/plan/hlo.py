"""A compiled program's text, read: `compiled.as_text()` as computations of instructions, and where each comes from.

Only what a plan asks is read: names, opcodes, shapes, operands, called computations, the compiler's estimate of an
instruction's cycles, and the lines of source. `docs/plan.md` says what is made of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"(?<= )([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "token": 0}
_TABLE = "FileNames", "FunctionNames", "FileLocations", "StackFrames"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: its dtype, its shape, and whether it is in HBM or in a memory of the core."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        bits = _BITS[self.dtype] if self.dtype in _BITS else int((re.search(r"\d+", self.dtype) or [8])[0])
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `text` is its line, line breaks inside attributes taken out."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result, those of a tuple in order
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, if it has one."""
        found = re.search(r'estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    def called(self, attribute: str = "calls") -> str | None:
        """The computation that the attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.text):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        named = (self.called(f"{which}_computation") for which in ("true", "false"))
        return [name for name in named if name is not None]

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel: the compiler says nothing of its time."""
        return 'custom_call_target="tpu_custom_call"' in self.text

    @property
    def index(self) -> int:
        """Of a parameter: which."""
        return int((re.search(r" parameter\((\d+)\)", self.text) or "00")[1])


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's computations by name. `entry` is where it begins."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    tables: dict[str, dict[int, str]]  # of the text's head: what stack_frame_id refers to

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def body(self, name: str | None) -> tuple[Instruction, ...]:
        return self.computations.get(name or "", ())

    def find(self, computation: str, name: str) -> Instruction | None:
        return self._by_name[computation].get(name)

    def turns(self, loop: Instruction) -> int:
        """How often a loop's body runs: the largest constant of its condition, to which the counter is compared.

        A loop that may end earlier, as decoding does, counts whole.
        """
        condition = self.body(loop.called("condition"))
        inner = [self.body(i.called()) for i in condition]
        found = [re.search(r" constant\((\d+)\)", i.text) for body in (condition, *inner) for i in body]
        return max((int(f[1]) for f in found if f), default=1) or 1

    def where(self, instruction: Instruction) -> str:
        """`policy/model.py:154 _whole`: the innermost line of this package that it comes from; else what is known."""
        if found := re.search(r'source_file="([^"]*)"(?: source_end_line=\d+)? source_line=(\d+)', instruction.text):
            return f"{_short(found[1])}:{found[2]}"
        frame = re.search(r"stack_frame_id=(\d+)", instruction.text)
        lines = self._lines(int(frame[1])) if frame else []
        inner = [line for line in lines if line[0]] or lines
        if inner:
            return inner[0][1]
        name = re.search(r'op_name="([^"]*)"', instruction.text)
        return name[1][-60:] if name else instruction.name

    def _lines(self, frame: int) -> list[tuple[bool, str]]:
        """The stack of a frame, innermost first: whether the line is of this package, and the line."""
        files, functions, locations, frames = (self.tables.get(name, {}) for name in _TABLE)
        lines = []
        while frame in frames:
            location, parent = (int(n) for n in re.findall(r"=(\d+)", frames[frame])[:2])
            file, function, line = (int(n) for n in re.findall(r"=(\d+)", locations[location])[:3])
            path = files[file].strip('"')
            last = functions[function].strip('"').rpartition(".")[2]
            lines.append(("/dynamo_jax/" in path, f"{_short(path)}:{line} {last}"))
            frame = parent - 1  # 1 is none
        return lines


def one_line_each(text: str) -> str:
    """The text with every instruction on one line.

    The metadata of some kernels holds line breaks. A reader that goes by lines would take the `}}` that then begins one
    for the end of the computation, and leave out what follows.
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside and not _START.match(line) and line.rstrip() != "}":
            lines[-1] += line
            continue
        inside = bool(_HEAD.match(line)) or (inside and line.rstrip() != "}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises `ValueError` if the text has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry = current = table = ""
    for line in one_line_each(text).splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif line.rstrip() == "}":
            current = ""
        elif current and (found := _START.match(line)):
            computations[current].append(_instruction(found[1], line, found.end()))
        elif line in _TABLE:
            table = line
            tables[table] = {}
        elif table and (row := re.match(r"(\d+) (.*)", line)):
            tables[table][int(row[1])] = row[2]
    if not entry:
        raise ValueError("plan: the compiled text has no entry computation; is it the text of a compiled program?")
    return Program({name: tuple(body) for name, body in computations.items()}, entry, tables)


def _instruction(name: str, line: str, start: int) -> Instruction:
    found = _OPCODE.search(line, start - 1)
    if found is None:
        raise ValueError(f"plan: an instruction without an opcode in the compiled text: {line[:200]}")
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), ":" not in layout or "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(line[start : found.start()])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", _inside(line, found.end())))
    return Instruction(name, found[1], arrays, operands, line, line.lstrip().startswith("ROOT "))


def _inside(line: str, start: int) -> str:
    """What stands between the parenthesis that opens before `start` and the one that closes it."""
    depth = 1
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if not depth:
            return line[start:at]
    return line[start:]


def _short(path: str) -> str:
    return path.rpartition("/dynamo_jax/")[2] if "/dynamo_jax/" in path else path.rpartition("/")[2]
