"""Attention within segments on TPUs: jax's splash attention (arXiv 2205.14135, causal blocks only), both passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
BLOCKS = (1024, 512, 256, LANES)  # the largest that divides S
RESIDUALS = "attention"  # under this name a remat policy may keep what the backward pass needs of the forward one


def takes(q_GSAH: jax.Array) -> bool:
    """Whether the kernel is for such queries. It multiplies in bfloat16, and its tiles are 128 wide."""
    return q_GSAH.dtype == jnp.bfloat16 and q_GSAH.shape[1] % LANES == 0 and q_GSAH.shape[3] % LANES == 0


def segment_attention(
    q_GSAH: jax.Array, k_GSKH: jax.Array, v_GSKH: jax.Array, segment_GS: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `attention.segment_attention`. On one device's rows and heads."""
    S, A, H = q_GSAH.shape[1:]
    block = next(size for size in BLOCKS if S % size == 0)
    # dq has a kernel of its own, which makes the scores once more: 0.26 ms of 4096 slots and 12 heads on a v5e. Made
    # with dk and dv, it comes out in parts, one for each block of keys, and adding those up takes 0.54 ms.
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((S, S))] * A),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    q_GSAH = (q_GSAH.astype(jnp.float32) * H**-0.5).astype(q_GSAH.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_GSAH, k_GSKH, v_GSKH))
    out_GASH = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_GS, segment_GS))
    return jnp.swapaxes(out_GASH, 1, 2)
