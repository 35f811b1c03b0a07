"""From a run's settings to what each token of a mini-batch brings to the loss: its advantage, and which tokens count.

Means, maxima, thresholds and counts are over the whole mini-batch: this runs once an update, before the micro-batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dynamo_jax.batch import TokenStats, TrainBatch, micro_batches, whole
from dynamo_jax.config import Config, ObjectiveConfig
from dynamo_jax.objective.correction import Correction, importance_weight, mismatch_metrics
from dynamo_jax.objective.modulation import entropy_change, modulate
from dynamo_jax.objective.policy_loss import TokenTerms
from dynamo_jax.objective.ratio import Clip, log_ratio
from dynamo_jax.objective.segments import Segments
from dynamo_jax.objective.selection import clip_cov_tokens, fork_tokens, kl_cov_tokens, token_priority
from dynamo_jax.objective.shaping import entropy_advantage

Metrics = dict[str, jax.Array]


def clip_of(config: ObjectiveConfig) -> Clip:
    return Clip(config.clip_low, config.clip_high, config.clip_ratio_c)


def correction_of(config: ObjectiveConfig) -> Correction:
    c = config.correction
    return Correction(c.kind, c.level, c.low, c.high)


def token_terms(
    batch: TrainBatch, old: TokenStats, now: TokenStats, mask_MC: jax.Array, config: Config
) -> tuple[jax.Array, TokenTerms, Metrics]:
    """The advantage of each token [M, C], what else `policy_loss` makes of it, and the metrics of the method.

    Nothing here carries a gradient; the bonus, which does, is left to the update.

    Args:
        batch: the mini-batch, of which advantages, weights, random numbers and the sampler's log-probs are read.
        old: statistics under the policy that sampled, its log-probs by `objective.old_logp` the sampler's; `now`: under
            the policy that is updated.
        mask_MC: 1 for tokens that count.
    """
    o = config.objective
    advantage_MC, metrics = token_advantages(batch.advantage_M, old, now, mask_MC, config)
    keep_MC = kl_MC = None
    tokens = jnp.maximum(jnp.sum(mask_MC), 1)
    if o.fork_fraction is not None:
        keep_MC, threshold = fork_tokens(now.entropy, mask_MC, o.fork_fraction)
        metrics |= {
            "objective/fork_fraction": jnp.sum(keep_MC * mask_MC) / tokens,
            "objective/fork_threshold": threshold,
        }
    if o.clip_cov.enabled or o.kl_cov.enabled:
        priority_MC = token_priority(jax.random.key(0), batch.random_M, mask_MC.shape[1])
    if o.clip_cov.enabled:
        # The ratio that the clip sees, as a difference to logp.
        seen_MC = now.logp - log_ratio(now.logp, old.logp, mask_MC, o.ratio)
        detached_MC = clip_cov_tokens(
            now.logp,
            seen_MC,
            advantage_MC,
            mask_MC,
            priority_MC,
            clip_of(o),
            fraction=o.clip_cov.fraction,
            low=o.clip_cov.low,
            high=o.clip_cov.high,
        )
        keep_MC = ~detached_MC if keep_MC is None else keep_MC & ~detached_MC
        metrics["objective/clip_cov_fraction"] = jnp.sum(detached_MC) / tokens
    if o.kl_cov.enabled:
        penalised_MC = kl_cov_tokens(now.logp, advantage_MC, mask_MC, priority_MC, fraction=o.kl_cov.fraction)
        kl_MC = o.kl_cov.coefficient * penalised_MC
        metrics["objective/kl_cov_fraction"] = jnp.sum(penalised_MC) / tokens
    corrected_MC, mismatch = _correction(batch.sampled_logp_MC, old, now, mask_MC, o)
    weight_MC = batch.weight_M[:, None] * corrected_MC
    return advantage_MC, TokenTerms(keep=keep_MC, kl_coef=kl_MC, weight=weight_MC), metrics | mismatch


def _correction(
    sampled_logp: jax.Array,
    old: TokenStats,
    now: TokenStats,
    mask: jax.Array,
    o: ObjectiveConfig,
    segments: Segments | None = None,
) -> tuple[jax.Array, Metrics]:
    """What each token's loss is multiplied by for the sampler's sake, and the metrics of the mismatch. With r the ratio
    of the loss, q the sampler and f what `Correction` makes of a weight:

        old_logp = score     f(pi_old / q)         r = pi / pi_old is left to PPO's clip
        old_logp = sampler   f(pi / q) / r         r = pi / q has the mismatch in it; f takes its place
                             1 for kind none

    In a step's first update, where pi = pi_old, a token that no clip stops has the weight f(pi_old / q) either way.

    What the clip does differs. `score` counts only how far the policy has moved. `sampler` counts the mismatch, too: a
    token of positive advantage with pi_old / q > 1 + clip_high has no gradient though the policy has not moved, nor has
    one of negative advantage with pi_old / q < 1 - clip_low. So f there bounds what the clip leaves: r above `high` for
    negative advantages (up to the dual clip), and r below `low` for positive ones; a truncation with `high` above 1 +
    clip_high changes nothing else. Where the mismatch is as wide as the clip, take `score`, or no clip.
    """
    correction = correction_of(o)
    by_sampler = o.old_logp == "sampler"
    trained = now.logp if by_sampler else old.logp
    metrics = mismatch_metrics(trained, sampled_logp, mask, correction, segments)
    if correction.kind == "none" and not by_sampler:
        return jnp.ones_like(mask), metrics
    weight = correction.of(importance_weight(trained, sampled_logp, mask, correction.level, segments))
    if by_sampler and correction.kind != "none":
        weight /= jnp.exp(log_ratio(now.logp, sampled_logp, mask, o.ratio))
    return weight, metrics


def token_advantages(
    advantage_M: jax.Array, old: TokenStats, now: TokenStats, mask_MC: jax.Array, config: Config
) -> tuple[jax.Array, Metrics]:
    """The advantage of each token [M, C]: its rollout's, grown by its entropy, times DynaMO's two factors."""
    e, m = config.objective.entropy_advantage, config.modulation
    advantage_MC, metrics = advantage_M[:, None] * mask_MC, {}
    tokens = jnp.maximum(jnp.sum(mask_MC), 1)
    if e.enabled:
        grown_MC = entropy_advantage(advantage_MC, now.entropy, mask_MC, e.alpha, e.kappa)
        metrics["objective/entropy_advantage"] = jnp.sum((grown_MC - advantage_MC) * mask_MC) / tokens
        advantage_MC = grown_MC
    if not m.enabled:
        return advantage_MC, metrics
    if m.scope == "minibatch":
        advantage_MC, comp_MC, stab_MC = _modulated(advantage_MC, old, now, mask_MC, config)
    else:
        packed = micro_batches((advantage_MC, old, now, mask_MC), config.micro_batch)
        modulated = jax.lax.map(lambda x: _modulated(x[0], x[1], x[2], x[3], config), packed)
        advantage_MC, comp_MC, stab_MC = whole(modulated)
    return advantage_MC, metrics | {  # the factors are exactly 1 on padding, so maxima and minima need no mask
        "modulation/comp_mean": jnp.sum(comp_MC * mask_MC) / tokens,
        "modulation/comp_max": jnp.max(comp_MC),
        "modulation/stab_mean": jnp.sum(stab_MC * mask_MC) / tokens,
        "modulation/stab_min": jnp.min(stab_MC),
    }


def _modulated(
    advantage_MC: jax.Array, old: TokenStats, now: TokenStats, mask_MC: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    o, m = config.objective, config.modulation
    change_MC = entropy_change(
        now.logp,
        old.logp,
        now.entropy,
        now.lambda_mean,
        advantage_MC,
        mask_MC,
        clip_of(o),
        baseline=m.entropy_change,
        log_ratio=log_ratio(now.logp, old.logp, mask_MC, o.ratio),
    )
    return modulate(
        advantage_MC,
        now.entropy,
        change_MC,
        mask_MC,
        alpha=m.alpha,
        lambda_min=m.lambda_min,
        gamma=m.gamma,
        tau=m.tau,
        compensation=m.compensation,
        stabilisation=m.stabilisation,
    )
