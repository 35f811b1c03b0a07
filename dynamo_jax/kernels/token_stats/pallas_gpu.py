"""The forward pass as one Pallas kernel for GPUs, lowered through Triton: logits live in registers only.

Program (token block i, part s) takes every block of columns of its part of the vocabulary into the running sums of its
tokens. The parts, there so that few tokens still keep every multiprocessor busy, are merged afterwards as shards are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dynamo_jax.kernels.token_stats.sums import ABSENT, Sums, empty, merge, merge_axis, sums_of


class GpuBlocks(NamedTuple):
    """Powers of two. `width`: of the piece of D that one step of a matrix product takes."""

    tokens: int
    vocab: int
    width: int
    warps: int
    stages: int
    programs: int  # at least this many, if the vocabulary has as many blocks


# Shared memory: stages x (tokens + vocab) x width x itemsize. bfloat16: 3 x 256 x 64 x 2 = 96 KiB, of 99 (consumer
# cards), 163 (A100) or 227 (H100). float32 takes width 32. Registers: the logits are 128 x 128 / 256 threads = 64 of
# 255. Programs: two for each of an H100's 132 multiprocessors. None of these were measured.
BLOCKS = GpuBlocks(tokens=128, vocab=128, width=64, warps=8, stages=3, programs=264)


def forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: GpuBlocks = BLOCKS,
) -> Sums:
    """As `chunked.forward`, float32. Elsewhere than on a GPU the kernel is interpreted: slow, for tests."""
    call = partial(_forward, temperature=temperature, blocks=blocks)
    live = jnp.int32(hidden_TD.shape[0]) if live is None else live
    sums: Sums = lax.platform_dependent(
        hidden_TD, head_VD, targets_T, live, cuda=partial(call, interpret=False), default=partial(call, interpret=True)
    )
    return sums


def _forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array,
    temperature: float,
    blocks: GpuBlocks,
    interpret: bool,
) -> Sums:
    T, V = hidden_TD.shape[0], head_VD.shape[0]
    token_blocks, vocab_blocks = pl.cdiv(T, blocks.tokens), pl.cdiv(V, blocks.vocab)
    # As many blocks of columns for each part, so that none is without a column.
    each = pl.cdiv(vocab_blocks, min(vocab_blocks, pl.cdiv(blocks.programs, token_blocks)))
    parts = pl.cdiv(vocab_blocks, each)
    one: Any = jax.ShapeDtypeStruct((parts, T), jnp.float32)
    of_parts = pl.pallas_call(
        partial(_kernel, blocks=blocks, each=each, scale=1.0 / temperature),
        grid=(token_blocks, parts),
        out_shape=Sums(*[one] * 6),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="token_stats_forward",
    )(live[None], hidden_TD, head_VD, targets_T)
    return merge_axis(of_parts, 0)


def _kernel(
    live_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    targets_ref: Any,
    *out_refs: Any,
    blocks: GpuBlocks,
    each: int,
    scale: float,
) -> None:
    (T, D), V = hidden_ref.shape, head_ref.shape[0]
    width = blocks.width * 2 // hidden_ref.dtype.itemsize
    part = pl.program_id(1)
    rows = pl.ds(pl.program_id(0) * blocks.tokens, blocks.tokens)
    row = pl.program_id(0) * blocks.tokens + jnp.arange(blocks.tokens)
    dtype = jnp.promote_types(hidden_ref.dtype, head_ref.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def load(ref: Any, where: Any, exists: Any, first: Any) -> Any:
        exists = exists[:, None] & (first + jnp.arange(width) < D)[None, :]
        return plgpu.load(ref.at[where, pl.ds(first, width)], mask=exists, other=0.0).astype(dtype)

    @pl.when(pl.program_id(0) * blocks.tokens < live_ref[0])
    def _() -> None:
        target = plgpu.load(targets_ref.at[rows], mask=row < T, other=-1)

        def one_block(j: Any, sums: Sums) -> Sums:
            first = (part * each + j) * blocks.vocab
            columns, column = pl.ds(first, blocks.vocab), first + jnp.arange(blocks.vocab)

            def one_piece(k: Any, z: Any) -> Any:
                a = load(hidden_ref, rows, row < T, k * width)
                b = load(head_ref, columns, column < V, k * width)
                return z + plgpu.dot(a, b, trans_b=True, precision=precision)

            z = lax.fori_loop(0, pl.cdiv(D, width), one_piece, jnp.zeros((blocks.tokens, blocks.vocab), jnp.float32))
            z = jnp.where(column[None, :] < V, z if scale == 1.0 else z * scale, ABSENT)
            return merge(sums, sums_of(z, column[None, :] == target[:, None]))

        # The last part may have fewer blocks.
        count = jnp.minimum(each, pl.cdiv(V, blocks.vocab) - part * each)
        sums = lax.fori_loop(0, count, one_block, empty((blocks.tokens,), jnp.dtype(jnp.float32)))
        for ref, x in zip(out_refs, sums, strict=True):
            place: Any = ref.at[part, rows]
            plgpu.store(place, x, mask=row < T)
