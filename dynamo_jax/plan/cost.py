"""How long a compiled program takes, by its compiler, and what it is busy with. `docs/plan.md` explains each figure."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.collectives import Collective, collectives_of
from dynamo_jax.plan.hlo import Instruction, Program
from dynamo_jax.plan.kernels import Work, kernel_work
from dynamo_jax.plan.traffic import hbm_bytes, multiplies

MATRIX, HBM, VECTOR, LINKS = "matrix unit", "HBM", "vector unit", "links"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One instruction: its seconds in all turns together, and how many turns these are."""

    seconds: float
    turns: float
    name: str
    where: str  # line of source


@dataclasses.dataclass(frozen=True)
class Kernel(Entry):
    work: Work  # of one turn


@dataclasses.dataclass
class Cost:
    """One call of a program on one device. Seconds; `seconds` does not wait for other devices."""

    seconds: float = 0.0
    by_resource: dict[str, float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )  # seconds, whose sum is `seconds`
    wire: float = 0.0  # bytes that the device sends
    link_seconds: float = 0.0  # on one ring
    collectives: dict[str, float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )  # kind -> bytes that the device sends
    entries: list[Entry] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    fastest_links: float = 0.0  # seconds if every link of the device is busy

    @property
    def kernel_seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def low(self) -> float:
        """All that is sent goes on beside the computation, on all links."""
        return max(self.seconds, self.fastest_links)

    @property
    def high(self) -> float:
        """Nothing is sent beside the computation, and all on one ring."""
        return self.seconds + self.link_seconds

    @property
    def bound(self) -> str:
        """The resource that the program is busy with for longest."""
        return max({**self.by_resource, LINKS: self.link_seconds}.items(), key=lambda item: item[1])[0]

    def costliest(self, count: int = 5) -> list[Entry]:
        return sorted(self.entries, key=lambda entry: -entry.seconds)[:count]


def program_cost(program: Program, chip: Chip, ends: Mapping[str, float] | None = None) -> Cost:
    """The sum of the compiler's `estimated_cycles`, a loop's body as often as it runs, a kernel's work at the peak.

    Of a conditional the branch that takes longest counts. `ends`: turns of loops that end earlier than their condition
    says, by the name of the function that they are written in.
    """
    cost = Cost()
    _walk(_Walk(program, chip, ends or {}), program.entry, 1.0, cost)
    cost.seconds = sum(entry.seconds for entry in cost.entries)
    cost.fastest_links = cost.wire / chip.all_links
    return cost


@dataclasses.dataclass(frozen=True)
class _Walk:
    program: Program
    chip: Chip
    ends: Mapping[str, float]


def _walk(walk: _Walk, computation: str, turns: float, cost: Cost) -> None:
    program = walk.program
    for instruction in program.body(computation):
        if instruction.opcode == "while":
            inner = walk.ends.get(program.where(instruction).rpartition(" ")[2], program.turns(instruction))
            _walk(walk, instruction.called("body") or "", turns * inner, cost)
        elif instruction.opcode == "call":
            _walk(walk, instruction.called("to_apply") or "", turns, cost)
        elif instruction.opcode == "conditional":
            branches = [Cost() for _ in instruction.branches]
            for branch, name in zip(branches, instruction.branches, strict=True):
                _walk(walk, name, turns, branch)
            _add(cost, max(branches, key=lambda b: sum(entry.seconds for entry in b.entries)))
        else:
            for one in collectives_of(program, computation, instruction):
                _send(cost, one, turns, walk.chip)
            _count(walk, computation, instruction, turns, cost)


def _count(walk: _Walk, computation: str, instruction: Instruction, turns: float, cost: Cost) -> None:
    program, chip = walk.program, walk.chip
    where = program.where(instruction)
    if instruction.cycles:
        seconds = instruction.cycles / chip.clock
        moved = hbm_bytes(program, computation, instruction) / chip.bandwidth
        product = MATRIX if multiplies(program, instruction) else VECTOR
        resource = HBM if moved >= seconds / 2 else product
    elif instruction.is_kernel:
        work = kernel_work(program, computation, instruction)
        seconds = work.seconds(chip)
        resource = MATRIX if work.flops / chip.flops > work.bytes / chip.bandwidth else HBM
        cost.kernels.append(Kernel(seconds * turns, turns, instruction.name, where, work))
    else:
        return
    cost.by_resource[resource] += seconds * turns
    cost.entries.append(Entry(seconds * turns, turns, instruction.name, where))


def _send(cost: Cost, one: Collective, turns: float, chip: Chip) -> None:
    cost.wire += one.wire * turns
    cost.link_seconds += one.seconds(chip) * turns
    cost.collectives[one.kind] += one.wire * turns


def _add(cost: Cost, branch: Cost) -> None:
    for mine, its in ((cost.by_resource, branch.by_resource), (cost.collectives, branch.collectives)):
        for name, amount in its.items():
            mine[name] += amount
    cost.wire += branch.wire
    cost.link_seconds += branch.link_seconds
    cost.entries += branch.entries
    cost.kernels += branch.kernels
