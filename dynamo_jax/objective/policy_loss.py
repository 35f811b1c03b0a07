"""The clipped policy-gradient loss, its aggregation over tokens and sequences, and what keeps micro-batches exact."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

_MAX_LOG_RATIO = 20.0  # nats; the released code's clamp, beyond which a token has no gradient


class Normalizer(NamedTuple):
    """What sums over tokens are divided by. Of the whole mini-batch, so that losses of its micro-batches add up."""

    loss: jax.Array  # float scalar, divides the loss
    tokens: jax.Array  # float scalar, divides the metrics


def normalizer(mask: jax.Array, aggregation: str) -> Normalizer:
    """The denominators of `policy_loss` for a mini-batch, to be given to each of its micro-batches.

    Args:
        mask: [M, C], the whole mini-batch's.
        aggregation: one of AGGREGATIONS.

    Returns:
        Two float32 scalars, at least 1.

    Raises ValueError for another aggregation.
    """
    _check_aggregation(aggregation)
    rows, columns = mask.shape
    tokens = jnp.maximum(jnp.sum(mask > 0, dtype=jnp.int32), 1).astype(jnp.float32)
    if aggregation == "token-mean":
        return Normalizer(tokens, tokens)
    if aggregation == "seq-mean-token-sum-norm":
        return Normalizer(jnp.float32(max(columns, 1)), tokens)
    return Normalizer(jnp.float32(max(rows, 1)), tokens)


_normalizer_of = normalizer  # for the functions below, whose argument has that name


def aggregate(values: jax.Array, mask: jax.Array, aggregation: str, normalizer: Normalizer | None = None) -> jax.Array:
    """One number from values of tokens. With l the values where mask is 1, M rows and C columns:

        token-mean                sum l / number of tokens
        seq-mean-token-sum        sum l / M
        seq-mean-token-mean       sum over rows of (mean of l in the row) / M; a row without tokens adds 0
        seq-mean-token-sum-norm   sum l / C

    Args:
        values, mask: [M, C]; values where mask is 0 are not read.
        aggregation: one of AGGREGATIONS.
        normalizer: of the whole mini-batch, if this is a micro-batch of it; None: `values` is all there is.

    Raises ValueError for another aggregation.
    """
    _check_aggregation(aggregation)
    if normalizer is None:
        normalizer = _normalizer_of(mask, aggregation)
    counts = mask > 0
    row_sums = jnp.sum(jnp.where(counts, values, 0.0), axis=-1)
    if aggregation == "seq-mean-token-mean":
        row_sums = row_sums / jnp.maximum(jnp.sum(counts, axis=-1, dtype=jnp.int32), 1)
    return jnp.sum(row_sums) / normalizer.loss


def probability_ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    """pi(token) / pi_old(token), with its logarithm clamped to [-20, 20] nats as in the released code."""
    return jnp.exp(_log_ratio(logp, old_logp))


def policy_loss(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None = None,
    aggregation: str = "token-mean",
    normalizer: Normalizer | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped loss (arXiv 1707.06347) with the dual clip (arXiv 1912.09729). With r the probability ratio:

        l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   if A < 0:  l = min(l, -A clip_ratio_c)

    then aggregated (see `aggregate`). With the whole mini-batch's `normalizer`, the losses, gradients and metrics of
    its micro-batches add up to the whole's.

    Args:
        logp: float [M, C], log-probabilities of the taken tokens, nats; the gradient flows through it.
        old_logp: float [M, C], the same when sampled or scored, nats.
        advantages: float [M, 1] or [M, C]; carry no gradient.
        mask: [M, C], 1 for tokens that count; nothing else is read where it is 0.
        clip_low, clip_high: the clip range of the ratio is [1 - clip_low, 1 + clip_high].
        clip_ratio_c: the dual clip, > 1; None: off.
        aggregation: one of AGGREGATIONS.
        normalizer: `normalizer` of the whole mini-batch; None: these rows are all there is.

    Returns:
        (loss, metrics), float32 scalars (float64 for float64 inputs). An empty mask gives 0. Metrics, means over
        tokens: `objective/clip_fraction` (the clip decides), `objective/dual_clip_fraction` (the dual clip decides)
        and `objective/kl_old_new`, old_logp - logp, clamped as the ratio is, nats.

    Raises ValueError for another aggregation, shapes that do not fit, or clip_ratio_c <= 1.
    """
    _check_aggregation(aggregation)
    _check(logp, old_logp, advantages, mask, clip_ratio_c)
    if normalizer is None:
        normalizer = _normalizer_of(mask, aggregation)
    counts = mask > 0
    # Selecting before the exponential keeps whatever stands in the padding out of the backward pass.
    log_ratio = _log_ratio(jnp.where(counts, logp, 0.0), jnp.where(counts, lax.stop_gradient(old_logp), 0.0))
    advantages = jnp.where(counts, lax.stop_gradient(advantages), 0.0)
    ratio = jnp.exp(log_ratio)

    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    values = jnp.maximum(free, clipped)
    dual_clipped = jnp.zeros_like(counts)
    if clip_ratio_c is not None:
        ceiling = -advantages * clip_ratio_c
        dual_clipped = (advantages < 0) & (values > ceiling)
        values = jnp.where(advantages < 0, jnp.minimum(ceiling, values), values)

    def token_mean(x: jax.Array) -> jax.Array:
        return lax.stop_gradient(jnp.sum(jnp.where(counts, x, 0.0)) / normalizer.tokens)

    metrics = {
        "objective/clip_fraction": token_mean(clipped > free),
        "objective/dual_clip_fraction": token_mean(dual_clipped),
        "objective/kl_old_new": token_mean(-log_ratio),
    }
    return aggregate(values, mask, aggregation, normalizer), metrics


def _log_ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    difference = jnp.asarray(logp, jnp.result_type(logp, jnp.float32)) - old_logp
    return jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation = {aggregation!r}; choose one of {', '.join(AGGREGATIONS)}.")


def _check(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_ratio_c: float | None,
) -> None:
    if clip_ratio_c is not None and clip_ratio_c <= 1:
        raise ValueError(f"policy_loss: clip_ratio_c = {clip_ratio_c}; it must be above 1, or None to switch it off.")
    M, C = logp.shape
    if old_logp.shape != (M, C) or mask.shape != (M, C) or advantages.shape not in ((M, C), (M, 1)):
        raise ValueError(
            f"policy_loss: logp has shape {logp.shape}, old_logp {old_logp.shape}, mask {mask.shape}, advantages "
            f"{advantages.shape}; give [M, C] throughout, advantages [M, C] or [M, 1]."
        )
