"""Exact integer allocation of a budget under bounds.

For  min sum_i sigma_i^2 / n_i,  sum_i n_i = budget,  low <= n_i <= high,  the n-th step of prompt i (from n to n + 1
rollouts) gains sigma_i^2 / (n (n + 1)). Gains fall with n, so the optimum takes the budget - P * low largest of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.allocation.stats import posterior_variance
from dynamo_jax.config import AllocationConfig

SIGMAS = ("uniform", "bernoulli", "neyman")

_TOP_EXPONENT = 100  # sigma is scaled by a power of two to at most 2^100 ...
_FLOOR = 1e-30  # ... and kept above this, so that root gains are normal float32 numbers over 60 decades of sigma
_SLACK = 1e-6  # rounding errors of a closed-form count, relative to the threshold; six operations make at most 7e-7
_MOST = 100_000  # rollouts of a prompt, so that neighbouring gains differ by more than the slack


def sigma_for(rule: str, variance_P: jax.Array) -> jax.Array:
    """The sigma that makes `allocate` follow a rule, from each prompt's variance p (1 - p).

    `uniform`: ones. `bernoulli`: the variance itself, n proportional to p (1 - p) between the bounds (DynaMO, arXiv
    2602.19208). `neyman`: its root, n proportional to the standard deviation, which minimises the total variance.

    Args:
        rule: one of SIGMAS.
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
    raise ValueError(f"sigma_for: rule = {rule!r}; choose one of {', '.join(SIGMAS)}.")


def variance_rule(sigma: str, known: Known, terms: Terms, config: AllocationConfig) -> jax.Array:
    """The rules of `sigma_for`, by the posterior variance of each prompt's successes."""
    variance_P = posterior_variance(known.successes_P, known.trials_P, config.prior)
    return allocate(sigma_for(sigma, variance_P), *terms.bounds)


def allocate(sigma: jax.Array, budget: int, low: int, high: int) -> jax.Array:
    """The integer n that minimises sum sigma_i^2 / n_i with low <= n_i <= high and sum n == budget.

    Gains are compared by their roots, sigma_i / sqrt(n (n + 1)), rounded to float32. Gains that are equal there go to
    the lowest index. A sigma that is negative or not a number counts as 0; prompts whose sigma is 0, or less than 1e-60
    of the largest, share evenly what the others leave. Integer sums only, no sort, and the same answer on any number of
    devices.

    First a threshold on the gain is found roughly, where n(n + 1) <= (sigma / threshold)^2 gives the rollouts that
    reach it without a table. What is left to share out is then at most one rollout a prompt, and `largest_steps`
    chooses among those by their rounded gains.

    Args:
        sigma: float [P], may be traced.
        budget: rollouts to share out, a Python int.
        low, high: bounds of every n_i, Python ints.

    Returns:
        int32 [P]. Jit-able with static budget, low and high.

    Raises ValueError if low < 1, or the budget does not fit between P * low and P * high.
    """
    sigma_P = jnp.asarray(sigma, jnp.float32)
    width = check_budget(sigma_P.shape, budget, low, high)
    P, extra, top = sigma_P.shape[0], budget - sigma_P.shape[0] * low, low + width
    if width == 0:
        return jnp.full(P, low, jnp.int32)

    sigma_P = scaled(sigma_P)
    # Roots of the gains: squares of sigma would leave the range of float32. The table makes a gain one rounded product,
    # the same in every program and on every device.
    n = np.arange(low, top, dtype=np.float64)
    inverse_root = (1.0 / np.sqrt(n * (n + 1.0))).astype(np.float32)

    def steps_reaching(threshold: jax.Array) -> jax.Array:
        """How many steps of each prompt gain at least the threshold, up to _SLACK of the threshold."""
        ratio_P = sigma_P * (1.0 / threshold)
        # sqrt(ratio^2 + 1/4) + 1/2. XLA would take a plain square of a constant sigma apart, into inf * 0.
        n_P = jnp.sqrt((ratio_P - 0.5) * (ratio_P + 0.5) + 0.5) + 0.5
        return jnp.clip(n_P, low, top).astype(jnp.int32) - low  # rounds down; `floor` takes as long as all the rest

    def halve(interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reached, missed = interval
        middle = reached + (missed - reached) // 2
        enough = jnp.sum(steps_reaching(_value(middle)), dtype=jnp.int32) >= extra
        return jnp.where(enough, middle, reached), jnp.where(enough, missed, middle)

    # A prompt's next gain is less by a factor of sqrt(1 + 2 / n) > 1 + 1 / top. An interval of half that width, with
    # room for the slack at both ends, has at most one gain of each prompt; 2^23 patterns double a float.
    narrow = 2**22 // top
    start = _pattern(jnp.min(sigma_P) * inverse_root[-1]), _pattern(jnp.max(sigma_P) * inverse_root[0]) + 1
    reached, missed = lax.while_loop(lambda i: i[1] - i[0] > narrow, halve, start)
    certain_P = steps_reaching(_value(missed) * (1.0 + 2.0 * _SLACK))
    next_P = sigma_P * jnp.append(inverse_root, 0.0).astype(jnp.float32)[certain_P]
    last_P = largest_steps(next_P[None], extra - jnp.sum(certain_P), _value(reached) * (1.0 - _SLACK))
    return low + certain_P + last_P


def largest_steps(gain_UP: jax.Array, extra: jax.Array | int, least: jax.Array | None = None) -> jax.Array:
    """How many of each prompt's gains are among the `extra` largest of all; equal ones go to the lowest prompt.

    If gains fall along U, these are the steps that maximise the total gain (each is taken before those after it). The
    largest threshold that `extra` gains reach is found by bisection over float32 bit patterns.

    Args:
        gain_UP: float32 [U, P], not negative.
        extra: how many to take, at most U * P; may be traced.
        least: a value that at least `extra` gains reach, to start from; None: their minimum.

    Returns:
        int32 [P] with sum `extra`.
    """

    def steps_reaching(bits: jax.Array) -> jax.Array:
        return jnp.sum(gain_UP >= _value(bits), axis=0, dtype=jnp.int32)

    def halve(interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reached, missed = interval
        middle = reached + (missed - reached) // 2
        number = jnp.sum(gain_UP >= _value(middle), dtype=jnp.int32)
        found = jnp.where(number == extra, middle + 1, missed)  # nothing is left to bisect
        return jnp.where(number >= extra, middle, reached), jnp.where(number >= extra, found, middle)

    start = _pattern(jnp.min(gain_UP) if least is None else least), _pattern(jnp.max(gain_UP)) + 1
    bits, above = lax.while_loop(lambda i: i[1] - i[0] > 1, halve, start)
    certain_P = steps_reaching(above)
    tied_P, left = steps_reaching(bits) - certain_P, extra - jnp.sum(certain_P)
    # Mostly they are exactly what is left; to find the first of them takes a sixth of the time of all.
    return certain_P + lax.cond(jnp.sum(tied_P) == left, lambda: tied_P, lambda: _first(tied_P, left))


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


def scaled(sigma_P: jax.Array) -> jax.Array:
    """Scaled by a power of two, which loses nothing, and kept off zero, so that even the hopeless share evenly."""
    largest_float = float(np.finfo(np.float32).max)
    sigma_P = jnp.where(sigma_P > 0, jnp.minimum(sigma_P, largest_float), 0.0)
    _, exponent = jnp.frexp(jnp.max(sigma_P))
    power = _TOP_EXPONENT - exponent
    # In two halves, as the whole may exceed float32. A product is ten times as fast as ldexp of every element.
    half, one = power // 2, jnp.float32(1.0)
    return jnp.maximum(sigma_P * jnp.ldexp(one, half) * jnp.ldexp(one, power - half), _FLOOR)


def _first(tied_P: jax.Array, left: jax.Array) -> jax.Array:
    """The first `left` of `tied_P` things, lowest index first: whole up to a cut, part of it there, none after."""
    P = tied_P.shape[0]
    index_P = jnp.arange(P, dtype=jnp.int32)

    def before(cut: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(index_P < cut, tied_P, 0), dtype=jnp.int32)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        fits, exceeds = interval
        middle = (fits + exceeds) // 2
        fit = before(middle) <= left
        return jnp.where(fit, middle, fits), jnp.where(fit, exceeds, middle)

    # A cumulative sum would do the same; with 8192 prompts on CPU it takes longer.
    cut, _ = lax.fori_loop(0, P.bit_length(), halve, (jnp.int32(0), jnp.int32(P + 1)))
    return jnp.where(index_P < cut, tied_P, jnp.where(index_P == cut, left - before(cut), 0))


def _value(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _pattern(value: jax.Array) -> jax.Array:
    """Bit patterns of floats that are not negative are ordered as their values are."""
    return lax.bitcast_convert_type(value, jnp.int32)


def check_budget(shape: tuple[int, ...], budget: int, low: int, high: int) -> int:
    """The most that a prompt can get beyond `low`: up to `high`, or all that is left.

    Raises ValueError if P prompts cannot share `budget` within the bounds.
    """
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
    width = min(high - low, budget - P * low)
    if P * width >= 2**31:
        raise ValueError(
            f"allocate: {P} prompts x (high - low) = {high - low} exceeds what int32 sums hold. Lower high = {high}."
        )
    if low + width > _MOST:
        raise ValueError(
            f"allocate: high = {high} lets one prompt get {low + width} rollouts; gains are told apart up to {_MOST}. "
            f"Lower high to at most {_MOST}."
        )
    return width
