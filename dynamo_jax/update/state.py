"""What an update changes: parameters, the optimizer's moments, and float32 masters of bfloat16 parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dynamo_jax.config.choices import Rounding
from dynamo_jax.policy.model import param_shardings
from dynamo_jax.update.rounding import round_tree


class TrainState(NamedTuple):
    """What an update changes. Donated to it, and checkpointed.

    Its parameters are float32, or bfloat16 and rounded stochastically (`optimizer.rounding`).
    """

    params: Any
    opt_state: Any
    updates: jax.Array  # int32, applied
    skipped: jax.Array  # int32, not applied because the loss or the gradient was not finite


class MasterState(NamedTuple):
    """The state of a policy in bfloat16 with masters: the optimizer moves these, the parameters are their rounding.

    A step of 1e-6 is a fraction of a bfloat16 number's last digit: added to it, nearly every one would be lost.
    """

    params: Any
    opt_state: Any
    updates: jax.Array
    skipped: jax.Array
    masters: Any  # float32, else like the parameters


State = TrainState | MasterState


def init_state(params: Any, optimizer: optax.GradientTransformation, rounding: Rounding = "masters") -> State:
    """Zero counts and moments, and by `rounding` float32 masters of bfloat16 parameters."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, optimizer.init(_float32(params)), zero, zero)
    return with_masters(state) if _is_rounded(params) and rounding == "masters" else state


def with_masters(state: TrainState) -> MasterState:
    """The state of bfloat16 parameters that were saved without masters: these start from what was rounded."""
    return MasterState(*state, masters=_float32(state.params))


def apply_gradients(
    state: State, grads: Any, optimizer: optax.GradientTransformation, rounding: Rounding = "masters"
) -> State:
    """The state with its parameters and the optimizer one step on, in float32. The counts stay.

    Args:
        rounding: how bfloat16 parameters come from the float32 ones of the step. masters: these are kept, and the
            parameters are their nearest bfloat16 numbers; stochastic: they are not kept, and the parameters are their
            expectation only (`stochastic_round`), so that small steps still add up.

    Raises ValueError for bfloat16 parameters without the masters that `rounding` wants.
    """
    bare = isinstance(state, TrainState) and _is_rounded(state.params)
    if bare and rounding == "masters":
        raise ValueError(
            "update: the parameters are bfloat16 and the state has no float32 masters, without which small steps are "
            "lost. Make the state with init_state, or add them to one that was saved without: with_masters(state); or "
            "set optimizer.rounding=stochastic."
        )
    weights = state.masters if isinstance(state, MasterState) else _float32(state.params)
    changes, opt_state = optimizer.update(_float32(grads), state.opt_state, weights)
    weights = optax.apply_updates(weights, changes)
    if isinstance(state, MasterState):
        params = jax.tree.map(lambda x, old: x.astype(old.dtype), weights, state.params)
        return state._replace(params=params, opt_state=opt_state, masters=weights)
    params = round_tree(weights, "params", state.updates) if bare else weights
    return state._replace(params=params, opt_state=opt_state)


def _is_rounded(params: Any) -> bool:
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params))


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def abstract_state(
    abstract_params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, rounding: Rounding = "masters"
) -> State:
    """The state as `ShapeDtypeStruct`s, each moment and master sharded as its parameter is. Allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, rounding), abstract_params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
    )
