"""Per-prompt success history, discounted by age, and the posterior variance that it implies.

The released code reads successes through one order of the batch and rewards through another; here `prompt_of_B` is the
only map from a rollout to its prompt, and `index_P` the only one from a prompt of the batch to the data set.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PromptStats(NamedTuple):
    """Counts as of each prompt's own last step; `discounted` brings them to the present."""

    successes_N: jax.Array  # float32
    trials_N: jax.Array  # float32
    last_step_N: jax.Array  # int32, the step of the last `record` that touched the prompt


def init_stats(n: int) -> PromptStats:
    """No history for any of the `n` prompts of the data set.

    Raises ValueError if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"init_stats: n = {n} prompts; give the number of prompts in the data set, at least 1.")
    return PromptStats(jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.int32))


def discounted(
    stats: PromptStats, index_P: jax.Array, step: jax.Array | int, half_life: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Successes and trials of some prompts at `step`: counts * 0.5 ** ((step - last_step) / half_life).

    Args:
        stats: the history of all N prompts.
        index_P: int32 [P], rows of the data set; an index may appear more than once.
        step: int32 scalar, the present step.
        half_life: steps after which an old result counts half, > 0.

    Returns:
        (successes_P, trials_P), each float32 [P].
    """
    age_P = jnp.maximum(step - stats.last_step_N[index_P], 0).astype(jnp.float32)
    factor_P = jnp.exp2(-age_P / half_life).astype(jnp.float32)
    return stats.successes_N[index_P] * factor_P, stats.trials_N[index_P] * factor_P


def record(
    stats: PromptStats,
    index_P: jax.Array,
    prompt_of_B: jax.Array,
    reward_B: jax.Array,
    step: jax.Array | int,
    half_life: jax.Array | float,
) -> PromptStats:
    """Adds a step's results: old counts of the batch's prompts decay to `step` once, then each rollout adds a trial.

    A reward above 0.5 is a success. Prompts outside `index_P` keep their counts and their age.

    Args:
        stats: the history of all N prompts.
        index_P: int32 [P], rows of the data set. An index may appear twice (a batch that crosses an epoch boundary):
            its history decays once and the rollouts of both slots are added.
        prompt_of_B: int32 [B], the slot in `index_P` of each rollout, in any order.
        reward_B: float [B], in the order of `prompt_of_B`.
        step: int32 scalar, the present step.
        half_life: steps after which an old result counts half, > 0.

    Raises ValueError if `prompt_of_B` and `reward_B` differ in shape.
    """
    if prompt_of_B.shape != reward_B.shape:
        raise ValueError(
            f"record: prompt_of_B has shape {prompt_of_B.shape} and reward_B {reward_B.shape}; "
            "give one reward a rollout."
        )
    old_successes_P, old_trials_P = discounted(stats, index_P, step, half_life)
    index_B = index_P[prompt_of_B]
    success_B = (reward_B > 0.5).astype(jnp.float32)
    # New results are summed apart from the old, as whole numbers, so that the order in which a device adds them cannot
    # matter; then both slots of a doubled index write the same total.
    zeros_N = jnp.zeros_like(stats.trials_N)
    new_successes_N = zeros_N.at[index_B].add(success_B)
    new_trials_N = zeros_N.at[index_B].add(1.0)
    return PromptStats(
        stats.successes_N.at[index_P].set(old_successes_P + new_successes_N[index_P]),
        stats.trials_N.at[index_P].set(old_trials_P + new_trials_N[index_P]),
        stats.last_step_N.at[index_P].set(jnp.asarray(step, jnp.int32)),
    )


def posterior_variance(successes: jax.Array, trials: jax.Array, prior: tuple[float, float] = (1.0, 1.0)) -> jax.Array:
    """Expected Bernoulli variance of a prompt under a Beta(a, b) prior of its success rate p.

        E[p (1 - p) | data] = A B / ((A + B) (A + B + 1)),   A = successes + a,   B = trials - successes + b.

    Where the raw estimate k (G - k) / (G (G - 1)) is 0 after a few equal answers, this is positive, also for prompts
    never tried, and returns to the prior as `discounted` counts fade.

    Args:
        successes, trials: float, any one shape; counts may be fractions.
        prior: (a, b), both > 0.

    Returns:
        float32 of the same shape, in (0, 1/4).

    Raises ValueError if `a` or `b` is not positive.
    """
    a, b = prior
    if a <= 0 or b <= 0:
        raise ValueError(f"posterior_variance: prior = ({a}, {b}); both must be above 0, for instance (1.0, 1.0).")
    A = jnp.asarray(successes, jnp.float32) + a
    B = jnp.maximum(jnp.asarray(trials, jnp.float32) - successes, 0.0) + b
    return (A / (A + B) * (B / (A + B + 1.0))).astype(jnp.float32)
