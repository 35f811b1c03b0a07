"""The five running sums that all token statistics are made of, and how they merge.

With u = z - top, where top = max z over the part of the vocabulary seen so far:

    A = sum e^u    B = sum u e^u    C = sum e^2u    E = sum u e^2u

When the maximum rises by d, with q = e^-d:  A <- q A,  B <- q (B - d A),  C <- q^2 C,  E <- q^2 (E - d C).
What is kept is a = A - 1, without the 1 of the largest term itself: next to it the terms of rare tokens, 1e-8 each,
would be rounded away, all 150,000 of them. So parts of the vocabulary may be summed apart and merged in any
order: blocks, lanes, devices.

    logp = u_target - log A,   H = log A - B / A,   lambda_mean = (E - (B / A) C) / A^2

H is a sum of two terms that are not negative: nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.batch import TokenStats

# The logit of a column that does not exist. Finite, so that differences and products with 0 are never NaN.
ABSENT = -1e30


class Sums(NamedTuple):
    """Arrays of one shape, float32 or wider. `target`: z of the target token, 0 if this part does not hold it."""

    top: jax.Array
    a: jax.Array  # A - 1
    B: jax.Array
    C: jax.Array
    E: jax.Array
    target: jax.Array


class Softmax(NamedTuple):
    """What the backward pass needs of each token, [T]: p = exp(z - top - log_sum), H's gradient is
    -p (z - top - mean_u).

    Not their sums, the log-sum-exp and the mean logit: at logits of 50 those are rounded to 4e-6, an error that every
    p would carry.
    """

    top: jax.Array
    log_sum: jax.Array  # log A
    mean_u: jax.Array  # B / A


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> Sums:
    """The sums over no columns."""
    zero = jnp.zeros(shape, dtype)
    return Sums(jnp.full(shape, ABSENT, dtype), zero - 1.0, zero, zero, zero, zero)


def sums_of(z_tv: jax.Array, is_target_tv: jax.Array) -> Sums:
    """The sums over the columns of a block of logits, [t]."""
    top_t = jnp.max(z_tv, axis=-1)
    u_tv = z_tv - top_t[:, None]
    e_tv = jnp.exp(u_tv)
    # Not u == 0: where z is a product, one compiled copy of u may be rounded (0) and another fused (not 0).
    is_top_tv = z_tv == top_t[:, None]
    ue_tv, ee_tv = u_tv * e_tv, e_tv * e_tv
    terms = (jnp.where(is_top_tv, 0.0, e_tv), ue_tv, ee_tv, ue_tv * e_tv, jnp.where(is_target_tv, z_tv, 0.0))
    others_t, B_t, C_t, E_t, target_t = (jnp.sum(x, axis=-1) for x in terms)
    return Sums(top_t, others_t + (jnp.sum(is_top_tv, axis=-1, dtype=z_tv.dtype) - 1.0), B_t, C_t, E_t, target_t)


def merge(x: Sums, y: Sums) -> Sums:
    """The sums over the columns of both."""
    top = jnp.maximum(x.top, y.top)
    (q, x), (r, y) = rescaled(x, top), rescaled(y, top)
    a = q * x.a + r * y.a + jnp.minimum(q, r)  # q + r - 1: one of them is 1
    return Sums(top, a, *(i + j for i, j in zip(x[2:], y[2:], strict=True)))


def merge_axis(s: Sums, axis: int) -> Sums:
    """The sums over all parts that lie along an array axis."""
    top = jnp.max(s.top, axis=axis, keepdims=True)
    return _total(lax.squeeze(top, (axis % top.ndim,)), [jnp.sum(x, axis=axis) for x in _terms(s, top)])


def merge_devices(s: Sums, axis: str) -> Sums:
    """The sums over the vocabulary shards of all devices along a mesh axis: one pmax, one psum."""
    top = lax.pmax(s.top, axis)
    return _total(top, list(lax.psum(jnp.stack(_terms(s, top)), axis)))


def finish(s: Sums) -> tuple[TokenStats, Softmax]:
    """The statistics, from the sums over the whole vocabulary."""
    A, log_sum = 1.0 + s.a, jnp.log1p(s.a)
    mean_u = s.B / A
    stats = TokenStats(s.target - s.top - log_sum, log_sum - mean_u, (s.E - mean_u * s.C) / jnp.square(A))
    return stats, Softmax(s.top, log_sum, mean_u)


def rescaled(s: Sums, top: jax.Array) -> tuple[jax.Array, Sums]:
    """q, and the sums relative to `top`, which is at least `s.top`; but `a` as it was."""
    d = top - s.top
    q = jnp.exp(-d)
    return q, Sums(top, s.a, q * (s.B - d * (1.0 + s.a)), q * q * s.C, q * q * (s.E - d * s.C), s.target)


def _terms(s: Sums, top: jax.Array) -> list[jax.Array]:
    """What remains to be summed over parts. The 1 of the parts that hold the maximum is counted apart from the rest."""
    q, s = rescaled(s, top)
    return [jnp.where(q == 1.0, 0.0, q) + q * s.a, *s[2:], jnp.where(q == 1.0, 1.0, 0.0)]


def _total(top: jax.Array, terms: list[jax.Array]) -> Sums:
    a, B, C, E, target, tops = terms
    return Sums(top, a + (tops - 1.0), B, C, E, target)
