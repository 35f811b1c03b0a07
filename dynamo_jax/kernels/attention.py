"""Attention for training, prefill and decoding: one door, so that a faster backend has one place to go."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp

# Queries whose scores are held at once: 96 MiB a row for 12 heads, 4096 keys, float32. All 4096 queries take 768 MiB.
BLOCK = 512


def attention(
    q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, slot_Q: jax.Array, valid_BS: jax.Array
) -> jax.Array:
    """Causal grouped-query attention over the slots that hold real tokens.

    softmax(q k^T / sqrt(H)) v, where the query in slot s sees the keys in slots 0 .. s that are valid. A query heads
    share K key/value heads (A a multiple of K). Softmax in float32. A query that sees no key (padding) gets a finite
    value that means nothing.

    Args:
        q_BQAH: queries; k_BSKH, v_BSKH: keys and values of all S slots.
        slot_Q: int32, the slot of each query.
        valid_BS: bool, slots with real tokens.

    Returns: [B, Q, A, H] in the dtype of `q_BQAH`.
    """
    if q_BQAH.shape[1] <= BLOCK:
        return _plain(q_BQAH, k_BSKH, v_BSKH, slot_Q, valid_BS)
    return _blockwise(q_BQAH, k_BSKH, v_BSKH, slot_Q, valid_BS)


def _plain(
    q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, slot_Q: jax.Array, valid_BS: jax.Array
) -> jax.Array:
    causal_QS = jnp.arange(k_BSKH.shape[1])[None, :] <= slot_Q[:, None]
    mask_B1QS = causal_QS[None, None] & valid_BS[:, None, None, :]
    # A TPU multiplies float32 matrices in bfloat16 unless told otherwise. bfloat16 needs no telling.
    exact = jax.default_matmul_precision("highest") if q_BQAH.dtype == jnp.float32 else nullcontext()
    with exact:
        return jax.nn.dot_product_attention(q_BQAH, k_BSKH, v_BSKH, mask=mask_B1QS)


def _blockwise(
    q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, slot_Q: jax.Array, valid_BS: jax.Array
) -> jax.Array:
    """`_plain`, `BLOCK` queries at a time; the backward pass computes a block's scores again."""
    B, Q, A, H = q_BQAH.shape
    tail = -Q % BLOCK
    q_BQAH = jnp.pad(q_BQAH, [(0, 0), (0, tail), (0, 0), (0, 0)])
    blocks = (q_BQAH.reshape(B, -1, BLOCK, A, H).swapaxes(0, 1), jnp.pad(slot_Q, (0, tail)).reshape(-1, BLOCK))
    # float32 outside of the loop, so that the gradients of the blocks are summed in float32; inside as they came.
    wide = tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k_BSKH, v_BSKH))

    @jax.checkpoint
    def one(block: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
        return _plain(block[0], k.astype(k_BSKH.dtype), v.astype(v_BSKH.dtype), block[1], valid_BS)

    out: jax.Array = jax.lax.map(lambda block: one(block, *wide), blocks)
    return out.swapaxes(0, 1).reshape(B, -1, A, H)[:, :Q]
