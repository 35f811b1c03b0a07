"""Causal attention within the segments of packed rows on NVIDIA GPUs, through cuDNN's flash attention.

cuDNN is told where each segment starts and how long it is; nothing of size [S, S] exists. That needs Hopper or later.
On older cards the same mask would be a bias of 2 S^2 bytes a row, with a gradient of that size in some releases of jax.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

OLDEST = (9, 0)  # compute capability
WIDEST_HEAD = 256


def segment_attention(
    q_GSAH: jax.Array, k_GSKH: jax.Array, v_GSKH: jax.Array, segment_GS: jax.Array, *, most: int | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, each query over the keys of its own segment up to its own place.

    A segment is a run of equal ids in a row, padding at the end of a row among them: every token belongs to one, so
    that no output is left unwritten. A query heads share K key/value heads (A a multiple of K). Softmax in float32.
    On a mesh call it in `jax.shard_map`, rows and heads split: a segment's place in memory is counted on its device.

    Args:
        q_GSAH: queries, bfloat16 or float16; k_GSKH, v_GSKH: keys and values of the same type.
        segment_GS: int32, the segment of each token.
        most: at least as many segments as any row has, 2 or more; None: `most_segments(S)`. The softmax statistics,
            which the backward pass needs, take 4 most A S bytes a row. A row with more segments becomes NaN.

    Returns: [G, S, A, H] in the dtype of `q_GSAH`.

    Raises ValueError for `most` below 2 and for what `refusal` names; RuntimeError where there is no GPU or no cuDNN.
    """
    # Not public in jax: `jax.nn.dot_product_attention` passes no offsets on. Here, so that the release that moves it
    # breaks this and nothing else.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    S, A, H = q_GSAH.shape[1:]
    most = most_segments(S) if most is None else most
    if reason := refusal(q_GSAH.dtype, H, jax.local_devices(backend="gpu")[0]):
        raise ValueError(f"attention on a GPU: {reason}")
    if most < 2:
        raise ValueError(f"attention on a GPU: most = {most} segments a row; give at least 2.")
    starts, lengths, count_G = _runs(segment_GS, most)
    # jax up to 0.11 finds the keys by the stride of the queries: right only where there are as many heads of both.
    k, v = (jnp.repeat(x, A // x.shape[2], axis=2) for x in (k_GSKH, v_GSKH))
    out_GSAH: jax.Array = cudnn.dot_product_attention(
        q_GSAH,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=1 / math.sqrt(H),
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    return jnp.where((count_G <= most)[:, None, None, None], out_GSAH, jnp.nan)


def takes(q_GSAH: jax.Array, device: Any) -> bool:
    """Whether cuDNN serves such queries on that GPU."""
    return refusal(q_GSAH.dtype, q_GSAH.shape[3], device) is None


def refusal(dtype: Any, H: int, device: Any) -> str | None:
    """Why cuDNN cannot serve queries of that type and head size on a GPU; None: it can."""
    capability = str(device.compute_capability)  # AMD's are names: gfx942
    if not re.fullmatch(r"\d+\.\d+", capability) or tuple(map(int, capability.split("."))) < OLDEST:
        return f"compute capability {capability} has no packed layout in cuDNN; 9.0 (Hopper) and later do."
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {jnp.dtype(dtype).name}."
    if H % 8 or H > WIDEST_HEAD:
        return f"heads of {H}; cuDNN takes multiples of 8 up to {WIDEST_HEAD}."
    return None


def most_segments(S: int) -> int:
    """Segments that a row of S tokens may have, its padding among them: one for each 64 tokens, at least 16."""
    return max(16, S // 64)


def _runs(segment_GS: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the first `most` runs of a row start [G, most + 1], how long they are [G, most], how many runs [G]: int32.

    -1 where there is none, and in the last column of the starts, as jax wants it.
    """
    begins_GS = jnp.pad(segment_GS[:, 1:] != segment_GS[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    rank_GS = jnp.cumsum(begins_GS, axis=1) - 1
    run = jnp.arange(most)
    # How many tokens belong to runs before this one: its start, for runs follow one another without a gap.
    starts = jnp.sum(rank_GS[:, None, :] < run[:, None], axis=2, dtype=jnp.int32)
    lengths = jnp.sum(rank_GS[:, None, :] == run[:, None], axis=2, dtype=jnp.int32)
    count_G = rank_GS[:, -1] + 1
    there = run < count_G[:, None]
    starts = jnp.pad(jnp.where(there, starts, -1), [(0, 0), (0, 1)], constant_values=-1)
    return starts, jnp.where(there, lengths, -1), count_G
