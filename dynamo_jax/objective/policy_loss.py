"""The clipped policy-gradient loss, its aggregation over tokens and sequences, and what keeps micro-batches exact."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import Aggregation, Ratio, check_choice
from dynamo_jax.objective.ratio import Clip, clamp, log_ratio, masked_difference
from dynamo_jax.objective.segments import Segments


class Denominators(NamedTuple):
    """What sums over tokens are divided by. Of the whole mini-batch, so that losses of its micro-batches add up."""

    loss: jax.Array  # float scalar, divides the loss
    tokens: jax.Array  # float scalar, divides the metrics


class TokenTerms(NamedTuple):
    """What a method makes of the clipped loss l of a token, beside its advantage: see `policy_loss`. None: nothing."""

    keep: jax.Array | None = None  # bool [M, C]; False: without l, but in the denominators
    kl_coef: jax.Array | None = None  # float [M, C], of the distance to old_logp
    bonus: jax.Array | None = None  # float [M, C], what the token earns; carries a gradient
    penalty: jax.Array | None = None  # float [M, C], what the token pays; carries a gradient, which the others do not
    weight: jax.Array | None = None  # float [M, 1] or [M, C], multiplies all of the token's loss


def denominators(mask: jax.Array, aggregation: Aggregation) -> Denominators:
    """The denominators of `policy_loss` for a mini-batch, to be given to each of its micro-batches.

    Args:
        mask: [M, C], the whole mini-batch's.
        aggregation: a word of `Aggregation`.

    Returns:
        Two float32 scalars, at least 1.

    Raises ValueError for another aggregation.
    """
    check_choice("aggregation", aggregation, Aggregation)
    counts = mask > 0
    tokens, rows = (
        jnp.maximum(jnp.sum(x, dtype=jnp.int32), 1).astype(jnp.float32) for x in (counts, jnp.any(counts, axis=-1))
    )
    if aggregation == "token-mean":
        return Denominators(tokens, tokens)
    if aggregation == "seq-mean-token-sum-norm":
        return Denominators(rows * max(mask.shape[1], 1), tokens)
    return Denominators(rows, tokens)


def rollout_scale(length_M: jax.Array, max_tokens: int, aggregation: Aggregation) -> jax.Array:
    """float32 [M]: what the loss of each token is multiplied by, so that the plain sum over tokens is `aggregate`.

    Args:
        length_M: int, tokens of each rollout of the mini-batch; those of 0 tokens are none.
        max_tokens: C.
        aggregation: a word of `Aggregation`.

    Raises ValueError for another aggregation.
    """
    check_choice("aggregation", aggregation, Aggregation)
    tokens = jnp.maximum(jnp.sum(length_M), 1).astype(jnp.float32)
    rollouts = jnp.maximum(jnp.sum(length_M > 0), 1).astype(jnp.float32)
    each: dict[Aggregation, jax.Array] = {
        "token-mean": 1.0 / tokens,
        "seq-mean-token-sum": 1.0 / rollouts,
        "seq-mean-token-mean": 1.0 / (rollouts * jnp.maximum(length_M, 1)),
        "seq-mean-token-sum-norm": 1.0 / (rollouts * max(max_tokens, 1)),
    }
    return jnp.broadcast_to(each[aggregation], length_M.shape)


_denominators_of = denominators  # for the functions below, whose argument has that name


def aggregate(
    values: jax.Array, mask: jax.Array, aggregation: Aggregation, denominators: Denominators | None = None
) -> jax.Array:
    """One number from values of tokens. With l the values where mask is 1, and means over the rows that have tokens:

        token-mean                sum l / number of tokens
        seq-mean-token-sum        mean over rows of sum l
        seq-mean-token-mean       mean over rows of (sum l / number of the row's tokens)
        seq-mean-token-sum-norm   mean over rows of (sum l / C), the constant of Dr. GRPO (arXiv 2503.20783)

    Args:
        values, mask: [M, C]; values where mask is 0 are not read.
        aggregation: a word of `Aggregation`.
        denominators: of the whole mini-batch, if this is a micro-batch of it; None: `values` is all there is.

    Raises ValueError for another aggregation.
    """
    check_choice("aggregation", aggregation, Aggregation)
    if denominators is None:
        denominators = _denominators_of(mask, aggregation)
    counts = mask > 0
    row_sums = jnp.sum(jnp.where(counts, values, 0.0), axis=-1)
    if aggregation == "seq-mean-token-mean":
        row_sums = row_sums / jnp.maximum(jnp.sum(counts, axis=-1, dtype=jnp.int32), 1)
    return jnp.sum(row_sums) / denominators.loss


def policy_loss(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: Clip,
    *,
    aggregation: Aggregation = "token-mean",
    denominators: Denominators | None = None,
    ratio: Ratio = "token",
    terms: TokenTerms = TokenTerms(),  # noqa: B008 - a constant
    segments: Segments | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped loss (arXiv 1707.06347) with the dual clip (arXiv 1912.09729). With r the probability ratio:

        l = max(-A r, -A clip(r, 1 - low, 1 + high));   if A < 0:  l = min(l, -A dual)

    and, each only if it is asked for,

        weight_t (keep_t l_t + kl_coef_t |logp_t - old_logp_t| + penalty_t - bonus_t)

    then aggregated (see `aggregate`). With the whole mini-batch's `denominators`, the losses, gradients and metrics of
    its micro-batches add up to the whole's.

    Args:
        logp: float [M, C], log-probabilities of the taken tokens, nats; the gradient flows through it.
        old_logp: float [M, C], the same when sampled or scored, nats.
        advantages: float [M, 1] or [M, C]; carry no gradient.
        mask: [M, C], 1 for tokens that count; nothing else is read where it is 0.
        clip: the range of the ratio, and the dual clip.
        aggregation: a word of `Aggregation`.
        denominators: `denominators` of the whole mini-batch; None: these rows are all there is.
        ratio: r of each token, or of each rollout (GSPO): see `log_ratio`.
        terms: keep, of `fork_tokens` and `clip_cov_tokens`; kl_coef, of KL-Cov (arXiv 2505.22617), whose distance has
            no gradient at exactly 0; bonus, a coefficient times H_t, and penalty, one times `kl_estimate`, whose
            gradients flow; weight, of `group_weight` and `Correction`.
        segments: the rollout of each token, for `ratio`; None: each row is one.

    Returns:
        (loss, metrics), float32 scalars (float64 for float64 inputs). An empty mask gives 0. Metrics, means over
        tokens: `objective/clip_fraction` (the clip decides), `objective/dual_clip_fraction` (the dual clip decides)
        and `objective/kl_old_new`, old_logp - logp, clamped as the ratio is, nats; with kl_coef `objective/kl_abs`,
        |logp - old_logp|, nats; with bonus `objective/entropy_bonus`; with penalty `objective/kl_penalty`. None of
        them reads keep or weight.

    Raises ValueError for another aggregation or ratio, or shapes that do not fit.
    """
    check_choice("aggregation", aggregation, Aggregation)
    _check_shapes(logp, old_logp, advantages, mask, terms)
    if denominators is None:
        denominators = _denominators_of(mask, aggregation)
    counts = mask > 0
    difference = masked_difference(logp, old_logp, mask)
    advantages = jnp.where(counts, lax.stop_gradient(advantages), 0.0)
    r = jnp.exp(log_ratio(logp, old_logp, mask, ratio, segments=segments))

    free, clipped = -advantages * r, -advantages * clip.of(r)
    values = jnp.maximum(free, clipped)
    dual_clipped = jnp.zeros_like(counts)
    if clip.dual is not None:
        ceiling = -advantages * clip.dual
        dual_clipped = (advantages < 0) & (values > ceiling)
        values = jnp.where(advantages < 0, jnp.minimum(ceiling, values), values)

    def token_mean(x: jax.Array) -> jax.Array:
        return lax.stop_gradient(jnp.sum(jnp.where(counts, x, 0.0)) / denominators.tokens)

    metrics = {
        "objective/clip_fraction": token_mean(clipped > free),
        "objective/dual_clip_fraction": token_mean(dual_clipped),
        "objective/kl_old_new": token_mean(-clamp(difference)),
    }
    if terms.keep is not None:
        values = jnp.where(terms.keep, values, 0.0)
    if terms.kl_coef is not None:
        # Not clamped: a token that is far away is the one to pull back, and the gradient is bounded anyway. jnp.abs has
        # gradient 1 at 0, which would move every chosen token in the first update of a step.
        distance = difference * lax.stop_gradient(jnp.sign(difference))
        values += jnp.where(counts, lax.stop_gradient(terms.kl_coef), 0.0) * distance
        metrics["objective/kl_abs"] = token_mean(distance)
    if terms.bonus is not None:
        bonus = jnp.where(counts, terms.bonus, 0.0).astype(values.dtype)
        values -= bonus
        metrics["objective/entropy_bonus"] = token_mean(bonus)
    if terms.penalty is not None:
        penalty = jnp.where(counts, terms.penalty, 0.0).astype(values.dtype)
        values += penalty
        metrics["objective/kl_penalty"] = token_mean(penalty)
    if terms.weight is not None:
        values *= lax.stop_gradient(terms.weight)
    return aggregate(values, mask, aggregation, denominators), metrics


def _check_shapes(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, terms: TokenTerms
) -> None:
    M, C = logp.shape
    if old_logp.shape != (M, C) or mask.shape != (M, C) or advantages.shape not in ((M, C), (M, 1)):
        raise ValueError(
            f"policy_loss: logp has shape {logp.shape}, old_logp {old_logp.shape}, mask {mask.shape}, advantages "
            f"{advantages.shape}; give [M, C] throughout, advantages [M, C] or [M, 1]."
        )
    for name, x in terms._asdict().items():
        shapes = ((M, C), (M, 1)) if name == "weight" else ((M, C),)
        if x is not None and x.shape not in shapes:
            raise ValueError(f"policy_loss: {name} has shape {x.shape}; give {' or '.join(map(str, shapes))}, as logp.")
