"""The optimizer and its learning rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.policy.params import PARAMS, param_name


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW, the rate warmed up linearly over `warmup_steps` updates.

    Matrices and embeddings decay. Norms and biases do not: a norm is at home at 1, not at 0.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        _decay_matrices(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Adds rate * p to the change of each parameter p that decays. (`optax.masked` would change the state's tree.)"""

    def add(path: tuple[Any, ...], change: jax.Array, param: jax.Array) -> jax.Array:
        return change + rate * param if PARAMS[param_name(path)].decays else change

    return optax.stateless(partial(jax.tree.map_with_path, add))


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Update u (from 0) runs at learning_rate * min(1, (u + 1) / warmup_steps)."""
    peak, steps = config.learning_rate, config.warmup_steps
    return lambda count: peak * jnp.minimum(1.0, (count + 1) / max(steps, 1))
