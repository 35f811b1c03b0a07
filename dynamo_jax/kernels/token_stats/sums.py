"""The five running sums that all token statistics are made of, and how they merge.

With u = z - top, where top = max z over the part of the vocabulary seen so far:

    A = sum e^u    B = sum u e^u    C = sum e^2u    E = sum u e^2u

When the maximum rises by d, with q = e^-d:  A <- q A,  B <- q (B - d A),  C <- q^2 C,  E <- q^2 (E - d C).
So parts of the vocabulary may be summed apart and merged in any order: blocks, lanes, devices.

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
    A: jax.Array
    B: jax.Array
    C: jax.Array
    E: jax.Array
    target: jax.Array


class Softmax(NamedTuple):
    """What the backward pass needs of each token, [T]: p = exp(z - top - log_A), H's gradient is -p (z - top - mean_u).

    Not their sums, the log-sum-exp and the mean logit: at logits of 50 those are rounded to 4e-6, an error that every
    p would carry.
    """

    top: jax.Array
    log_A: jax.Array
    mean_u: jax.Array  # B / A


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> Sums:
    """The sums over no columns."""
    zero = jnp.zeros(shape, dtype)
    return Sums(jnp.full(shape, ABSENT, dtype), zero, zero, zero, zero, zero)


def sums_of(z_tv: jax.Array, is_target_tv: jax.Array) -> Sums:
    """The sums over the columns of a block of logits, [t]."""
    top_t = jnp.max(z_tv, axis=-1)
    u_tv = z_tv - top_t[:, None]
    e_tv = jnp.exp(u_tv)
    ue_tv, ee_tv = u_tv * e_tv, e_tv * e_tv
    A_t, B_t, C_t, E_t, target_t = (
        jnp.sum(x, axis=-1) for x in (e_tv, ue_tv, ee_tv, ue_tv * e_tv, jnp.where(is_target_tv, z_tv, 0.0))
    )
    return Sums(top_t, A_t, B_t, C_t, E_t, target_t)


def rescaled(s: Sums, top: jax.Array) -> Sums:
    """The same sums relative to `top`, which is at least `s.top`."""
    d = top - s.top
    q = jnp.exp(-d)
    return Sums(top, q * s.A, q * (s.B - d * s.A), q * q * s.C, q * q * (s.E - d * s.C), s.target)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over the columns of both."""
    top = jnp.maximum(a.top, b.top)
    a, b = rescaled(a, top), rescaled(b, top)
    return Sums(top, *(x + y for x, y in zip(a[1:], b[1:], strict=True)))


def merge_axis(s: Sums, axis: int) -> Sums:
    """The sums over all parts that lie along an array axis."""
    s = rescaled(s, jnp.max(s.top, axis=axis, keepdims=True))
    return Sums(lax.squeeze(s.top, (axis % s.top.ndim,)), *(jnp.sum(x, axis=axis) for x in s[1:]))


def merge_devices(s: Sums, axis: str | tuple[str, ...]) -> Sums:
    """The sums over the vocabulary shards of all devices along a mesh axis: one pmax, one psum."""
    s = rescaled(s, lax.pmax(s.top, axis))
    return Sums(s.top, *lax.psum(jnp.stack(s[1:]), axis))


def finish(s: Sums) -> tuple[TokenStats, Softmax]:
    """The statistics, from the sums over the whole vocabulary."""
    log_A, mean_u = jnp.log(s.A), s.B / s.A
    stats = TokenStats(s.target - s.top - log_A, log_A - mean_u, (s.E - mean_u * s.C) / jnp.square(s.A))
    return stats, Softmax(s.top, log_A, mean_u)
