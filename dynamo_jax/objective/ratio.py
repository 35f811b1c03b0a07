"""The probability ratio of a token or of a sequence, and the clip that holds it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import Ratio, check_choice
from dynamo_jax.objective.segments import Segments, segment_mean

_MAX_LOG_RATIO = 20.0  # nats; the released code's clamp, beyond which a token has no gradient


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Clip:
    """How far the ratio r may go before a token has no gradient: PPO's clip (arXiv 1707.06347) and the dual clip.

    Raises ValueError if only one of `low` and `high` is None, or `dual` is not above 1.
    """

    low: float | None  # r is clipped to [1 - low, 1 + high]; both None: no clip
    high: float | None
    dual: float | None = None  # for negative advantages, r is at most this (arXiv 1912.09729); None: off

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"Clip: low = {self.low} and high = {self.high} bound the ratio together; give both, or None for both "
                "to switch the clip off."
            )
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"Clip: dual = {self.dual}; it must be above 1, or None to switch the dual clip off.")

    def of(self, ratio: jax.Array) -> jax.Array:
        """clip(r, 1 - low, 1 + high)."""
        return ratio if self.low is None or self.high is None else jnp.clip(ratio, 1.0 - self.low, 1.0 + self.high)

    def stops(self, ratio: jax.Array, advantages: jax.Array) -> jax.Array:
        """bool: without gradient by PPO's clip, which is where A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""
        if self.low is None or self.high is None:
            return jnp.zeros(jnp.broadcast_shapes(ratio.shape, advantages.shape), bool)
        return ((advantages > 0) & (ratio > 1.0 + self.high)) | ((advantages < 0) & (ratio < 1.0 - self.low))

    def dual_stops(self, ratio: jax.Array, advantages: jax.Array) -> jax.Array:
        """bool: without gradient by the dual clip, which is where A < 0 and r > dual."""
        if self.dual is None:
            return jnp.zeros(jnp.broadcast_shapes(ratio.shape, advantages.shape), bool)
        return (advantages < 0) & (ratio > self.dual)


def probability_ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    """pi(token) / pi_old(token), with its logarithm clamped to [-20, 20] nats as in the released code."""
    return jnp.exp(clamp(_difference(logp, old_logp)))


def log_ratio(
    logp: jax.Array, old_logp: jax.Array, mask: jax.Array, ratio: Ratio, *, segments: Segments | None = None
) -> jax.Array:
    """The logarithm of the ratio that `policy_loss` clips, clamped to [-20, 20] nats:

        token     logp_t - old_logp_t
        sequence  the mean of those over the tokens of the rollout, log s_i of GSPO (arXiv 2507.18071)

    GSPO's gradient is that of its token-wise form: each token has the value of the rollout and the gradient of its own
    logp_t. (Summed over a rollout of equal advantages, and divided by its length, that is the gradient of s_i.)

    Args:
        logp, old_logp: float [M, C], log-probabilities of the taken tokens now and when sampled, nats.
        mask: [M, C], 1 for tokens that count.
        ratio: a word of `Ratio`.
        segments: the rollout of each token; None: each row is one.

    Returns:
        float32 [M, C] (float64 for float64 inputs), nats, 0 where mask is 0. The gradient flows through logp.

    Raises ValueError for another ratio.
    """
    check_choice("ratio", ratio, Ratio)
    difference = masked_difference(logp, old_logp, mask)
    if ratio == "token":
        return clamp(difference)
    counts = mask > 0
    mean = lax.stop_gradient(segment_mean(lax.stop_gradient(difference), mask, segments))
    own_gradient = difference - lax.stop_gradient(difference)  # of value 0
    return jnp.where(counts, clamp(mean + own_gradient), 0.0)


def masked_difference(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """logp - old_logp, nats, at least float32, not clamped; 0 where mask is 0. The gradient flows through logp."""
    # Selecting before anything else keeps whatever stands in the padding out of the backward pass.
    counts = mask > 0
    return _difference(jnp.where(counts, logp, 0.0), jnp.where(counts, lax.stop_gradient(old_logp), 0.0))


def clamp(log_ratio: jax.Array) -> jax.Array:
    """To [-20, 20] nats."""
    return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _difference(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    return jnp.asarray(logp, jnp.result_type(logp, jnp.float32)) - old_logp
