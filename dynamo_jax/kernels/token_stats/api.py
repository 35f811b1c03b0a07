"""The one public door to the token-statistics kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dynamo_jax.batch import TokenStats
from dynamo_jax.kernels.token_stats.chunked import chunked_token_stats
from dynamo_jax.kernels.token_stats.reference import reference_token_stats

IMPLEMENTATIONS = ("auto", "reference", "chunked")


def token_stats(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    impl: str = "auto",
    *,
    chunk_tokens: int | None = None,
) -> TokenStats:
    """What the objective needs of pi = softmax(hidden @ head.T / temperature), for each token:

        logp         log pi(target)
        entropy      H = -sum_a pi(a) log pi(a)
        lambda_mean  sum_a pi(a)^2 (log pi(a) + H), the expectation in Eq. 29 of arXiv 2602.19208

    Gradients flow through logp and entropy to hidden and head; lambda_mean carries none.

    Args:
        hidden: float [T, D], final hidden states.
        head: float [V, D], the output embedding.
        targets: int [T], each in [0, V); not checked, values may be traced.
        temperature: the policy's sampling temperature, a Python float > 0.
        impl: `reference` (plain, keeps [T, V]), `chunked` (never holds [T, V]) or `auto` (chunked).
        chunk_tokens: tokens whose logits `chunked` holds at once; None: as many as fit 256 MiB of float32 logits.

    Returns:
        TokenStats, each float32 [T], nats (float64 for float64 inputs). Gradients have the dtypes of the inputs.

    Raises ValueError for another impl, shapes that do not fit, targets that are not integers, temperature <= 0 or
    chunk_tokens < 1.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"token_stats: impl = {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}.")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"token_stats: hidden has shape {hidden.shape} and head {head.shape}; give [T, D] and [V, D] with one D "
            "(flatten batch axes first, and transpose a [D, V] head)."
        )
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"token_stats: targets are {targets.dtype}{targets.shape} for hidden {hidden.shape}; "
            f"give integers of shape ({hidden.shape[0]},)."
        )
    if temperature <= 0:
        raise ValueError(
            f"token_stats: temperature = {temperature}; it must be above 0 (1.0 leaves logits as they are)."
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"token_stats: chunk_tokens = {chunk_tokens}; give at least 1, or None to choose.")
    if impl == "reference":
        return reference_token_stats(hidden, head, targets, temperature)
    return chunked_token_stats(hidden, head, targets, temperature, chunk_tokens)
