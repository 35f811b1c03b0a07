"""What is done about a sampler whose probabilities are not quite the trainer's: importance weights, within bounds.

Rollouts are drawn from q, the policy as the sampler computes it (other kernels, another dtype), and trained on as if
they were from pi_old, the same policy as the trainer computes it. A token's share of the gradient is then off by the
factor pi_old / q, and that of a whole rollout by the product of these over its tokens. Nothing here carries a gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import CorrectionKind, CorrectionLevel, check_choice
from dynamo_jax.objective.ratio import clamp, masked_difference
from dynamo_jax.objective.segments import Segments, segment_sum


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Correction:
    """How the importance weight w = pi / q is bounded:

        none      no weight: 1
        truncate  min(w, high)                             TIS, https://fengyao.notion.site/off-policy-rl
        mask      w inside [low, high], 0 outside of it    MIS, https://richardli.xyz/rl-collapse; IcePop
                                                           (arXiv 2510.18855) is this with level = token

    and what it is the weight of:

        token     pi(token) / q(token)
        sequence  the product of these over the rollout

    The product, not its geometric mean, is what makes E_q[w f] = E_pi[f] of a rollout; verl, too, takes a geometric
    mean only to reject rollouts, never as their weight. The price is its variance: over a thousand tokens that are each
    off by 1% it is off by a third in the log. Weights of tokens leave what comes before and after a token uncorrected,
    a bias of second order that no length makes worse: they are the default.

    Raises ValueError for another kind or level, or bounds that do not have 1 between them.
    """

    kind: CorrectionKind = "none"
    level: CorrectionLevel = "token"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        check_choice("Correction: kind", self.kind, CorrectionKind)
        check_choice("Correction: level", self.level, CorrectionLevel)
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"Correction: low = {self.low} and high = {self.high}; give 0 <= low <= 1 <= high: a token on which "
                "sampler and trainer agree has the weight 1."
            )

    def of(self, weight: jax.Array) -> jax.Array:
        """The weight within its bounds. NaN stays NaN."""
        if self.kind == "none":
            return jnp.where(jnp.isnan(weight), weight, 1.0)
        if self.kind == "truncate":
            return jnp.minimum(weight, self.high)
        return jnp.where((weight < self.low) | (weight > self.high), 0.0, weight)


def importance_weight(
    logp: jax.Array, sampled_logp: jax.Array, mask: jax.Array, level: CorrectionLevel, segments: Segments | None = None
) -> jax.Array:
    """w = pi(token) / q(token), or the product of these over the token's rollout, its logarithm within [-20, 20] nats.

    Args:
        logp: float, log-probabilities of the taken tokens as the trainer computes them, nats.
        sampled_logp: the same as the sampler does.
        mask: 1 for tokens that count; all three of one shape.
        level: a word of `CorrectionLevel`.
        segments: which rollout each token belongs to; None: a row is a rollout.

    Returns:
        float32 (float64 for float64 inputs), of the same shape, without gradient; 0 where mask is 0. NaN for a token,
        or for the rollout, where one of the two log-probabilities is not finite: a sampled token has none that is not,
        and a clamp would make a number of it.
    """
    difference = lax.stop_gradient(masked_difference(logp, sampled_logp, mask))
    difference = jnp.where(jnp.isfinite(difference), difference, jnp.nan)
    if level == "sequence":
        difference = segment_sum(difference, segments)
    return jnp.where(mask > 0, jnp.exp(clamp(difference)), 0.0)


def mismatch_metrics(
    logp: jax.Array,
    sampled_logp: jax.Array,
    mask: jax.Array,
    correction: Correction,
    segments: Segments | None = None,
) -> dict[str, jax.Array]:
    """How far sampler and trainer are apart. With d = log pi - log q of a token, clamped to [-20, 20] nats:

        mismatch/kl                mean over tokens of -d, of expectation KL(q || pi), nats
        mismatch/k3                mean over tokens of exp(d) - 1 - d, the same, never negative (Schulman's k3)
        mismatch/weight_mean       mean over tokens, or over rollouts, of w before its bounds: 1 but for chance, or else
                                   q has not been where pi goes
        mismatch/weight_max        the largest of these
        mismatch/clipped_fraction  share of tokens, or of rollouts, whose w the bounds change; only where there are any

    Arguments as those of `importance_weight`. float32 scalars; 0 for an empty mask, NaN where a weight is.
    """
    counts = mask > 0
    d = masked_difference(logp, sampled_logp, mask)
    d = clamp(jnp.where(jnp.isfinite(d), d, jnp.nan))
    weight = importance_weight(logp, sampled_logp, mask, correction.level, segments)
    length = segment_sum(counts.astype(d.dtype), segments)
    # Each rollout's tokens have its weight: together they count as one.
    share = jnp.where(counts, 1.0 / jnp.maximum(length, 1.0) if correction.level == "sequence" else 1.0, 0.0)

    def mean(x: jax.Array, share: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts, x, 0.0) * share) / jnp.maximum(jnp.sum(share), 1.0)

    metrics = {
        "mismatch/kl": mean(-d, counts),
        "mismatch/k3": mean(jnp.exp(d) - 1.0 - d, counts),
        "mismatch/weight_mean": mean(weight, share),
        "mismatch/weight_max": jnp.max(weight, initial=0.0),
    }
    if correction.kind != "none":
        metrics["mismatch/clipped_fraction"] = mean(correction.of(weight) != weight, share)
    return lax.stop_gradient(metrics)
