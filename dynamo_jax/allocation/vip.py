"""VIP (arXiv 2602.01601): a Gaussian process over prompt features predicts success rates, also of prompts never tried.

The latent value g(x) of a prompt with features x is a Gaussian process, and p = sigmoid(g). In weight space, with
random Fourier features phi of an RBF kernel:

    g(x) = prior logit + phi(x) . w,   w ~ N(0, amplitude^2 I),   E[phi(x) . phi(y)] = exp(-|x - y|^2 / (2 length^2)).

Deviations: the paper embeds prompts with a sentence encoder, which would have to be downloaded; `prompt_features`
hashes tokens. The kernel is approximated, so that W x W numbers do, however many prompts there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynamo_jax.allocation.allocate import check_budget, largest_steps, scaled
from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.config import AllocationConfig

_SEED = 2602  # of the Fourier features: part of the model, not of a run


class GaussianProcess(NamedTuple):
    """What observations say about w, as of the last update: their precision and information, without the prior's."""

    precision_WW: jax.Array  # float32, sum of phi phi^T / noise variance
    information_W: jax.Array  # float32, sum of phi (observation - prior logit) / noise variance
    last_step: jax.Array  # int32 scalar


def prompt_features(token_lists: Sequence[Sequence[int]], dim: int) -> np.ndarray:
    """What prompts look like, from their tokens alone: the same on every machine, without any model.

    dim - 1 features are signed hashed counts of token unigrams and bigrams, log(1 + count) each, scaled to norm 1. The
    last is the logarithm of 1 + the number of tokens, with mean 0 and variance 1 over the prompts given.

    Args:
        token_lists: token ids of each of N prompts.
        dim: E, at least 2.

    Returns:
        float32 [N, E].

    Raises ValueError if dim < 2 or there is no prompt.
    """
    if dim < 2 or not len(token_lists):
        raise ValueError(
            f"prompt_features: dim = {dim}, {len(token_lists)} prompts; give dim >= 2 and at least one prompt."
        )
    features_NE = np.zeros((len(token_lists), dim))
    for row_E, tokens in zip(features_NE, token_lists, strict=True):
        one = np.asarray(tokens, np.uint64) + np.uint64(1)
        pairs = (one[:-1] << np.uint64(32)) | one[1:]
        grams, counts = np.unique(np.concatenate([one, pairs]), return_counts=True)
        hashed = _mixed(grams)
        sign = np.where(hashed >> np.uint64(63), 1.0, -1.0)
        np.add.at(row_E, (hashed % np.uint64(dim - 1)).astype(np.int64), sign * np.log1p(counts))
    features_NE /= np.maximum(np.linalg.norm(features_NE, axis=1, keepdims=True), 1e-12)
    length_N = np.log1p([len(tokens) for tokens in token_lists])
    features_NE[:, -1] = (length_N - length_N.mean()) / max(length_N.std(), 1e-12)
    return features_NE.astype(np.float32)


def fourier_features(features_PE: jax.Array, fourier: int, length_scale: float) -> jax.Array:
    """phi(x) = sqrt(2 / W) cos(x omega + b), omega normal with deviation 1 / length_scale, b uniform on a circle.

    Returns:
        float32 [P, W], W = fourier.
    """
    rng = np.random.default_rng(_SEED)
    frequency_EW = np.float32(rng.normal(size=(features_PE.shape[1], fourier)) / length_scale)
    phase_W = np.float32(rng.uniform(0.0, 2.0 * np.pi, fourier))
    angle_PW = jnp.matmul(features_PE, frequency_EW, precision=lax.Precision.HIGHEST) + phase_W
    return np.sqrt(2.0 / fourier).astype(np.float32) * jnp.cos(angle_PW)


def init_gp(fourier: int) -> GaussianProcess:
    """No observations."""
    zeros = jnp.zeros((fourier, fourier), jnp.float32)
    return GaussianProcess(zeros, jnp.zeros(fourier, jnp.float32), jnp.int32(0))


def predict(gp: GaussianProcess, phi_PW: jax.Array, step: jax.Array | int, config: AllocationConfig) -> jax.Array:
    """float32 [P]: sigmoid of the posterior mean of g. Without observations, or long after, the prior's mean rate."""
    precision_WW, information_W = _faded(gp, step, config.half_life)
    posterior_WW = precision_WW + jnp.eye(phi_PW.shape[1], dtype=jnp.float32) / config.vip.amplitude**2
    weight_W = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(posterior_WW), information_W)
    return jax.nn.sigmoid(_prior_logit(config) + jnp.matmul(phi_PW, weight_W, precision=lax.Precision.HIGHEST))


def observe(
    gp: GaussianProcess,
    phi_PW: jax.Array,
    right_P: jax.Array,
    trials_P: jax.Array,
    step: jax.Array | int,
    config: AllocationConfig,
) -> GaussianProcess:
    """Adds a step's results; what was known before fades with `config.half_life`.

    k right of n are an observation logit(r) of g with r = (k + a) / (n + a + b), a and b of `config.prior`, and noise
    variance 1 / (n r (1 - r)) (delta method). Prompts with n = 0 add nothing.

    Args:
        phi_PW: Fourier features of the step's prompts.
        right_P, trials_P: float [P], k and n.
        step: the present one, int32 scalar.
    """
    a, b = config.prior
    rate_P = (right_P + a) / (trials_P + a + b)
    certainty_P = trials_P * rate_P * (1.0 - rate_P)
    weighted_PW = phi_PW * certainty_P[:, None]
    above_P = jnp.log(rate_P) - jnp.log1p(-rate_P) - _prior_logit(config)
    precision_WW, information_W = _faded(gp, step, config.half_life)
    high = lax.Precision.HIGHEST
    return GaussianProcess(
        precision_WW + jnp.matmul(weighted_PW.T, phi_PW, precision=high),
        information_W + jnp.matmul(above_P, weighted_PW, precision=high),
        jnp.asarray(step, jnp.int32),
    )


def vip_rule(known: Known, terms: Terms, config: AllocationConfig) -> jax.Array:
    """`vip` by the success rates that the Gaussian process predicts."""
    return vip(known.success_P, *terms)


def vip(success: jax.Array, budget: int, low: int, high: int, advantage: str) -> jax.Array:
    """The integer n that minimises the gradient's variance sum_i p_i (1 - p_i) f(n_i), low <= n_i <= high, sum budget.

        rloo       f(n) = 1 / (n - 1)
        dr_grpo    f(n) = (n - 1) / n^2     (both: arXiv 2602.01601)
        others     f(n) = 1 / n             (the paper has none; the variance of a mean)

    Args:
        success: float [P], p; may be traced.
        budget, low, high: Python ints. low is at least 2 for rloo and 3 for dr_grpo: from there on, gains fall with n.
        advantage: which f.

    Returns:
        int32 [P]; equal gains go to the lowest index.

    Raises ValueError if low is too small, or the budget does not fit between P * low and P * high.
    """
    least = {"rloo": 2, "dr_grpo": 3}.get(advantage, 1)
    if low < least:
        raise ValueError(f"vip: low = {low}; gains of {advantage} fall only from n = {least} on. Set low >= {least}.")
    p_P = jnp.asarray(success, jnp.float32)
    width = check_budget(p_P.shape, budget, low, high)
    if width == 0:
        return jnp.full_like(p_P, low, jnp.int32)
    n = np.arange(low, low + width, dtype=np.float64)
    gain_U = 1.0 / (n * (n + 1.0))
    if advantage == "rloo":
        gain_U = 1.0 / (n * (n - 1.0))
    elif advantage == "dr_grpo":
        gain_U = (n * n - n - 1.0) / np.square(n * (n + 1.0))
    sigma_P = scaled(jnp.sqrt(p_P * (1.0 - p_P)))
    return low + largest_steps(sigma_P * np.sqrt(gain_U).astype(np.float32)[:, None], budget - p_P.shape[0] * low)


def _prior_logit(config: AllocationConfig) -> float:
    a, b = config.prior
    return float(np.log(a / b))


def _faded(gp: GaussianProcess, step: jax.Array | int, half_life: float) -> tuple[jax.Array, jax.Array]:
    factor = jnp.exp2(-jnp.maximum(step - gp.last_step, 0).astype(jnp.float32) / half_life)
    return gp.precision_WW * factor, gp.information_W * factor


def _mixed(keys: np.ndarray) -> np.ndarray:
    """uint64 -> uint64: every bit of the key moves every bit of the result (the finaliser of SplitMix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
