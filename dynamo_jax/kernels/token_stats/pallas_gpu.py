"""The forward pass as one Pallas kernel for Hopper, lowered through Mosaic GPU: logits live in registers only.

A thread block (token block i, part s) takes every block of columns of its part of the vocabulary into the running sums
of its tokens. One warpgroup only fetches: pieces of hidden and head, [rows, 64] each, through a ring of buffers in
shared memory, on into the next block of columns while the sums of the last are made. Two warpgroups multiply, each for
half of the tokens, and take their logits into their sums. The parts, there so that few tokens still keep every
multiprocessor busy, are merged afterwards as shards are.

By its machine code for an H100 (benchmarks/gpu_compile.py) nothing is spilled, the products of 64 x 256 x 16 follow
one another, and a block's sums take 15 instructions a logit: 0.15 of the time of its products at D = 1536, 0.06 at
4096. Not measured on a card yet.

The backward pass has no kernel. To write neither gradient more than once it would make each logit twice: four products
of T D V, 12.7 ms at 600 TFLOP/s for T 4096, D 1536, V 151936, where `chunked.backward`, with three, took 12.4 on an
H100.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dynamo_jax.kernels.token_stats.sums import ABSENT, Sums, empty, merge, merge_axis

COMPUTE = 2  # warpgroups that multiply; one more fetches
WIDTH = 64  # of the piece of D that one step of a matrix product takes: 128 bytes, the widest swizzle
LANES = 8  # columns whose terms exist at a time; with 16 some registers are spilled
MULTIPROCESSORS = 132  # of an H100 or H200


class GpuBlocks(NamedTuple):
    """`stages`: steps that are fetched ahead, of (tokens + vocab) x 64 x 2 bytes each."""

    tokens: int
    vocab: int
    stages: int


# The logits of a thread are 128 of its 232 registers, the steps in flight 192 of 227 KiB of shared memory.
BLOCKS = GpuBlocks(tokens=128, vocab=256, stages=4)
MOST_LOGITS = 128 * 256


def forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: GpuBlocks = BLOCKS,
) -> Sums:
    """As `chunked.forward`, for bfloat16, on Hopper. Tokens are padded to whole blocks, D to a multiple of 64 and V to
    one of 8: that copies the head, but those of the models here need none.

    Raises ValueError for other dtypes and for blocks that the kernel cannot have.
    """
    if hidden_TD.dtype != jnp.bfloat16 or head_VD.dtype != jnp.bfloat16:
        raise ValueError(
            f"token_stats: the kernel for GPUs multiplies bfloat16, not {hidden_TD.dtype} and {head_VD.dtype}; "
            "impl = 'chunked' takes any."
        )
    tokens, vocab, _ = blocks
    if tokens not in (128, 256) or vocab % LANES or tokens * vocab > MOST_LOGITS:
        raise ValueError(
            f"token_stats: blocks = ({tokens}, {vocab}); the kernel for GPUs takes 128 or 256 tokens and a multiple of "
            f"{LANES} columns, at most {MOST_LOGITS} logits."
        )
    T, V = hidden_TD.shape[0], head_VD.shape[0]
    live = jnp.int32(T) if live is None else live
    hidden_TD = _padded(_padded(hidden_TD, 0, tokens), 1, WIDTH)
    targets_T = _padded(targets_T.astype(jnp.int32), 0, tokens)
    head_VD = _padded(_padded(head_VD, 0, 8 if vocab < V else vocab), 1, WIDTH)
    kernel = partial(_kernel, blocks=blocks, V=V, scale=1.0 / temperature)
    token_blocks, vocab_blocks = hidden_TD.shape[0] // tokens, pl.cdiv(V, vocab)
    parts = _parts(token_blocks, vocab_blocks)
    rows = tokens // COMPUTE
    pieces: dict[str, Any] = {"transforms": (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(128))}
    sums: Any = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, len(Sums._fields), hidden_TD.shape[0]), jnp.float32),
        scratch_types={
            "hidden_smem": plgpu.SMEM((blocks.stages, tokens, WIDTH), jnp.bfloat16, **pieces),
            "head_smem": plgpu.SMEM((blocks.stages, vocab, WIDTH), jnp.bfloat16, **pieces),
            "targets_smem": plgpu.SMEM((COMPUTE, rows), jnp.int32),
            "sums_smem": plgpu.SMEM((COMPUTE, len(Sums._fields), rows), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),  # hidden and head
            "used": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),
            "targets_there": plgpu.Barrier(num_barriers=COMPUTE),
        },
        grid=(token_blocks, parts),
        grid_names=("tokens", "part"),
        num_threads=COMPUTE + 1,
        thread_name="group",
        # ex2.approx is right to 2^-22 and exactly 1 at 0.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="token_stats_forward",
    )(jnp.reshape(live, 1), hidden_TD, head_VD, targets_T)
    return jax.tree.map(lambda x: x[:T], merge_axis(Sums(*jnp.moveaxis(sums, 1, 0)), 0))


def _parts(token_blocks: int, vocab_blocks: int) -> int:
    """Into how many parts to cut the vocabulary, none empty, so that the multiprocessors are done soonest: each holds
    one thread block at a time, which takes as long as its blocks of columns and about one more to begin and to end."""

    def time(parts: int) -> int:
        return pl.cdiv(token_blocks * parts, MULTIPROCESSORS) * (pl.cdiv(vocab_blocks, parts) + 1)

    parts = min(range(1, min(vocab_blocks, MULTIPROCESSORS) + 1), key=time)
    return pl.cdiv(vocab_blocks, pl.cdiv(vocab_blocks, parts))


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    tail = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, tail if i == axis else 0) for i in range(x.ndim)]) if tail else x


def _kernel(
    live_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    targets_ref: Any,
    out_ref: Any,
    *,
    hidden_smem: Any,
    head_smem: Any,
    targets_smem: Any,
    sums_smem: Any,
    full: Any,
    used: Any,
    targets_there: Any,
    blocks: GpuBlocks,
    V: int,
    scale: float,
) -> None:
    tokens, vocab, stages = blocks
    pieces, vocab_blocks = hidden_ref.shape[1] // WIDTH, pl.cdiv(V, vocab)
    each = pl.cdiv(vocab_blocks, out_ref.shape[0])
    group, part = lax.axis_index("group"), lax.axis_index("part")
    first_row = lax.axis_index("tokens") * tokens
    # The last part may have fewer blocks; a block of tokens that nobody wants has none.
    count = jnp.minimum(each, vocab_blocks - part * each)
    count = jnp.where(first_row < live_ref[0], count, 0)

    def first_column(j: Any) -> Any:
        """Of the part's block j. The last of all begins early enough to end with the head: its first columns are not
        its own then."""
        return jnp.minimum((part * each + j) * vocab, head_ref.shape[0] - vocab)

    @pl.when(group == COMPUTE)
    def _fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")

        steps = count * pieces

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot, block = lax.rem(step, stages), lax.div(step, pieces)
            columns = pl.ds((step - block * pieces) * WIDTH, WIDTH)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(used.at[slot])

            rows = pl.ds(first_row, tokens)
            plgpu.copy_gmem_to_smem(hidden_ref.at[rows, columns], hidden_smem.at[slot], full.at[slot])
            rows = pl.ds(first_column(block), vocab)
            plgpu.copy_gmem_to_smem(head_ref.at[rows, columns], head_smem.at[slot], full.at[slot])

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(used.at[lax.rem(step, stages)])  # a barrier that is given up must be at rest

    @pl.when(group < COMPUTE)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = tokens // COMPUTE
        mine = pl.ds(first_row + group * rows, rows)
        plgpu.copy_gmem_to_smem(targets_ref.at[mine], targets_smem.at[group], targets_there.at[group])
        plgpu.barrier_wait(targets_there.at[group])
        target = targets_smem[group]

        def one_block(j: Any, sums: Sums) -> Sums:
            def product(z_ref: Any) -> jax.Array:
                @pl.loop(0, pieces)
                def _(k: Any) -> None:
                    step = j * pieces + k
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    hidden = hidden_smem.at[slot, pl.ds(group * rows, rows)]
                    plgpu.wgmma(z_ref, hidden, head_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # this product may still run, the one before may not

                    @pl.when(k > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(used.at[lax.rem(step - 1, stages)])

                z: jax.Array = z_ref[...]  # waits for the last product
                plgpu.barrier_arrive(used.at[lax.rem(j * pieces + pieces - 1, stages)])
                return z

            z = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((rows, vocab), jnp.float32))
            z = z if scale == 1.0 else z * scale
            own, first = (part * each + j) * vocab, first_column(j)

            def masked(z: jax.Array) -> jax.Array:
                column = first + lax.broadcasted_iota(jnp.int32, z.shape, 1)
                return jnp.where((column >= own) & (column < V), z, ABSENT)

            z = lax.cond(own + vocab > V, masked, lambda z: z, z)  # only in the last block of all
            place = jnp.where((target >= own) & (target < V), target - first, -1)
            return merge(sums, _sums_of(z, place))

        sums = lax.fori_loop(0, count, one_block, empty((rows,), jnp.dtype(jnp.float32)))
        for i, x in enumerate(sums):
            sums_smem[group, i] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem.at[group], out_ref.at[part, :, mine])
        plgpu.wait_smem_to_gmem(0)


def _sums_of(z: jax.Array, place: jax.Array) -> Sums:
    """As `sums.sums_of`, but few terms exist at a time and threads talk once a sum."""
    top = jnp.max(z, axis=1)
    others = tops = B = C = E = target = jnp.zeros((z.shape[0], LANES), jnp.float32)
    for first in range(0, z.shape[1], LANES):
        z_l = z[:, first : first + LANES]
        top_l, place_l = (lax.broadcast_in_dim(x, z_l.shape, (0,)) for x in (top, place))
        u, is_top = z_l - top_l, z_l == top_l
        e = jnp.exp(u)
        ue = u * e
        others, tops = jnp.where(is_top, others, others + e), jnp.where(is_top, tops + 1.0, tops)
        B, C, E = B + ue, C + e * e, E + ue * e
        target = jnp.where(lax.broadcasted_iota(jnp.int32, z_l.shape, 1) + first == place_l, z_l, target)
    others, tops, B, C, E, target = (jnp.sum(x, axis=1) for x in (others, tops, B, C, E, target))
    return Sums(top, others + (tops - 1.0), B, C, E, target)
