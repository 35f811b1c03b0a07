"""What devices send one another in a program, and how long their links are busy with it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as a device of its group sees it."""

    kind: str
    bytes: float  # of this device's operands
    group: int  # devices

    @property
    def wire(self) -> float:
        """Bytes that each device sends, in the usual algorithm round a ring of n devices.

        An all-gather sends every other device's part, (n - 1) b; a reduce-scatter (n - 1) / n of b; an all-reduce is
        both, 2 (n - 1) / n of b; in an all-to-all the n parts of b go n / 4 hops on the average; a permute sends b.
        """
        n, b = self.group, self.bytes
        return {
            "all-gather": (n - 1) * b,
            "reduce-scatter": (n - 1) / n * b,
            "all-reduce": 2 * (n - 1) / n * b,
            "all-to-all": n / 4 * b if n > 1 else 0.0,
            "collective-permute": b,
        }[self.kind]

    def seconds(self, chip: Chip) -> float:
        """On one ring of neighbours, in both directions; a permute goes one way."""
        return self.wire / (chip.link if self.kind == "collective-permute" else chip.ring)


def collectives_of(program: Program, computation: str, instruction: Instruction) -> Iterator[Collective]:
    """The collectives that an instruction is, starts or holds in its fused computation.

    One that runs beside other instructions is in several fused computations: in that which starts it, in those that run
    meanwhile and in that which ends it. It counts where it starts (a `-done` is no collective here). A channel does not
    tell them apart: all collectives of a `shard_map` may share one. A fusion `all-reduce-scatter` is what TPUs may have
    in place of a reduce-scatter: an all-reduce of which each device keeps its part.
    """
    found = re.fullmatch(rf"({'|'.join(KINDS)})(-start)?", instruction.opcode)
    if found is None:
        called = instruction.called()
        started = _started(called or "", program.body(called))
        for inner in program.body(called):
            for one in collectives_of(program, called or "", inner):
                scattered = one.kind == "all-reduce" and "reduce-scatter" in f"{instruction.name} {called}"
                if started is None or inner.name in started:
                    yield dataclasses.replace(one, kind="reduce-scatter") if scattered else one
        return
    operands = [program.find(computation, name) for name in instruction.operands]
    size = sum(array.bytes for made in operands if made is not None for array in made.arrays)
    yield Collective(found[1], size, _group(instruction.text))


def _started(name: str, body: Sequence[Instruction]) -> set[str] | None:
    """The collectives that a fused computation starts; None if it has no part in such as run beside others."""
    marks = [i for i in body if re.search('custom_call_target="AsyncCollective(Start|Done)"', i.text)]
    if not marks and not name.startswith("async_collective_fusion"):
        return None
    return {operand for i in marks if "AsyncCollectiveStart" in i.text for operand in i.operands}


def _group(text: str) -> int:
    """Devices of a group: `{{0,1},{2,3}}`, `[groups,size]<=...` or `mesh['a'=2,'b'=4] {'b'}`; 1 if none is named."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # a part of an axis gives its own size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2 if "source_target_pairs" in text else 1
