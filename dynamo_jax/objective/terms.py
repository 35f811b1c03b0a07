"""From a run's settings to what each token of a mini-batch brings to the loss: its advantage, and which tokens count.

Means, maxima, thresholds and counts are over the whole mini-batch: this runs once an update, before the micro-batches.
Arrays are [I, G, S], those of packed rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dynamo_jax.batch import Tokens, TokenStats
from dynamo_jax.config import Config, ObjectiveConfig
from dynamo_jax.objective.correction import Correction, importance_weight, mismatch_metrics
from dynamo_jax.objective.modulation import entropy_change, modulate
from dynamo_jax.objective.policy_loss import TokenTerms
from dynamo_jax.objective.ratio import Clip, log_ratio
from dynamo_jax.objective.segments import Segments
from dynamo_jax.objective.selection import clip_cov_tokens, fork_tokens, kl_cov_tokens, priority_of
from dynamo_jax.objective.shaping import entropy_advantage

Metrics = dict[str, jax.Array]


def clip_of(config: ObjectiveConfig) -> Clip:
    return Clip(config.clip_low, config.clip_high, config.clip_ratio_c)


def correction_of(config: ObjectiveConfig) -> Correction:
    c = config.correction
    return Correction(c.kind, c.level, c.low, c.high)


def reads_now(config: Config) -> bool:
    """Whether `token_terms` reads the statistics under the policy that is updated."""
    o = config.objective
    return bool(
        config.modulation.enabled
        or o.entropy_advantage.enabled
        or o.fork_fraction is not None
        or o.clip_cov.enabled
        or o.kl_cov.enabled
        or (o.old_logp == "sampler" and o.correction.kind != "none")
    )


def token_terms(
    tokens: Tokens, old_logp_IGS: jax.Array, now: TokenStats, rollouts: int, config: Config
) -> tuple[jax.Array, TokenTerms, Metrics]:
    """The advantage of each token, what else `policy_loss` makes of it, and the metrics of the method.

    Nothing here carries a gradient; the bonus, which does, is left to the update.

    Args:
        tokens: of the mini-batch.
        old_logp_IGS: nats, under the policy that sampled.
        now: statistics under the policy that is updated; anything unless `reads_now`.
        rollouts: M.
    """
    o = config.objective
    advantage_IGS, metrics = token_advantages(tokens, old_logp_IGS, now, rollouts, config)
    mask_IGS = tokens.mask
    keep_IGS = kl_IGS = None
    count = jnp.maximum(jnp.sum(mask_IGS), 1)
    if o.fork_fraction is not None:
        keep_IGS, threshold = fork_tokens(now.entropy, mask_IGS, o.fork_fraction)
        metrics |= {
            "objective/fork_fraction": jnp.sum(keep_IGS * mask_IGS) / count,
            "objective/fork_threshold": threshold,
        }
    if o.clip_cov.enabled or o.kl_cov.enabled:
        priority_IGS = priority_of(jax.random.key(0), tokens.random, tokens.step)
    if o.clip_cov.enabled:
        # The ratio that the clip sees, as a difference to logp.
        segments = Segments(tokens.rollout, rollouts)
        seen_IGS = now.logp - log_ratio(now.logp, old_logp_IGS, mask_IGS, o.ratio, segments=segments)
        detached_IGS = clip_cov_tokens(
            now.logp,
            seen_IGS,
            advantage_IGS,
            mask_IGS,
            priority_IGS,
            clip_of(o),
            fraction=o.clip_cov.fraction,
            low=o.clip_cov.low,
            high=o.clip_cov.high,
        )
        keep_IGS = ~detached_IGS if keep_IGS is None else keep_IGS & ~detached_IGS
        metrics["objective/clip_cov_fraction"] = jnp.sum(detached_IGS) / count
    if o.kl_cov.enabled:
        penalised_IGS = kl_cov_tokens(now.logp, advantage_IGS, mask_IGS, priority_IGS, fraction=o.kl_cov.fraction)
        kl_IGS = o.kl_cov.coefficient * penalised_IGS
        metrics["objective/kl_cov_fraction"] = jnp.sum(penalised_IGS) / count
    corrected_IGS, mismatch = _correction(tokens, old_logp_IGS, now, rollouts, config)
    weight_IGS = tokens.weight if corrected_IGS is None else tokens.weight * corrected_IGS
    return advantage_IGS, TokenTerms(keep=keep_IGS, kl_coef=kl_IGS, weight=weight_IGS), metrics | mismatch


def _correction(
    tokens: Tokens, old_logp_IGS: jax.Array, now: TokenStats, rollouts: int, config: Config
) -> tuple[jax.Array | None, Metrics]:
    """What each token's loss is multiplied by for the sampler's sake, and the metrics of the mismatch. With r the ratio
    of the loss, q the sampler and f what `Correction` makes of a weight:

        old_logp = score     f(pi_old / q)         r = pi / pi_old is left to PPO's clip
        old_logp = sampler   f(pi / q) / r         r = pi / q has the mismatch in it; f takes its place
                             1 for kind none

    In a step's first update, where pi = pi_old, a token that no clip stops has the weight f(pi_old / q) either way. The
    metrics compare q with pi_old, or with `sampler` with pi, which moves within a step; there is none if pi is not read
    (`reads_now`): `objective/kl_old_new` is the mismatch then.

    What the clip does differs. `score` counts only how far the policy has moved. `sampler` counts the mismatch, too: a
    token of positive advantage with pi_old / q > 1 + clip_high has no gradient though the policy has not moved, nor has
    one of negative advantage with pi_old / q < 1 - clip_low. So f there bounds what the clip leaves: r above `high` for
    negative advantages (up to the dual clip), and r below `low` for positive ones; a truncation with `high` above 1 +
    clip_high changes nothing else. Where the mismatch is as wide as the clip, take `score`, or no clip.
    """
    o, correction, sampled_IGS = config.objective, correction_of(config.objective), tokens.sampled_logp
    by_sampler = o.old_logp == "sampler"
    segments = Segments(tokens.rollout, rollouts)
    trained_IGS, metrics = now.logp if by_sampler else old_logp_IGS, {}
    if not by_sampler or reads_now(config):
        metrics = mismatch_metrics(trained_IGS, sampled_IGS, tokens.mask, correction, segments)
    if correction.kind == "none" and not by_sampler:
        return None, metrics
    weight_IGS = importance_weight(trained_IGS, sampled_IGS, tokens.mask, correction.level, segments)
    weight_IGS = correction.of(weight_IGS)
    if by_sampler and correction.kind != "none":
        weight_IGS /= jnp.exp(log_ratio(now.logp, sampled_IGS, tokens.mask, o.ratio, segments=segments))
    return weight_IGS, metrics


def token_advantages(
    tokens: Tokens, old_logp_IGS: jax.Array, now: TokenStats, rollouts: int, config: Config
) -> tuple[jax.Array, Metrics]:
    """The advantage of each token: its rollout's, grown by its entropy, times DynaMO's two factors."""
    e, m = config.objective.entropy_advantage, config.modulation
    mask_IGS, metrics = tokens.mask, {}
    advantage_IGS = tokens.advantage * mask_IGS
    count = jnp.maximum(jnp.sum(mask_IGS), 1)
    if e.enabled:
        grown_IGS = entropy_advantage(advantage_IGS, now.entropy, mask_IGS, e.alpha, e.kappa)
        metrics["objective/entropy_advantage"] = jnp.sum((grown_IGS - advantage_IGS) * mask_IGS) / count
        advantage_IGS = grown_IGS
    if not m.enabled:
        return advantage_IGS, metrics
    if m.scope == "minibatch":
        advantage_IGS, comp_IGS, stab_IGS = _modulated(advantage_IGS, old_logp_IGS, now, tokens, rollouts, config)
    else:  # the first axis is that of the micro-batches
        each = (advantage_IGS, old_logp_IGS, now, tokens)
        modulated = jax.lax.map(lambda x: _modulated(x[0], x[1], x[2], x[3], rollouts, config), each)
        advantage_IGS, comp_IGS, stab_IGS = modulated
    return advantage_IGS, metrics | {  # the factors are exactly 1 on padding, so maxima and minima need no mask
        "modulation/comp_mean": jnp.sum(comp_IGS * mask_IGS) / count,
        "modulation/comp_max": jnp.max(comp_IGS),
        "modulation/stab_mean": jnp.sum(stab_IGS * mask_IGS) / count,
        "modulation/stab_min": jnp.min(stab_IGS),
    }


def _modulated(
    advantage_IGS: jax.Array, old_logp_IGS: jax.Array, now: TokenStats, tokens: Tokens, rollouts: int, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    o, m = config.objective, config.modulation
    mask_IGS, segments = tokens.mask, Segments(tokens.rollout, rollouts)
    change_IGS = entropy_change(
        now.logp,
        old_logp_IGS,
        now.entropy,
        now.lambda_mean,
        advantage_IGS,
        mask_IGS,
        clip_of(o),
        baseline=m.entropy_change,
        log_ratio=log_ratio(now.logp, old_logp_IGS, mask_IGS, o.ratio, segments=segments),
        segments=segments,
    )
    return modulate(
        advantage_IGS,
        now.entropy,
        change_IGS,
        mask_IGS,
        alpha=m.alpha,
        lambda_min=m.lambda_min,
        gamma=m.gamma,
        tau=m.tau,
        compensation=m.compensation,
        stabilisation=m.stabilisation,
    )
