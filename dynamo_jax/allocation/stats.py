"""Per-prompt success history, discounted by age, and the posterior variance that it implies.

The released code reads successes through one order of the batch and rewards through another; here `prompt_of_B` is the
only map from a rollout to its prompt, and `index_P` the only one from a prompt of the batch to the data set.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Gradient sizes are summed as whole multiples of this. They are below sqrt(tokens), so that int32 holds the sum of ten
# thousand rollouts of 32k tokens.
_NORM_UNIT = 2.0**-10


class PromptStats(NamedTuple):
    """Sums as of each prompt's own last step; `discounted` brings them to the present."""

    successes_N: jax.Array  # float32
    trials_N: jax.Array  # float32
    norm_N: jax.Array  # float32, gradient sizes of the right rollouts (`gvm`); 0 if never recorded
    last_step_N: jax.Array  # int32, the step of the last `record` that touched the prompt


def init_stats(n: int) -> PromptStats:
    """No history for any of the `n` prompts of the data set.

    Raises ValueError if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"init_stats: n = {n} prompts; give the number of prompts in the data set, at least 1.")
    zeros_N = jnp.zeros(n, jnp.float32)
    return PromptStats(zeros_N, zeros_N, zeros_N, jnp.zeros(n, jnp.int32))


def discounted(
    stats: PromptStats, index_P: jax.Array, step: jax.Array | int, half_life: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of some prompts at `step`: value * 0.5 ** ((step - last_step) / half_life).

    Args:
        stats: the history of all N prompts.
        index_P: int32 [P], rows of the data set; an index may appear more than once.
        step: int32 scalar, the present step.
        half_life: steps after which an old result counts half, > 0.

    Returns:
        (successes_P, trials_P, norm_P), each float32 [P].
    """
    age_P = jnp.maximum(step - stats.last_step_N[index_P], 0).astype(jnp.float32)
    factor_P = jnp.exp2(-age_P / half_life).astype(jnp.float32)
    successes_P, trials_P, norm_P = (x[index_P] * factor_P for x in stats[:3])
    return successes_P, trials_P, norm_P


def record(
    stats: PromptStats,
    index_P: jax.Array,
    prompt_of_B: jax.Array,
    reward_B: jax.Array,
    step: jax.Array | int,
    half_life: jax.Array | float,
    norm_B: jax.Array | None = None,
) -> PromptStats:
    """Adds a step's results: old sums of the batch's prompts decay to `step` once, then each rollout adds a trial.

    A reward above 0.5 is a success. Prompts outside `index_P` keep their sums and their age.

    Args:
        stats: the history of all N prompts.
        index_P: int32 [P], rows of the data set. An index may appear twice (a batch that crosses an epoch boundary):
            its history decays once and the rollouts of both slots are added.
        prompt_of_B: int32 [B], the slot in `index_P` of each rollout, in any order. A row of slot P is padding and is
            ignored.
        reward_B: float [B], in the order of `prompt_of_B`.
        step: int32 scalar, the present step.
        half_life: steps after which an old result counts half, > 0.
        norm_B: float [B], how large each rollout's gradient is (see `gvm_sigma`), added for the right ones, rounded to
            multiples of 2^-10; None: nothing is added.

    Raises ValueError if `prompt_of_B` and `reward_B` differ in shape.
    """
    if prompt_of_B.shape != reward_B.shape:
        raise ValueError(
            f"record: prompt_of_B has shape {prompt_of_B.shape} and reward_B {reward_B.shape}; "
            "give one reward a rollout."
        )
    N = stats.trials_N.shape[0]
    index_B = jnp.asarray(index_P).at[prompt_of_B].get(mode="fill", fill_value=N)
    right_B = reward_B > 0.5
    units_B = jnp.zeros_like(index_B) if norm_B is None else jnp.round(norm_B / _NORM_UNIT).astype(jnp.int32)

    # New results are summed apart from the old, as whole numbers, so that the order in which a device adds them cannot
    # matter; then both slots of a doubled index write the same total.
    def total(old_N: jax.Array, old_P: jax.Array, new_B: jax.Array, unit: float = 1.0) -> jax.Array:
        new_N = jnp.zeros(N, jnp.int32).at[index_B].add(new_B, mode="drop")
        return old_N.at[index_P].set(old_P + new_N[index_P].astype(jnp.float32) * unit)

    successes_P, trials_P, norm_P = discounted(stats, index_P, step, half_life)
    return PromptStats(
        total(stats.successes_N, successes_P, right_B.astype(jnp.int32)),
        total(stats.trials_N, trials_P, jnp.ones_like(index_B)),
        total(stats.norm_N, norm_P, jnp.where(right_B, units_B, 0), _NORM_UNIT),
        stats.last_step_N.at[index_P].set(jnp.asarray(step, jnp.int32)),
    )


def posterior_mean(successes: jax.Array, trials: jax.Array, prior: tuple[float, float] = (1.0, 1.0)) -> jax.Array:
    """Expected success rate (successes + a) / (trials + a + b) under a Beta(a, b) prior; float32, never 0 or 1."""
    a, b = prior
    return (jnp.asarray(successes, jnp.float32) + a) / (trials + a + b)


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
