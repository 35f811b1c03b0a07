"""GVM: rollouts by the size of each prompt's gradient and its success rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.allocation.allocate import allocate
from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.config import AllocationConfig


def gvm_rule(known: Known, terms: Terms, config: AllocationConfig) -> jax.Array:
    """`allocate` by `gvm_sigma`."""
    g = config.gvm
    return allocate(gvm_sigma(known.norm_P, known.successes_P, known.success_P, g.alpha, g.beta), *terms.bounds)


def gradient_size(logp_RC: np.ndarray) -> np.ndarray:
    """float [R]: sqrt(sum_t (1 - pi_t)^2) of each rollout, which `gvm_sigma` takes for the norm of its gradient.

    Args:
        logp_RC: log-probabilities of its tokens, nats; 0 on padding, which adds nothing.
    """
    return np.sqrt(np.sum(np.square(1.0 - np.exp(logp_RC)), axis=1))


def gvm_sigma(
    norm_P: jax.Array, successes_P: jax.Array, success_P: jax.Array, alpha: float = 1e-3, beta: float = 2.0
) -> jax.Array:
    """The sigma that makes `allocate` follow GVM (arXiv 2505.02391): n_i in proportion to

        G_i / sqrt(p_i + alpha / p_i^(beta - 1)),

    G the mean gradient norm of log pi(y|x) over right rollouts y, p the success rate. The second term keeps hopeless
    prompts from taking everything. alpha and beta default to those of the authors' code.

    Deviation: instead of a backward pass a rollout, G is the running mean of `gradient_size`, pi_t the probability of
    token t. A token's gradient with respect to its logits, e_t - pi, has norm between 1 - pi_t and
    sqrt(2) (1 - pi_t), so that this is within a factor of sqrt(2) below the norm of d log pi / d logits. What the
    logits' Jacobian adds is left out.

    Args:
        norm_P: float [P], sum of the gradient sizes of a prompt's right rollouts.
        successes_P: float [P], their number, discounted alike. Where it is 0, G is the mean over the prompts that have
            right rollouts, or 1 if none has.
        success_P: float [P], p, above 0.
        alpha, beta: not negative.

    Returns:
        float32 [P].
    """
    known_P = successes_P > 0
    mean_norm_P = jnp.where(known_P, norm_P / jnp.where(known_P, successes_P, 1.0), 0.0)
    known = jnp.sum(known_P)
    default = jnp.where(known > 0, jnp.sum(mean_norm_P) / jnp.maximum(known, 1), 1.0)
    p_P = jnp.asarray(success_P, jnp.float32)
    return jnp.where(known_P, mean_norm_P, default) / jnp.sqrt(p_P + alpha / p_P ** (beta - 1.0))
