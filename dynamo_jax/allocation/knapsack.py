"""Allocation that maximises the expected value of groups with both right and wrong answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.allocation.allocate import check_budget, largest_steps
from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.config import AllocationConfig
from dynamo_jax.config.choices import KnapsackValue, check_choice

_FLOOR = 1e-30


def knapsack_rule(known: Known, terms: Terms, config: AllocationConfig) -> jax.Array:
    """`knapsack` by expected success rates."""
    return knapsack(known.success_P, *terms.bounds, config.knapsack.value)


def knapsack(success: jax.Array, budget: int, low: int, high: int, value: KnapsackValue = "info_gain") -> jax.Array:
    """The integer n that maximises sum_i v_i (1 - p_i^n_i - q_i^n_i) with low <= n_i <= high and sum n == budget.

    1 - p^n - q^n, q = 1 - p, is the probability that a group of n has a gradient; v is p q^2 (`info_gain`, how much
    success rate an update may gain) or 1 (Knapsack RL, arXiv 2509.25849). The n-th step gains v (p^n q + q^n p), which
    falls with n, so the `budget - P * low` largest gains are the optimum.

    Gains are compared in float32; equal ones go to the lowest index. One below 1e-30 / n counts as that: prompts that
    cannot gain share evenly what the others leave.

    Args:
        success: float [P], p, in [0, 1]; may be traced. Not a number counts as 0.
        budget: rollouts to share out, a Python int.
        low, high: bounds of every n_i, Python ints.
        value: a word of `KnapsackValue`.

    Returns:
        int32 [P]. Jit-able with static budget, low, high and value. Memory: 4 bytes * P * (high - low).

    Raises ValueError for another value, if low < 1, or if the budget does not fit between P * low and P * high.
    """
    check_choice("knapsack: value", value, KnapsackValue)
    p_P = jnp.asarray(success, jnp.float32)
    width = check_budget(p_P.shape, budget, low, high)
    P, extra = p_P.shape[0], budget - p_P.shape[0] * low
    if width == 0:
        return jnp.full(P, low, jnp.int32)
    return low + largest_steps(_gains(p_P, low, width, value), extra)


def _gains(p_P: jax.Array, low: int, width: int, value: KnapsackValue) -> jax.Array:
    """float32 [U, P]: what the steps from low, low + 1, ... rollouts gain; falls along U."""
    p_P = jnp.where(p_P > 0, jnp.minimum(p_P, 1.0), 0.0)
    q_P = 1.0 - p_P
    value_P = p_P * q_P * q_P if value == "info_gain" else jnp.ones_like(p_P)

    def next_gain(powers: tuple[jax.Array, jax.Array], n: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        # One product after the other: a rounded product with a factor <= 1 never rises. pow and exp may, by an ulp, and
        # a gain that rises could be taken without the one before it.
        p_n, q_n = powers[0] * p_P, powers[1] * q_P
        return (p_n, q_n), jnp.maximum(value_P * (p_n * q_P + q_n * p_P), _FLOOR / n)

    n = jnp.arange(1, low + width, dtype=jnp.float32)
    _, gain_UP = lax.scan(next_gain, (jnp.ones_like(p_P), jnp.ones_like(p_P)), n)
    return gain_UP[low - 1 :]
