"""Sums and means over the tokens of a rollout, where a row may hold the tokens of several."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """Which rollout each token belongs to. Without it a row is a rollout."""

    of: jax.Array  # int32, the shape of the per-token arrays; `rollouts`: of none
    rollouts: int


def segment_sum(values: jax.Array, segments: Segments | None) -> jax.Array:
    """For each token the sum of `values` over the tokens of its rollout, in the shape of `values`.

    Of tokens that belong to none it is 0, or anything where a row is a rollout.
    """
    if segments is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)
    totals = jax.ops.segment_sum(values.ravel(), segments.of.ravel(), segments.rollouts + 1)
    return totals.at[segments.rollouts].set(0)[segments.of]


def segment_mean(values: jax.Array, mask: jax.Array, segments: Segments | None) -> jax.Array:
    """For each token the mean of `values` over its rollout's tokens of the mask; 0 where there are none."""
    counts = mask > 0
    tokens = segment_sum(counts.astype(jnp.int32), segments)
    return segment_sum(jnp.where(counts, values, 0), segments) / jnp.maximum(tokens, 1)
