"""The clipped policy-gradient loss, its aggregation over tokens and sequences, and what keeps micro-batches exact."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import Aggregation, Ratio, check_choice

_MAX_LOG_RATIO = 20.0  # nats; the released code's clamp, beyond which a token has no gradient


class Normalizer(NamedTuple):
    """What sums over tokens are divided by. Of the whole mini-batch, so that losses of its micro-batches add up."""

    loss: jax.Array  # float scalar, divides the loss
    tokens: jax.Array  # float scalar, divides the metrics


def normalizer(mask: jax.Array, aggregation: Aggregation) -> Normalizer:
    """The denominators of `policy_loss` for a mini-batch, to be given to each of its micro-batches.

    Args:
        mask: [M, C], the whole mini-batch's.
        aggregation: a word of `Aggregation`.

    Returns:
        Two float32 scalars, at least 1.

    Raises ValueError for another aggregation.
    """
    check_choice("aggregation", aggregation, Aggregation)
    rows, columns = mask.shape
    tokens = jnp.maximum(jnp.sum(mask > 0, dtype=jnp.int32), 1).astype(jnp.float32)
    if aggregation == "token-mean":
        return Normalizer(tokens, tokens)
    if aggregation == "seq-mean-token-sum-norm":
        return Normalizer(jnp.float32(max(columns, 1)), tokens)
    return Normalizer(jnp.float32(max(rows, 1)), tokens)


_normalizer_of = normalizer  # for the functions below, whose argument has that name


def aggregate(
    values: jax.Array, mask: jax.Array, aggregation: Aggregation, normalizer: Normalizer | None = None
) -> jax.Array:
    """One number from values of tokens. With l the values where mask is 1, M rows and C columns:

        token-mean                sum l / number of tokens
        seq-mean-token-sum        sum l / M
        seq-mean-token-mean       sum over rows of (mean of l in the row) / M; a row without tokens adds 0
        seq-mean-token-sum-norm   sum l / C

    Args:
        values, mask: [M, C]; values where mask is 0 are not read.
        aggregation: a word of `Aggregation`.
        normalizer: of the whole mini-batch, if this is a micro-batch of it; None: `values` is all there is.

    Raises ValueError for another aggregation.
    """
    check_choice("aggregation", aggregation, Aggregation)
    if normalizer is None:
        normalizer = _normalizer_of(mask, aggregation)
    counts = mask > 0
    row_sums = jnp.sum(jnp.where(counts, values, 0.0), axis=-1)
    if aggregation == "seq-mean-token-mean":
        row_sums = row_sums / jnp.maximum(jnp.sum(counts, axis=-1, dtype=jnp.int32), 1)
    return jnp.sum(row_sums) / normalizer.loss


def probability_ratio(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    """pi(token) / pi_old(token), with its logarithm clamped to [-20, 20] nats as in the released code."""
    return jnp.exp(_clamp(_difference(logp, old_logp)))


def log_ratio(logp: jax.Array, old_logp: jax.Array, mask: jax.Array, ratio: Ratio) -> jax.Array:
    """The logarithm of the ratio that `policy_loss` clips, clamped to [-20, 20] nats:

        token     logp_t - old_logp_t
        sequence  the mean of those over the tokens of the row, log s_i of GSPO (arXiv 2507.18071)

    GSPO's gradient is that of its token-wise form: each token has the value of the row and the gradient of its own
    logp_t. (Summed over a row of equal advantages, and divided by its length, that is the gradient of s_i.)

    Args:
        logp, old_logp: float [M, C], log-probabilities of the taken tokens now and when sampled, nats.
        mask: [M, C], 1 for tokens that count.
        ratio: a word of `Ratio`.

    Returns:
        float32 [M, C] (float64 for float64 inputs), nats, 0 where mask is 0. The gradient flows through logp.

    Raises ValueError for another ratio.
    """
    check_choice("ratio", ratio, Ratio)
    difference = _masked_difference(logp, old_logp, mask)
    if ratio == "token":
        return _clamp(difference)
    counts = mask > 0
    tokens = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True, dtype=jnp.int32), 1)
    mean = lax.stop_gradient(jnp.sum(difference, axis=-1, keepdims=True) / tokens)
    own_gradient = difference - lax.stop_gradient(difference)  # of value 0
    return jnp.where(counts, _clamp(mean + own_gradient), 0.0)


def policy_loss(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float | None,
    clip_high: float | None,
    clip_ratio_c: float | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: Normalizer | None = None,
    ratio: Ratio = "token",
    keep: jax.Array | None = None,
    weight: jax.Array | None = None,
    kl_coef: jax.Array | None = None,
    entropy: jax.Array | None = None,
    entropy_coef: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped loss (arXiv 1707.06347) with the dual clip (arXiv 1912.09729). With r the probability ratio:

        l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   if A < 0:  l = min(l, -A clip_ratio_c)

    and, each only if it is asked for,

        weight_t (keep_t l_t + kl_coef_t |logp_t - old_logp_t| - entropy_coef H_t)

    then aggregated (see `aggregate`). With the whole mini-batch's `normalizer`, the losses, gradients and metrics of
    its micro-batches add up to the whole's.

    Args:
        logp: float [M, C], log-probabilities of the taken tokens, nats; the gradient flows through it.
        old_logp: float [M, C], the same when sampled or scored, nats.
        advantages: float [M, 1] or [M, C]; carry no gradient.
        mask: [M, C], 1 for tokens that count; nothing else is read where it is 0.
        clip_low, clip_high: the clip range of the ratio is [1 - clip_low, 1 + clip_high]; both None: no clip.
        clip_ratio_c: the dual clip, > 1; None: off.
        aggregation: a word of `Aggregation`.
        normalizer: `normalizer` of the whole mini-batch; None: these rows are all there is.
        ratio: r of each token, or of each row (GSPO): see `log_ratio`.
        keep: bool [M, C]; False leaves a token without l, but in the denominators (`fork_tokens`, `clip_cov_tokens`).
        weight: float [M, 1] or [M, C], multiplies all of a token's loss (`group_weight`).
        kl_coef: float [M, C], of the distance to old_logp (KL-Cov, arXiv 2505.22617); it has no gradient at exactly 0.
        entropy: float [M, C], H, nats; the gradient flows through it. Not read if entropy_coef is 0.
        entropy_coef: a Python float.

    Returns:
        (loss, metrics), float32 scalars (float64 for float64 inputs). An empty mask gives 0. Metrics, means over
        tokens: `objective/clip_fraction` (the clip decides), `objective/dual_clip_fraction` (the dual clip decides)
        and `objective/kl_old_new`, old_logp - logp, clamped as the ratio is, nats; with kl_coef `objective/kl_abs`,
        |logp - old_logp|, nats; with entropy_coef `objective/entropy_bonus`, entropy_coef H. None of them reads keep
        or weight.

    Raises ValueError for another aggregation or ratio, shapes that do not fit, clip_ratio_c <= 1, only one of clip_low
    and clip_high, or entropy_coef without entropy.
    """
    check_choice("aggregation", aggregation, Aggregation)
    check_clip("policy_loss", clip_low, clip_high)
    _check(logp, old_logp, advantages, mask, clip_ratio_c)
    _check_options(logp, keep, weight, kl_coef, entropy, entropy_coef)
    if normalizer is None:
        normalizer = _normalizer_of(mask, aggregation)
    counts = mask > 0
    difference = _masked_difference(logp, old_logp, mask)
    advantages = jnp.where(counts, lax.stop_gradient(advantages), 0.0)
    r = jnp.exp(log_ratio(logp, old_logp, mask, ratio))

    free = clipped = -advantages * r
    if clip_low is not None and clip_high is not None:
        clipped = -advantages * jnp.clip(r, 1.0 - clip_low, 1.0 + clip_high)
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
        "objective/kl_old_new": token_mean(-_clamp(difference)),
    }
    if keep is not None:
        values = jnp.where(keep, values, 0.0)
    if kl_coef is not None:
        # Not clamped: a token that is far away is the one to pull back, and the gradient is bounded anyway. jnp.abs has
        # gradient 1 at 0, which would move every chosen token in the first update of a step.
        distance = difference * lax.stop_gradient(jnp.sign(difference))
        values += jnp.where(counts, lax.stop_gradient(kl_coef), 0.0) * distance
        metrics["objective/kl_abs"] = token_mean(distance)
    if entropy is not None and entropy_coef != 0:
        bonus = entropy_coef * jnp.where(counts, entropy, 0.0).astype(values.dtype)
        values -= bonus
        metrics["objective/entropy_bonus"] = token_mean(bonus)
    if weight is not None:
        values *= lax.stop_gradient(weight)
    return aggregate(values, mask, aggregation, normalizer), metrics


def _difference(logp: jax.Array, old_logp: jax.Array) -> jax.Array:
    return jnp.asarray(logp, jnp.result_type(logp, jnp.float32)) - old_logp


def _masked_difference(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
    # Selecting before anything else keeps whatever stands in the padding out of the backward pass.
    counts = mask > 0
    return _difference(jnp.where(counts, logp, 0.0), jnp.where(counts, lax.stop_gradient(old_logp), 0.0))


def _clamp(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def check_clip(caller: str, clip_low: float | None, clip_high: float | None) -> None:
    """Raises ValueError if only one of the two is None."""
    if (clip_low is None) != (clip_high is None):
        raise ValueError(
            f"{caller}: clip_low = {clip_low} and clip_high = {clip_high} bound the ratio together; give both, or None "
            "for both to switch the clip off."
        )


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


def _check_options(
    logp: jax.Array,
    keep: jax.Array | None,
    weight: jax.Array | None,
    kl_coef: jax.Array | None,
    entropy: jax.Array | None,
    entropy_coef: float,
) -> None:
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"policy_loss: entropy_coef = {entropy_coef} needs entropy; give it, or set entropy_coef = 0.")
    M, C = logp.shape
    for name, x, shapes in (
        ("keep", keep, ((M, C),)),
        ("weight", weight, ((M, C), (M, 1))),
        ("kl_coef", kl_coef, ((M, C),)),
        ("entropy", entropy, ((M, C),)),
    ):
        if x is not None and x.shape not in shapes:
            raise ValueError(f"policy_loss: {name} has shape {x.shape}; give {' or '.join(map(str, shapes))}, as logp.")
