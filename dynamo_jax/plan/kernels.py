"""What a Pallas kernel takes at least: the compiler has no estimate of it, so its work is held against the chip."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.hlo import Array, Instruction, Program
from dynamo_jax.plan.traffic import hbm_bytes

# Products of [query, head] and [key, head] matrices, or of their transposes, that a kernel of jax's splash attention
# makes of each block: forward q k' and p v; dq again q k', then do v' and ds k; dkv again q k', then do v', p' do and
# ds' q, and ds k if it is the fused one.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of a kernel does on a device, and who says so."""

    flops: float
    bytes: float
    source: str  # its own cost estimate, the shapes of splash attention, or the operands and results

    def seconds(self, chip: Chip) -> float:
        """At the chip's peak: a real kernel takes longer."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


def kernel_work(program: Program, computation: str, kernel: Instruction) -> Work:
    """By the estimate that a kernel carries (`pl.CostEstimate`); else by what its shapes say."""
    moved = hbm_bytes(program, computation, kernel)
    if found := re.search(r'"cost_estimate":\{([^}]*)\}', kernel.text):
        said = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)', found[1])}
        return Work(said.get("flops", 0.0), said.get("bytes_accessed", moved), "its cost estimate")
    operands = [array for name in kernel.operands if (made := program.find(computation, name)) for array in made.arrays]
    if found := re.search(r"splash_\w*?_(fwd|dq|dkv)(?![a-z])", kernel.text):
        flops = _splash_flops(found[1], operands, kernel.arrays)
        return Work(flops, moved, "splash attention's shapes, causal")
    return Work(0.0, moved, "operands and results")


def _splash_flops(kind: str, operands: Sequence[Array], results: Sequence[Array]) -> float:
    """FLOPs of the blocks that a causal mask leaves.

    The kernel's first operands say, for each block of queries and of keys, what is to be done: integers of shape
    [heads, query blocks, key blocks]. Then come queries [..., query heads, S, H] and keys [..., S, H]. Of the fused
    kernel one result is the gradient of the queries for each block of keys, yet to be added up.
    """
    floats = [array for array in operands if array.dtype.startswith(("bf", "f"))]
    q, k = floats[0], floats[1]
    queries, keys, head = q.shape[-2], k.shape[-2], q.shape[-1]
    grid = next((a.shape for a in operands if a.dtype.startswith("s") and len(a.shape) == 3), (1, 1, 1))
    rows, columns = queries // grid[1], keys // grid[2]
    blocks = sum(column * columns < (row + 1) * rows for row in range(grid[1]) for column in range(grid[2]))
    fused = kind == "dkv" and any(len(array.shape) > len(q.shape) for array in results)
    products = _PRODUCTS[kind] + fused
    return 2.0 * products * math.prod(q.shape[:-2]) * blocks * rows * columns * head
