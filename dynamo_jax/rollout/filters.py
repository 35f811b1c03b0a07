"""Which tokens may be sampled: top-k, top-p and min-p, in this order, each on what the one before left."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EXCLUDED = -1e30  # finite, so that no later arithmetic makes a NaN of it


def filter_logits(logits_BV: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """float32 [B, V] with the logits of excluded tokens at -1e30. The most likely token always stays.

    top_k: keep the k largest logits (0: all). top_p: keep the smallest set of the most likely tokens whose
    probabilities add up to at least top_p (arXiv 1904.09751). min_p: keep tokens at least min_p times as likely as
    the most likely one (arXiv 2407.01082). Equal logits rank by token id, so that "k tokens" means k.
    """
    if top_k or top_p < 1.0:
        order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
        rank_BV = jnp.argsort(order_BV, axis=-1)
        if top_k:
            logits_BV = jnp.where(rank_BV < top_k, logits_BV, EXCLUDED)
        if top_p < 1.0:
            sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
            before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV  # probability of all likelier tokens
            keep_BV = jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1)
            logits_BV = jnp.where(keep_BV | (rank_BV == 0), logits_BV, EXCLUDED)
    if min_p:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, EXCLUDED)
    return logits_BV
