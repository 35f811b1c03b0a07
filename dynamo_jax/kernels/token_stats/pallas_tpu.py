"""The forward pass as one Pallas kernel for TPUs: logits live in VMEM only.

Grid (token block i, vocabulary block j). In step j the matrix unit makes the logits of block j while the vector unit
takes those of block j - 1 into the running sums; step 0 only makes, a last extra step only takes. The two blocks of
logits are two buffers, each named in its own branch: were they one indexed buffer, the compiler could not know that
what is written is not what is read, and would wait. Sums are kept for each of 128 lanes and merged once at the end.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynamo_jax.kernels.token_stats.sums import ABSENT, Sums, empty, merge_axis, rescaled

LANES = 128
SLICE = 256  # columns of one turn of the matrix unit
MIB = 2**20


class TpuBlocks(NamedTuple):
    """Tokens and columns of a grid step; rows that are one unrolled piece of it; VMEM that the kernel may take."""

    tokens: int
    vocab: int
    rows: int
    vmem_bytes: int


# The head is read once for each block of tokens, which the matrix unit hides from about 250 tokens on. VMEM with
# 1024 x 1024 blocks, bfloat16, D = 3584: hidden and head twice (the next block is fetched meanwhile), 2 x 7 + 2 x 7
# MiB, logits 2 x 4, nine arrays of 128 lanes 4.5: 40.5 MiB. With 256 x 512: 2 x 1.75 + 2 x 3.5 + 2 x 0.5 + 1.1 = 12.6.
BLOCKS = {
    "TPU v4": TpuBlocks(256, 512, 256, 15 * MIB),  # of 16
    "TPU v5 lite": TpuBlocks(1024, 1024, 256, 64 * MIB),  # of 128; more only takes what XLA keeps there meanwhile
    "TPU v5": TpuBlocks(1024, 1024, 256, 56 * MIB),  # of 64
    "TPU v6 lite": TpuBlocks(1024, 1024, 256, 64 * MIB),  # of 128
    "TPU7x": TpuBlocks(512, 1024, 256, 48 * MIB),  # of 64
}
SMALLEST = BLOCKS["TPU v4"]


def fitted(blocks: TpuBlocks, D: int, itemsize: int) -> TpuBlocks:
    """Halved until they fit in VMEM: for a wider model, or for float32."""
    while blocks.vocab > LANES and _vmem(blocks, D, itemsize) > blocks.vmem_bytes:
        tokens, vocab = blocks.tokens, blocks.vocab
        smaller = {"tokens": tokens // 2} if tokens >= max(vocab, 64) else {"vocab": vocab // 2}
        blocks = blocks._replace(**smaller)
    return blocks._replace(rows=min(blocks.rows, blocks.tokens))


def _vmem(blocks: TpuBlocks, D: int, itemsize: int) -> int:
    tokens, vocab = blocks.tokens, blocks.vocab
    return 2 * (tokens + vocab) * D * itemsize + 4 * (2 * tokens * vocab + 9 * tokens * LANES)


def forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: TpuBlocks,
) -> Sums:
    """As `chunked.forward`, float32. Elsewhere than on a TPU the kernel is interpreted: slow, for tests."""
    call = partial(_forward, temperature=temperature, blocks=blocks)
    live = jnp.int32(hidden_TD.shape[0]) if live is None else live
    sums: Sums = lax.platform_dependent(
        hidden_TD, head_VD, targets_T, live, tpu=partial(call, interpret=False), default=partial(call, interpret=True)
    )
    return sums


def _forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array,
    temperature: float,
    blocks: TpuBlocks,
    interpret: bool,
) -> Sums:
    (T, D), V = hidden_TD.shape, head_VD.shape[0]
    rows = min(blocks.rows, _up(T, 16))
    tokens = min(_up(blocks.tokens, rows), _up(T, rows))
    columns = min(_up(blocks.vocab, LANES), _up(V, LANES))
    last = pl.cdiv(V, columns) - 1

    def wanted(i: Any, live_ref: Any) -> Any:
        return i * tokens < live_ref[0]

    def token_block(i: Any, j: Any, live_ref: Any) -> tuple[Any, Any]:
        # What a skipped step would not look at is not fetched: the block of the step before stays.
        return jnp.where(wanted(i, live_ref), i, jnp.maximum(pl.cdiv(live_ref[0], tokens) - 1, 0)), 0

    def head_block(i: Any, j: Any, live_ref: Any) -> tuple[Any, Any]:
        return jnp.where(wanted(i, live_ref), jnp.minimum(j, last), last), 0

    logits = pltpu.VMEM((tokens, columns), jnp.float32)
    lanes = pltpu.VMEM((tokens, LANES), jnp.float32)
    kernel = partial(_kernel, rows=rows, last=last, tail=V - last * columns, scale=1.0 / temperature)
    sums = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(T, tokens), last + 2),
            in_specs=[
                pl.BlockSpec((tokens, D), token_block),
                pl.BlockSpec((columns, D), head_block),
                pl.BlockSpec((tokens, 1), token_block),
            ],
            out_specs=pl.BlockSpec((tokens, LANES), lambda i, j, live_ref: (i, 0)),
            scratch_shapes=[logits, logits, pltpu.VMEM((tokens, LANES), jnp.int32), *[lanes] * 6],
        ),
        out_shape=jax.ShapeDtypeStruct((T, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * D * V,
            transcendentals=T * V,
            bytes_accessed=hidden_TD.nbytes + pl.cdiv(T, tokens) * head_VD.nbytes + 8 * T * LANES,
        ),
        interpret=interpret,
        name="token_stats_forward",
    )(live[None], hidden_TD, head_VD, targets_T[:, None])
    return Sums(*(sums[:, i] for i in range(6)))


def _kernel(
    live_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    target_ref: Any,
    out_ref: Any,
    even_ref: Any,
    odd_ref: Any,
    place_ref: Any,
    *sum_refs: Any,
    rows: int,
    last: int,
    tail: int,
    scale: float,
) -> None:
    """`tail`: columns of the last block. `out_ref`: the six sums in lanes 0 to 5."""
    tokens, columns = even_ref.shape
    j = pl.program_id(1)
    wanted = pl.program_id(0) * tokens < live_ref[0]

    def make(z_ref: Any, rows: Any, columns: Any) -> None:
        # Full precision for float32, which the matrix unit would round; products of bfloat16 are exact.
        precision = lax.Precision.HIGHEST if hidden_ref.dtype == jnp.float32 else None
        contract = (((1,), (1,)), ((), ()))
        z = lax.dot_general(
            hidden_ref[rows, :], head_ref[columns, :], contract, precision=precision, preferred_element_type=jnp.float32
        )
        z_ref[rows, columns] = z if scale == 1.0 else z * scale

    def each_piece(new_ref: Any, old_ref: Any) -> None:
        """Make the logits of `new_ref`, take those of `old_ref`, in turns small enough for the compiler to overlap."""

        @pl.loop(0, tokens // rows)
        def _(r: Any) -> None:
            first = pl.multiple_of(r * rows, rows)
            turns = pl.cdiv(columns, SLICE)
            for turn in range(turns):
                if new_ref is not None:
                    make(new_ref, pl.ds(first, rows), pl.ds(turn * SLICE, min(SLICE, columns - turn * SLICE)))
                if old_ref is not None:
                    for group in range(rows // 8 * turn // turns, rows // 8 * (turn + 1) // turns):
                        _take_rows(old_ref, place_ref, sum_refs, pl.ds(first + 8 * group, 8), (j - 1) * columns)

    @pl.when(wanted & (j == 0))
    def _() -> None:
        for ref, x in zip(sum_refs, empty((tokens, LANES), jnp.float32), strict=True):
            ref[...] = x
        # Column of the target, less the lane. Spread over lanes here, once: it takes the unit that also transposes the
        # head for the matrix unit, which in later steps would have to wait for it.
        place_ref[...] = target_ref[...] - lax.broadcasted_iota(jnp.int32, (tokens, LANES), 1)
        each_piece(even_ref, None)

    for parity, (new_ref, old_ref) in enumerate(((even_ref, odd_ref), (odd_ref, even_ref))):
        pl.when(wanted & (j > 0) & (j <= last) & (j % 2 == parity))(partial(each_piece, new_ref, old_ref))

    @pl.when(wanted & (j == last + 1))
    def _() -> None:
        z_ref = odd_ref if last % 2 else even_ref
        if tail < columns:
            first = tail // LANES * LANES
            lane = lax.broadcasted_iota(jnp.int32, (tokens, columns - first), 1) + first
            z_ref[:, first:] = jnp.where(lane < tail, z_ref[:, first:], ABSENT)
        each_piece(None, z_ref)

        @pl.loop(0, tokens // 8)
        def _(r: Any) -> None:
            group = pl.ds(pl.multiple_of(r * 8, 8), 8)
            lane = lax.broadcasted_iota(jnp.int32, (8, LANES), 1)
            out = jnp.zeros((8, LANES), jnp.float32)
            for i, x in enumerate(merge_axis(Sums(*(ref[group, :] for ref in sum_refs)), -1)):
                out = jnp.where(lane == i, x[:, None], out)
            out_ref[group, :] = out


def _take_rows(z_ref: Any, place_ref: Any, sum_refs: Any, rows: Any, first: Any) -> None:
    """Take 8 rows of a block of logits, whose first column is `first`, into the sums: few enough for registers."""
    z = [z_ref[rows, c : c + LANES] for c in range(0, z_ref.shape[1], LANES)]
    old = Sums(*(ref[rows, :] for ref in sum_refs))
    top = old.top
    for x in z:
        top = jnp.maximum(top, x)
    q, (_, a, B, C, E, target) = rescaled(old, top)
    place = place_ref[rows, :] - first
    e_sum = jnp.zeros_like(top)
    for c, x in enumerate(z):
        u = x - top
        e = jnp.exp(u)
        ue, ee = u * e, e * e
        e_sum, B, C, E = e_sum + e, B + ue, C + ee, E + ue * e
        target = jnp.where(place == c * LANES, x, target)
    for ref, x in zip(sum_refs, (top, q * a + (e_sum - (1.0 - q)), B, C, E, target), strict=True):
        ref[rows, :] = x


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
