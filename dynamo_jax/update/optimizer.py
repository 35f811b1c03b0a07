"""The optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.policy.params import PARAMS, param_name
from dynamo_jax.update.rounding import round_tree


def make_optimizer(config: OptimizerConfig, updates: int | None = None) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW, at the rate of `learning_rate_schedule`.

    Matrices and embeddings decay. Norms and biases do not: a norm is at home at 1, not at 0.

    Args:
        updates: of the whole run, as `learning_rate_schedule`.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    adamw = optax.chain(
        _in_bfloat16(adam) if config.moments == "bfloat16" else adam,
        _decay_matrices(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, updates)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Adds rate * p to the change of each parameter p that decays. (`optax.masked` would change the state's tree.)"""

    def add(path: tuple[Any, ...], change: jax.Array, param: jax.Array) -> jax.Array:
        return change + rate * param if PARAMS[param_name(path)].decays else change

    return optax.stateless(partial(jax.tree.map_with_path, add))


def _in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam that computes in float32 and keeps its two moments in bfloat16, rounded stochastically.

    A bfloat16 number has 8 bits. With beta2 = 0.999 the second moment of steady gradients changes by less than half of
    the last one an update: rounded to nearest, as with `mu_dtype` of optax, it would never move from where it is. The
    expectation of what is rounded stochastically is what it was: only noise of 0.2% an update is added.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return _with_moments(adam.init(params), lambda _, moment: optax.tree.cast(moment, jnp.bfloat16))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        precise = _with_moments(state, lambda _, moment: optax.tree.cast(moment, jnp.float32))
        changes, new = adam.update(grads, precise, params)
        return changes, _with_moments(new, lambda name, moment: round_tree(moment, name, new.count))

    return optax.GradientTransformation(init, update)


def _with_moments(state: optax.ScaleByAdamState, f: Callable[[str, Any], Any]) -> optax.ScaleByAdamState:
    return state._replace(mu=f("mu", state.mu), nu=f("nu", state.nu))


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
