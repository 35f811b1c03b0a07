"""Token statistics over chunks of tokens, in plain XLA: logits of one chunk at a time, recomputed in the backward pass.

With u = z - max z and A = sum e^u, B = sum u e^u, C = sum e^2u, E = sum u e^2u over the vocabulary:

    logp = u_target - log A,   H = log A - B/A,   lambda_mean = (E - (B/A) C) / A^2

    dz = g_logp onehot - p (g_logp + g_H (u - B/A)),   p = e^(u - log A)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.batch import TokenStats
from dynamo_jax.kernels.token_stats.reference import logits

_CHUNK_BYTES = 256 * 2**20  # float32 logits of one chunk; the peak holds two or three arrays of that size

# hidden, head, targets, and for each token max z, log A, B/A. Not their sums, the log-sum-exp and the mean logit: at
# logits of 50 those are rounded to 4e-6, an error that every p would carry.
Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def chunked_token_stats(
    hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array, temperature: float, chunk_tokens: int | None = None
) -> TokenStats:
    """See `api.token_stats`."""
    T, V = hidden_TD.shape[0], head_VD.shape[0]
    chunk_tokens = chunk_tokens or max(1, _CHUNK_BYTES // (4 * V))
    # A power of two divides the usual T, and leaves chunks that still divide over the devices.
    chunks = 1 << (max(-(-T // chunk_tokens), 1) - 1).bit_length()
    return _token_stats(hidden_TD, head_VD, targets_T, temperature, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_stats(
    hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array, temperature: float, chunks: int
) -> TokenStats:
    return _forward(hidden_TD, head_VD, targets_T, temperature, chunks)[0]


def _forward(
    hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array, temperature: float, chunks: int
) -> tuple[TokenStats, Residuals]:
    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden_tD, targets_t = chunk
        z_tV = logits(hidden_tD, head_VD, temperature)
        top_t1 = jnp.max(z_tV, axis=-1, keepdims=True)
        u_tV = z_tV - top_t1
        e_tV = jnp.exp(u_tV)
        A_t = jnp.sum(e_tV, axis=-1)
        mean_u_t = jnp.sum(u_tV * e_tV, axis=-1) / A_t
        C_t = jnp.sum(jnp.square(e_tV), axis=-1)
        E_t = jnp.sum(u_tV * jnp.square(e_tV), axis=-1)
        log_A_t = jnp.log(A_t)
        logp_t = jnp.sum(jnp.where(_is_target(targets_t, z_tV.shape), u_tV, 0.0), axis=-1) - log_A_t
        stats = (logp_t, log_A_t - mean_u_t, (E_t - mean_u_t * C_t) / jnp.square(A_t))
        return None, (*stats, top_t1[:, 0], log_A_t, mean_u_t)

    _, outputs = lax.scan(body, None, (_split(hidden_TD, chunks), _split(targets_T, chunks)))
    logp_T, entropy_T, lambda_mean_T, *per_token = (_join(x, hidden_TD.shape[0]) for x in outputs)
    top_T, log_A_T, mean_u_T = per_token
    return TokenStats(logp_T, entropy_T, lambda_mean_T), (hidden_TD, head_VD, targets_T, top_T, log_A_T, mean_u_T)


def _backward(
    temperature: float, chunks: int, residuals: Residuals, grads: TokenStats
) -> tuple[jax.Array, jax.Array, None]:
    hidden_TD, head_VD, targets_T, top_T, log_A_T, mean_u_T = residuals
    wide = top_T.dtype

    def body(d_head_VD: jax.Array, chunk: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_tD, targets_t, top_t, log_A_t, mean_u_t, g_logp_t, g_entropy_t = chunk
        u_tV = logits(hidden_tD, head_VD, temperature) - top_t[:, None]
        p_tV = jnp.exp(u_tV - log_A_t[:, None])
        g_tV = g_logp_t[:, None] + g_entropy_t[:, None] * (u_tV - mean_u_t[:, None])
        dz_tV = jnp.where(_is_target(targets_t, u_tV.shape), g_logp_t[:, None], 0.0) - p_tV * g_tV
        # In the inputs' dtype, so that bfloat16 stays on the fast path of the matrix unit; sums are float32.
        dz_tV = (dz_tV / temperature).astype(hidden_tD.dtype)
        dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=wide)
        return d_head_VD + dot("tv,td->vd", dz_tV, hidden_tD), dot("tv,vd->td", dz_tV, head_VD).astype(hidden_tD.dtype)

    per_token = (hidden_TD, targets_T, top_T, log_A_T, mean_u_T, grads.logp, grads.entropy)
    d_head_VD, d_hidden = lax.scan(body, jnp.zeros(head_VD.shape, wide), tuple(_split(x, chunks) for x in per_token))
    return _join(d_hidden, hidden_TD.shape[0]), d_head_VD.astype(head_VD.dtype), None


_token_stats.defvjp(_forward, _backward)


def _split(x_T: jax.Array, chunks: int) -> jax.Array:
    """[T, ...] -> [chunks, T / chunks, ...], padded with zeros.

    Token t goes to chunk t % chunks: every chunk lies spread over the devices as T does, and none has to move.
    """
    tail = -x_T.shape[0] % chunks
    padded = jnp.pad(x_T, [(0, tail)] + [(0, 0)] * (x_T.ndim - 1)) if tail else x_T
    return padded.reshape(-1, chunks, *x_T.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _is_target(targets_t: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A comparison where a gather would do: it fuses, and a sharded vocabulary needs no exchange."""
    return lax.broadcasted_iota(targets_t.dtype, shape, 1) == targets_t[:, None]
