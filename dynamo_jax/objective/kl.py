"""What the policy pays for leaving the one before training: estimates of their KL divergence from sampled tokens.

With d = log pi_ref - log pi of a token drawn from pi (http://joschu.net/blog/kl-approx.html):

    k1 = -d                 unbiased, of either sign
    k2 = d^2 / 2            biased, small where d is
    k3 = exp(d) - 1 - d     unbiased, never negative

**In the loss** (`objective.kl.in: loss`) only the gradient counts, and it is another matter. Over tokens drawn from pi:

    k1    grad log pi                      of expectation 0: noise that does not even read pi_ref
    k2    -d grad log pi                   of expectation grad KL(pi || pi_ref), the one that is wanted
    k3    (1 - exp(d)) grad log pi         of expectation grad KL(pi_ref || pi), the other direction; GRPO's choice

(GRPO: arXiv 2402.03300. The gradients: arXiv 2506.09477, 2512.21852.) After a step's first update the tokens are those
of an earlier policy; as everywhere else, nothing is done about that here.

**In the reward** (`reward`) a rollout's reward falls by the coefficient times the sum over its tokens, before group
advantages are made of it. This is what verl's `use_kl_in_reward` comes to: it spreads the penalty over the tokens, and
the group-relative advantages add them up. The policy gradient of the sum of k1 is that of the KL of whole rollouts. pi
is the sampler here, which the rollouts are drawn from. Mind that `objective.advantage: grpo` divides by the group's
standard deviation: in a group of equal verdicts the penalty alone decides, at full size, whatever the coefficient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.config.choices import KLEstimator, check_choice
from dynamo_jax.objective.ratio import clamp


def kl_estimate(logp: jax.Array, reference_logp: jax.Array, estimator: KLEstimator) -> jax.Array:
    """k1, k2 or k3 of each token, nats, float32 (float64 for float64 inputs). The gradient flows through logp.

    The exponent of k3 is clamped to [-20, 20] nats: beyond, its gradient is that of -d.

    Args:
        logp: float, log-probabilities of the taken tokens, nats.
        reference_logp: the same under the reference; carries no gradient.
        estimator: a word of `KLEstimator`.

    Raises ValueError for another estimator.
    """
    check_choice("kl_estimate: estimator", estimator, KLEstimator)
    d = lax.stop_gradient(reference_logp) - jnp.asarray(logp, jnp.result_type(logp, jnp.float32))
    if estimator == "k1":
        return -d
    return jnp.square(d) / 2 if estimator == "k2" else jnp.exp(clamp(d)) - 1.0 - d


def kl_metrics(
    logp: jax.Array, reference_logp: jax.Array, mask: jax.Array, tokens: jax.Array | float
) -> dict[str, jax.Array]:
    """`objective/kl_reference`, nats: the sum of k3 over the mask / `tokens`, so that those of micro-batches add up."""
    k3 = kl_estimate(lax.stop_gradient(logp), reference_logp, "k3")
    return {"objective/kl_reference": jnp.sum(jnp.where(mask > 0, k3, 0.0)) / tokens}
