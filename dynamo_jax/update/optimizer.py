"""The optimizer and its learning rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.policy.params import PARAMS, param_name


def make_optimizer(config: OptimizerConfig, updates: int | None = None) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW, at the rate of `learning_rate_schedule`.

    Matrices and embeddings decay. Norms and biases do not: a norm is at home at 1, not at 0.

    Args:
        updates: of the whole run, as `learning_rate_schedule`.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        _decay_matrices(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, updates)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Adds rate * p to the change of each parameter p that decays. (`optax.masked` would change the state's tree.)"""

    def add(path: tuple[Any, ...], change: jax.Array, param: jax.Array) -> jax.Array:
        return change + rate * param if PARAMS[param_name(path)].decays else change

    return optax.stateless(partial(jax.tree.map_with_path, add))


def learning_rate_schedule(config: OptimizerConfig, updates: int | None = None) -> optax.Schedule:
    """The learning rate of update u (from 0). With w = warmup_steps and e = decay_steps, or else the run's updates:

        learning_rate * min(1, (u + 1) / w) * s(clip((u - w) / (e - w), 0, 1)),

        s(x) = 1                                          constant
               1 - (1 - floor) x                          linear
               floor + (1 - floor) (1 + cos(pi x)) / 2    cosine (arXiv 1608.03983)

    Args:
        updates: of the whole run; read where the rate falls and `decay_steps` is null.

    Raises ValueError if neither says when the rate stops falling.
    """
    peak, warm, end = config.learning_rate, config.warmup_steps, config.decay_steps or updates
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif end is None:
        raise ValueError(
            f"learning_rate_schedule: optimizer.schedule = {config.schedule} and optimizer.decay_steps = null; set "
            "decay_steps, or give the updates of the run."
        )
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.floor, end - warm)
    else:
        after = optax.cosine_decay_schedule(peak, end - warm, config.floor)
    return lambda count: after(jnp.maximum(count - warm, 0)) * jnp.minimum(1.0, (count + 1) / max(warm, 1))
