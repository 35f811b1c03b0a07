"""Exact integer allocation of a budget under bounds.

For  min sum_i sigma_i^2 / n_i,  sum_i n_i = budget,  low <= n_i <= high,  the n-th step of prompt i (from n to n + 1
rollouts) gains sigma_i^2 / (n (n + 1)). Gains fall with n, so the optimum takes the budget - P * low largest of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RULES = ("uniform", "bernoulli", "neyman")

_INFINITY_BITS = 0x7F800000  # float32 +inf; patterns of non-negative floats are ordered as their values are
_TOP_EXPONENT = 100  # sigma is scaled by a power of two to at most 2^100 ...
_FLOOR = 1e-30  # ... and kept above this, so that root gains are normal float32 numbers over 60 decades of sigma


def sigma_for(rule: str, variance_P: jax.Array) -> jax.Array:
    """The sigma that makes `allocate` follow a rule, from each prompt's variance p (1 - p).

    `uniform`: ones. `bernoulli`: the variance itself, n proportional to p (1 - p) between the bounds (DynaMO, arXiv
    2602.19208). `neyman`: its root, n proportional to the standard deviation, which minimises the total variance.

    Args:
        rule: one of RULES.
        variance_P: float [P].

    Returns:
        float32 [P].

    Raises ValueError for another rule.
    """
    variance_P = jnp.asarray(variance_P, jnp.float32)
    if rule == "uniform":
        return jnp.ones_like(variance_P)
    if rule == "bernoulli":
        return variance_P
    if rule == "neyman":
        return jnp.sqrt(variance_P)
    raise ValueError(f"sigma_for: rule = {rule!r}; choose one of {', '.join(RULES)}.")


def allocate(sigma: jax.Array, budget: int, low: int, high: int) -> jax.Array:
    """The integer n that minimises sum sigma_i^2 / n_i with low <= n_i <= high and sum n == budget.

    Gains are compared by their roots, sigma_i / sqrt(n (n + 1)), rounded to float32. Gains that are equal there go to
    the lowest index. A sigma that is negative or not a number counts as 0; prompts whose sigma is 0, or less than 1e-60
    of the largest, share evenly what the others leave. The largest threshold that enough gains reach is found by
    bisection over float32 bit patterns: integer sums only, no sort, and the same answer on any number of devices.

    Args:
        sigma: float [P], may be traced.
        budget: rollouts to share out, a Python int.
        low, high: bounds of every n_i, Python ints.

    Returns:
        int32 [P]. Jit-able with static budget, low and high.

    Raises ValueError if low < 1, or the budget does not fit between P * low and P * high.
    """
    sigma_P = jnp.asarray(sigma, jnp.float32)
    _check(sigma_P.shape, budget, low, high)
    P, extra = sigma_P.shape[0], budget - sigma_P.shape[0] * low
    width = min(high - low, extra)  # no prompt can get more than `low` and everything that is left
    if width == 0:
        return jnp.full(P, low, jnp.int32)

    sigma_P = _scaled(sigma_P)
    # Roots of the gains: squares of sigma would leave the range of float32. The table makes a gain one rounded product,
    # the same in every program and on every device.
    n = np.arange(low, low + width, dtype=np.float64)
    inverse_root = jnp.asarray(1.0 / np.sqrt(n * (n + 1.0)), jnp.float32)

    def steps_reaching(bits: jax.Array) -> jax.Array:
        """How many steps of each prompt gain at least the threshold. Gains fall with n: a binary search."""
        threshold = lax.bitcast_convert_type(bits, jnp.float32)
        count_P = jnp.zeros(P, jnp.int32)
        for power in reversed(range(width.bit_length())):
            candidate_P = count_P + (1 << power)
            gain_P = sigma_P * inverse_root[jnp.minimum(candidate_P, width) - 1]
            count_P = jnp.where((candidate_P <= width) & (gain_P >= threshold), candidate_P, count_P)
        return count_P

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reached, missed = interval
        middle = reached + (missed - reached) // 2
        enough = jnp.sum(steps_reaching(middle), dtype=jnp.int32) >= extra
        return jnp.where(enough, middle, reached), jnp.where(enough, missed, middle)

    # Every step reaches 0 and none infinity; 31 halvings leave neighbouring patterns.
    bits, above = lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(_INFINITY_BITS)))
    certain_P = steps_reaching(above)
    tied_P = steps_reaching(bits) - certain_P
    left = extra - jnp.sum(certain_P, dtype=jnp.int32)
    before_P = jnp.cumsum(tied_P, dtype=jnp.int32) - tied_P
    return low + certain_P + jnp.clip(left - before_P, 0, tied_P)


def rows_from_counts(counts: jax.Array, budget: int) -> jax.Array:
    """The prompt slot of each rollout: slot p repeated counts[p] times, in order.

    Args:
        counts: int32 [P] with sum `budget`.
        budget: B, a Python int: the shape of the result is static whatever the counts.

    Returns:
        int32 [B], nondecreasing.
    """
    slots_P = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.repeat(slots_P, counts, total_repeat_length=budget)


def _scaled(sigma_P: jax.Array) -> jax.Array:
    """Scaled by a power of two, which loses nothing, and kept off zero, so that even the hopeless share evenly."""
    largest_float = float(np.finfo(np.float32).max)
    sigma_P = jnp.where(sigma_P > 0, jnp.minimum(sigma_P, largest_float), 0.0)
    _, exponent = jnp.frexp(jnp.max(sigma_P))
    return jnp.maximum(jnp.ldexp(sigma_P, _TOP_EXPONENT - exponent), _FLOOR)


def _check(shape: tuple[int, ...], budget: int, low: int, high: int) -> None:
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"allocate: sigma has shape {shape}; give one value for each of P >= 1 prompts.")
    P = shape[0]
    if low < 1:
        raise ValueError(f"allocate: low = {low}; every prompt needs at least 1 rollout. Set low >= 1.")
    if low * P > budget:
        raise ValueError(
            f"allocate: {P} prompts x low = {low} need {low * P} rollouts, but budget = {budget}. "
            f"Lower low to at most {budget // P} or raise the budget."
        )
    if high * P < budget:
        raise ValueError(
            f"allocate: {P} prompts x high = {high} hold only {high * P} of budget = {budget} rollouts. "
            f"Raise high to at least {-(-budget // P)} or lower the budget."
        )
    if P * min(high - low, budget - P * low) >= 2**31:
        raise ValueError(
            f"allocate: {P} prompts x (high - low) = {high - low} exceeds what int32 sums hold. Lower high = {high}."
        )
