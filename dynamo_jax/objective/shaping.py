"""Rewards shaped by length, and advantages shaped by entropy."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynamo_jax.config import Config

IntArray = TypeVar("IntArray", np.ndarray, jax.Array)


def overlong_penalty(length: IntArray, max_tokens: int, buffer: int, factor: float) -> IntArray:
    """What a long completion adds to its reward, Eq. 13 of DAPO (arXiv 2503.14476) times `factor`:

        0                                        length <= max_tokens - buffer
        -factor (length - max_tokens + buffer) / buffer     between, exactly -factor at max_tokens

    Args:
        length: int [...], tokens; a numpy or a jax array.
        max_tokens: where completions are truncated. buffer: the last tokens before it, over which the penalty grows.
        factor: the largest penalty.

    Returns:
        float32, shape and kind of array as `length`.

    Raises ValueError if buffer is not in 1 .. max_tokens, or factor is negative.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"overlong_penalty: buffer = {buffer}; it must be in 1 .. max_tokens = {max_tokens}.")
    if factor < 0:
        raise ValueError(f"overlong_penalty: factor = {factor}; it must not be negative: it is subtracted.")
    return (max_tokens - buffer - length).clip(-buffer, 0).astype(np.float32) / buffer * factor


def configured_penalty(lengths: jax.Array | np.ndarray, config: Config) -> np.ndarray:
    """float32 [R]: `overlong_penalty` of rollouts of so many tokens, by `objective.overlong`; 0 if that is off."""
    o, length_R = config.objective.overlong, np.asarray(lengths)
    if not o.enabled:
        return np.zeros(length_R.shape, np.float32)
    return np.asarray(overlong_penalty(length_R, config.rollout.max_tokens, o.buffer, o.factor), np.float32)


def entropy_advantage(
    advantages: jax.Array, entropy: jax.Array, mask: jax.Array, alpha: float, kappa: float
) -> jax.Array:
    """Advantages that grow with entropy (arXiv 2506.14758), by at most a part of their own size:

        A_t + min(alpha H_t, |A_t| / kappa)

    so that, with kappa > 1, no advantage changes its sign.

    Args:
        advantages: float [M, 1] or [M, C].
        entropy: float [M, C], H, nats.
        mask: [M, C], 1 for tokens that count; the advantages of the others stay as they are.
        alpha: > 0, per nat. kappa: > 1.

    Returns:
        float32 [M, C] (float64 for float64 inputs), without gradient.

    Raises ValueError if alpha < 0 or kappa <= 0.
    """
    if alpha < 0 or kappa <= 0:
        raise ValueError(f"entropy_advantage: alpha = {alpha}, kappa = {kappa}; give alpha >= 0 and kappa > 0.")
    advantages, entropy = (
        lax.stop_gradient(jnp.asarray(x, jnp.result_type(x, jnp.float32))) for x in (advantages, entropy)
    )
    bonus = jnp.minimum(alpha * entropy, jnp.abs(advantages) / kappa)
    return advantages + jnp.where(mask > 0, bonus, 0.0)
