"""DynaMO's advantage modulation (arXiv 2602.19208): the entropy change of a token and the two factors made from it.

Nothing here carries a gradient. Extremes are taken over the array given, so give the whole mini-batch: taken over
micro-batches, as in the released code, they would make advantages depend on how the batch is packed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import Baseline, check_choice
from dynamo_jax.objective.ratio import Clip, probability_ratio
from dynamo_jax.objective.segments import Segments, segment_mean

# The released code's; where all entropies, or all entropy changes, are equal up to rounding, the factors become 1.
_EPSILON = 1e-8


def entropy_change(
    logp: jax.Array,
    old_logp: jax.Array,
    entropy: jax.Array,
    lambda_mean: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: Clip,
    *,
    baseline: Baseline = "exact",
    log_ratio: jax.Array | None = None,
    segments: Segments | None = None,
) -> jax.Array:
    """First-order change of a token's policy entropy under a policy-gradient step, Eq. 29 of arXiv 2602.19208:

        dH_t = -xi_t (pi_t Lam_t - E_{a ~ pi}[pi(a) Lam(a)]),   xi_t = 1_clip r_t A_t,   Lam(a) = log pi(a) + H,

    where 1_clip is 1 if (A > 0 and r <= 1 + clip.high) or (A < 0 and r >= 1 - clip.low), else 0. The expectation is
    over the vocabulary and comes as `lambda_mean`. With `baseline` "sequence_mean" it is what the released code has in
    its place: the mean of pi_t Lam_t over the rollout's tokens, which has little to do with it. With `clip.dual` the
    tokens of negative advantage that the dual clip leaves without gradient (r > clip.dual) count as 0 too: one of them
    would otherwise set the maximum that scales all others. (The released code has no such rule.)

    Args:
        logp, old_logp: float [M, C], log-probabilities of the taken tokens now and when sampled, nats.
        entropy: float [M, C], H, nats.
        lambda_mean: float [M, C], sum_a pi(a)^2 (log pi(a) + H), from `token_stats`; not read for "sequence_mean".
        advantages: float [M, 1] or [M, C].
        mask: [M, C], 1 for tokens that count.
        clip: that of `policy_loss`.
        baseline: a word of `Baseline`.
        log_ratio: float [M, C], log r, from `log_ratio`, if it is not the token's own logp - old_logp; nats.
        segments: the rollout of each token; None: each row is one.

    Returns:
        float32 [M, C] (float64 for float64 inputs), nats, without gradient, 0 where mask is 0.

    Raises ValueError for another baseline.
    """
    check_choice("entropy_change: baseline", baseline, Baseline)
    logp, old_logp, entropy, lambda_mean, advantages = (
        lax.stop_gradient(jnp.asarray(x, jnp.result_type(x, jnp.float32)))
        for x in (logp, old_logp, entropy, lambda_mean, advantages)
    )
    counts = mask > 0
    ratio = probability_ratio(logp, old_logp) if log_ratio is None else jnp.exp(lax.stop_gradient(log_ratio))
    has_gradient = (advantages != 0) & ~clip.stops(ratio, advantages) & ~clip.dual_stops(ratio, advantages)
    value = jnp.exp(logp) * (logp + entropy)
    if baseline == "sequence_mean":
        lambda_mean = segment_mean(value, mask, segments)
    change = -ratio * advantages * (value - lambda_mean)
    return jnp.where(has_gradient & counts, change, 0.0)


def modulate(
    advantages: jax.Array,
    entropy: jax.Array,
    entropy_change: jax.Array,
    mask: jax.Array,
    *,
    alpha: float,
    lambda_min: float,
    gamma: float,
    tau: float,
    compensation: bool = True,
    stabilisation: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multiplies each token's advantage by DynaMO's two factors (arXiv 2602.19208):

        beta_comp = 1 + alpha (H_max - H_t) / (H_max - H_min)  for positive advantages, else 1
        beta_stab = f(Xi_t / max_j Xi_j),  Xi_t = |dH_t|,
                    f(x) = lambda_min + (1 - lambda_min) / (1 + exp(gamma (x - tau)))

    Extremes are over the tokens of the mask, the whole mini-batch. Denominators carry the released code's 1e-8: equal
    entropies give beta_comp = 1, and no entropy change at all gives beta_stab = f(0), 1 to rounding for the usual gamma
    and tau.

    Args:
        advantages: float [M, 1] or [M, C].
        entropy: float [M, C], nats.
        entropy_change: float [M, C], dH_t, of either sign.
        mask: [M, C], 1 for tokens that count.
        alpha, lambda_min, gamma, tau: as in the equations. (The released code's mu_max is 1 + alpha.)
        compensation, stabilisation: False leaves that factor at 1.

    Returns:
        (advantages, beta_comp, beta_stab), each float32 [M, C] (float64 for float64 inputs), without gradient. Both
        factors are exactly 1 where mask is 0.
    """
    advantages, entropy, entropy_change = (
        lax.stop_gradient(jnp.asarray(x, jnp.result_type(x, jnp.float32)))
        for x in (advantages, entropy, entropy_change)
    )
    counts = mask > 0
    beta_comp = beta_stab = jnp.ones_like(entropy)
    if compensation:
        # Entropies are not negative: starting the maximum at 0 changes nothing but the empty mask.
        highest = jnp.max(entropy, where=counts, initial=0.0)
        lowest = jnp.min(entropy, where=counts, initial=highest)
        boosted = 1.0 + alpha * (highest - entropy) / (highest - lowest + _EPSILON)
        beta_comp = jnp.where(counts & (advantages > 0), boosted, beta_comp)
    if stabilisation:
        size = jnp.abs(entropy_change)
        x = size / (jnp.max(size, where=counts, initial=0.0) + _EPSILON)
        damped = lambda_min + (1.0 - lambda_min) * jax.nn.sigmoid(gamma * (tau - x))
        beta_stab = jnp.where(counts, damped, beta_stab)
    return advantages * beta_comp * beta_stab, beta_comp, beta_stab
