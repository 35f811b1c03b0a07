"""Attention for training, prefill and decoding: one door, so that a faster backend has one place to go."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BQNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, slot_Q: jax.Array, valid_BS: jax.Array
) -> jax.Array:
    """Causal grouped-query attention over the slots that hold real tokens.

    softmax(q k^T / sqrt(H)) v, where the query in slot s sees the keys in slots 0 .. s that are valid. N query heads
    share K key/value heads (N a multiple of K). Softmax in float32. A query that sees no key (padding) gets a finite
    value that means nothing.

    Args:
        q_BQNH: queries; k_BSKH, v_BSKH: keys and values of all S slots.
        slot_Q: int32, the slot of each query.
        valid_BS: bool, slots with real tokens.

    Returns: [B, Q, N, H] in the dtype of `q_BQNH`.
    """
    causal_QS = jnp.arange(k_BSKH.shape[1])[None, :] <= slot_Q[:, None]
    mask_B1QS = causal_QS[None, None] & valid_BS[:, None, None, :]
    return jax.nn.dot_product_attention(q_BQNH, k_BSKH, v_BSKH, mask=mask_B1QS)
