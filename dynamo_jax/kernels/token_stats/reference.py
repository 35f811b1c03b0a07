"""Token statistics written as their definitions: the oracle of the other forms. Holds [T, V] several times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.batch import TokenStats


def reference_token_stats(
    hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array, temperature: float
) -> TokenStats:
    """See `api.token_stats`. Gradients are jax's own."""
    logp_TV = jax.nn.log_softmax(logits(hidden_TD, head_VD, temperature), axis=-1)
    p_TV = jnp.exp(logp_TV)
    entropy_T = -jnp.sum(p_TV * logp_TV, axis=-1)
    lambda_mean_T = jnp.sum(jnp.square(p_TV) * (logp_TV + entropy_T[:, None]), axis=-1)
    logp_T = jnp.take_along_axis(logp_TV, targets_T[:, None], axis=-1)[:, 0]
    return TokenStats(logp_T, entropy_T, lax.stop_gradient(lambda_mean_T))


def logits(hidden_TD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
    """[T, V] logits over temperature, float32 or wider. Full precision: a TPU would multiply float32 as bfloat16.

    A product, as in the kernels: what a backward pass makes again has to be what its forward pass made.
    """
    dtype = jnp.result_type(hidden_TD, head_VD, jnp.float32)
    precision = lax.Precision.HIGHEST
    z_TV = jnp.einsum("td,vd->tv", hidden_TD, head_VD, precision=precision, preferred_element_type=dtype)
    return z_TV if temperature == 1.0 else z_TV * (1.0 / temperature)
