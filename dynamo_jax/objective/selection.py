"""Which tokens of a mini-batch a method singles out, over all of its rows.

Tokens are compared as integers and counted, never sorted or gathered: a threshold is found one bit at a time, from sums
of integers. So the same tokens are chosen on any mesh and in any order of the rows. Nothing here carries a gradient.
"""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynamo_jax.objective.ratio import Clip, probability_ratio

# Rollouts of one prompt share exact contexts, so entropies and covariances that are equal in exact arithmetic are
# common; another mesh or micro-batch rounds them differently, by a few units in the last place. Without their lowest
# bits (2^-13 of a value is left) they are ties, and ties are broken by something that is not rounded.
_DROPPED_BITS = 10
_SIGN = np.uint32(0x80000000)


def token_priority(key: jax.Array, rollout_M: jax.Array, num_tokens: int) -> jax.Array:
    """Random numbers that depend on the key, the rollout and the position only: not on the row, the mesh or C.

    Args:
        key: typed random key.
        rollout_M: integer [M], what tells rollouts apart.
        num_tokens: C, a Python int.

    Returns:
        uint32 [M, C].
    """

    rollout_M = jnp.asarray(rollout_M)
    index_MC = jnp.broadcast_to(jnp.arange(num_tokens), (*rollout_M.shape, num_tokens))
    return priority_of(key, jnp.broadcast_to(rollout_M[:, None], index_MC.shape), index_MC)


def priority_of(key: jax.Array, rollout: jax.Array, index: jax.Array) -> jax.Array:
    """`token_priority` of tokens in any order: their rollouts and places in them, integer arrays of one shape."""

    def bits(rollout: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, rollout), index), dtype=jnp.uint32)

    for _ in range(rollout.ndim):
        bits = jax.vmap(bits)
    return bits(rollout, index)


def largest(values_MC: jax.Array, mask_MC: jax.Array, count: jax.Array | int, priority_MC: jax.Array) -> jax.Array:
    """The `count` tokens of the mask with the largest values, or all if it has fewer.

    Values that agree in all but the lowest 10 bits of a float32, about 4 digits, are ties. Of these the smallest
    priorities come first; of equal priorities, the first in row-major order.

    Args:
        values_MC: float, of any sign; read as float32.
        mask_MC: 1 for tokens to choose from.
        count: int32 scalar, may be traced.
        priority_MC: uint32, for example `token_priority`.

    Returns:
        bool [M, C], True for exactly min(count, number in the mask) tokens.
    """
    tied_MC = jnp.asarray(mask_MC) > 0
    position_MC = jnp.arange(values_MC.size, dtype=jnp.uint32).reshape(values_MC.shape)
    chosen_MC, left = jnp.zeros_like(tied_MC), jnp.maximum(jnp.asarray(count, jnp.int32), 0)
    for rank_MC in (~_rank(values_MC), jnp.asarray(priority_MC, jnp.uint32), position_MC):
        threshold = _smallest(rank_MC, tied_MC, left)
        below_MC = tied_MC & (rank_MC < threshold)
        chosen_MC |= below_MC
        left -= jnp.sum(below_MC, dtype=jnp.int32)
        tied_MC &= rank_MC == threshold
    return chosen_MC | (tied_MC & (left > 0))  # positions are distinct: at most one token is still tied


def fork_tokens(entropy_MC: jax.Array, mask_MC: jax.Array, fraction: float) -> tuple[jax.Array, jax.Array]:
    """The forking tokens of "Beyond the 80/20 rule" (arXiv 2506.01939), whose policy gradient alone is kept:

        H_t >= tau,  tau the entropy of the ceil(fraction * tokens)-th token from the top

    Here tau is over the whole mini-batch, and rounded down as in `largest`: whatever ties with that token counts too.
    In the paper's loss the denominators stay those of all tokens: give the result to `policy_loss` as `keep`. (The
    authors' code divides by the number of forking tokens, and takes tau over each micro-batch.)

    Args:
        entropy_MC: float, H, nats.
        mask_MC: 1 for tokens that count.
        fraction: in (0, 1], a Python float.

    Returns:
        (bool [M, C], tau: float32 scalar, nats). For an empty mask, none and 0.

    Raises ValueError for a fraction outside (0, 1].
    """
    counts_MC = mask_MC > 0
    tokens = jnp.sum(counts_MC, dtype=jnp.int32)
    rank_MC = ~_rank(entropy_MC)
    threshold = _smallest(rank_MC, counts_MC, tokens - _part(1 - _fraction("fork_tokens", fraction), tokens))
    return counts_MC & (rank_MC <= threshold), jnp.where(tokens > 0, _value(~threshold), 0.0)


def covariance(logp_MC: jax.Array, advantages_MC: jax.Array, mask_MC: jax.Array) -> jax.Array:
    """What each token adds to the covariance of log-probability and advantage (arXiv 2505.22617), which drives entropy:

        (A_t - mean A) (logp_t - mean logp),  means over the tokens of the mask

    Args:
        logp_MC: float, nats.
        advantages_MC: float [M, 1] or [M, C].
        mask_MC: 1 for tokens that count.

    Returns:
        float32 [M, C] (float64 for float64 inputs), nats, without gradient, 0 where the mask is 0.
    """
    counts = mask_MC > 0
    tokens = jnp.maximum(jnp.sum(counts, dtype=jnp.int32), 1)

    def centred(x: jax.Array) -> jax.Array:
        x = jnp.where(counts, lax.stop_gradient(jnp.asarray(x, jnp.result_type(x, jnp.float32))), 0.0)
        return x - jnp.sum(jnp.sum(x, axis=-1)) / tokens  # by rows first: sums of millions of float32 drift

    return jnp.where(counts, centred(advantages_MC) * centred(logp_MC), 0.0)


def clip_cov_tokens(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    priority: jax.Array,
    clip: Clip,
    *,
    fraction: float,
    low: float,
    high: float,
) -> jax.Array:
    """The tokens that Clip-Cov (arXiv 2505.22617) leaves without gradient: random ones of high covariance.

    Of the tokens with low < `covariance` < high that PPO's clip does not already decide, the
    max(1, floor(fraction * tokens)) of smallest priority, or all if they are fewer; `tokens` counts the whole mask.

    Args:
        logp, old_logp: float [M, C], nats, as in `policy_loss`.
        advantages: float [M, 1] or [M, C].
        mask: [M, C], 1 for tokens that count.
        priority: uint32 [M, C], random: `token_priority`.
        clip: as in `policy_loss`; its dual is not read.
        fraction: in (0, 1], a Python float.
        low, high: bounds of the covariance, nats.

    Returns:
        bool [M, C]; its inverse is the `keep` of `policy_loss`.

    Raises ValueError for a fraction outside (0, 1].
    """
    cov_MC = covariance(logp, advantages, mask)
    stopped_MC = clip.stops(probability_ratio(logp, old_logp), advantages)
    candidates_MC = (mask > 0) & (cov_MC > low) & (cov_MC < high) & ~stopped_MC
    count = _count("clip_cov_tokens", fraction, mask)
    return largest(jnp.zeros_like(cov_MC), candidates_MC, count, priority)


def kl_cov_tokens(
    logp: jax.Array, advantages: jax.Array, mask: jax.Array, priority: jax.Array, *, fraction: float
) -> jax.Array:
    """The tokens that pay KL-Cov's penalty (arXiv 2505.22617): the max(1, floor(fraction * tokens)) of largest
    `covariance`, ties by smallest priority.

    Args:
        logp: float [M, C], nats.
        advantages: float [M, 1] or [M, C].
        mask: [M, C], 1 for tokens that count.
        priority: uint32 [M, C]: `token_priority`.
        fraction: in (0, 1], a Python float.

    Returns:
        bool [M, C]; times a coefficient, the `kl_coef` of `policy_loss`.

    Raises ValueError for a fraction outside (0, 1].
    """
    return largest(covariance(logp, advantages, mask), mask, _count("kl_cov_tokens", fraction, mask), priority)


def _rank(values_MC: jax.Array) -> jax.Array:
    """uint32, ordered as the values are, without the lowest bits."""
    values_MC = lax.stop_gradient(jnp.asarray(values_MC, jnp.float32))
    bits_MC = lax.bitcast_convert_type(jnp.where(values_MC == 0, 0.0, values_MC), jnp.uint32)  # -0.0 is 0.0
    # Patterns of positive floats rise with their values, those of negative ones fall.
    return jnp.where(bits_MC >= _SIGN, ~bits_MC, bits_MC | _SIGN) >> _DROPPED_BITS << _DROPPED_BITS


def _value(rank: jax.Array) -> jax.Array:
    """The smallest float32 of a rank."""
    return lax.bitcast_convert_type(jnp.where(rank >= _SIGN, rank ^ _SIGN, ~rank), jnp.float32)


def _smallest(rank_MC: jax.Array, among_MC: jax.Array, count: jax.Array) -> jax.Array:
    """The `count`-th smallest rank, uint32: the largest threshold with fewer than `count` ranks below it."""

    def next_bit(i: int, threshold: jax.Array) -> jax.Array:
        higher = threshold | (_SIGN >> jnp.uint32(i))
        below = jnp.sum(among_MC & (rank_MC < higher), dtype=jnp.int32)
        return jnp.where(below < count, higher, threshold)

    return lax.fori_loop(0, 32, next_bit, jnp.uint32(0))


def _count(caller: str, fraction: float, mask: jax.Array) -> jax.Array:
    return jnp.maximum(_part(_fraction(caller, fraction), jnp.sum(mask > 0, dtype=jnp.int32)), 1)


def _fraction(caller: str, fraction: float) -> Fraction:
    """The number that the fraction is written as, 0.29 and not 0.28999999999999998."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{caller}: fraction = {fraction}; it must be in (0, 1].")
    return Fraction(str(float(fraction)))


def _part(fraction: Fraction, tokens: jax.Array) -> jax.Array:
    """floor(fraction * tokens), in integers: a float32 product can fall short of a whole number by a rounding."""
    if fraction.numerator * fraction.denominator >= 2**31:  # more than four decimals
        fraction = fraction.limit_denominator(46340)
    p, q = fraction.numerator, fraction.denominator
    return tokens // q * p + tokens % q * p // q
