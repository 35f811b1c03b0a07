"""bfloat16 parameters that are rounded stochastically, without masters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.update import TrainState, apply_gradients, init_state, make_optimizer, with_masters


def test_small_steps_of_a_bfloat16_policy_add_up() -> None:
    """A hundred steps of 1e-6, each less than half the last digit of most parameters, move it as they do in float32."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6))
    rng = np.random.default_rng(0)
    start = {"q": jnp.asarray(rng.normal(0, 0.025, 10_000), jnp.bfloat16)}
    grads = {"q": jnp.asarray(rng.choice([-0.01, 0.01], 10_000), jnp.float32)}

    @jax.jit
    def after_100(state: Any) -> Any:
        return jax.lax.fori_loop(0, 100, lambda _, s: apply_gradients(s, grads, optimizer), state)

    exact = after_100(init_state(jax.tree.map(lambda x: x.astype(jnp.float32), start), optimizer))
    assert type(exact) is TrainState
    half = after_100(init_state(start, optimizer))
    np.testing.assert_array_equal(half.masters["q"], exact.params["q"])
    np.testing.assert_array_equal(half.params["q"], exact.params["q"].astype(jnp.bfloat16))
    moved = (np.asarray(half.params["q"], np.float32) - np.asarray(start["q"], np.float32)) * -np.sign(grads["q"])
    assert np.mean(moved > 0) > 0.7
    assert moved.mean() == pytest.approx(1e-4, rel=0.15)


def test_bfloat16_parameters_without_masters_are_refused_or_given_some() -> None:
    """A run that was saved without goes on from its rounded parameters."""
    optimizer = optax.sgd(1.0)
    start = {"q": jnp.ones(3, jnp.bfloat16)}
    state = init_state(start, optimizer)
    bare = TrainState(*state[:4])
    with pytest.raises(ValueError, match=r"bfloat16 and the state has no float32 masters.*with_masters\(state\)"):
        apply_gradients(bare, start, optimizer)
    jax.tree.map(np.testing.assert_array_equal, with_masters(bare), state)


def test_small_steps_add_up_on_average_without_masters(tmp_path: Path) -> None:
    """A hundred steps of 1e-6: the mean over 10,000 parameters moves as in float32, with nothing kept beside them."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6, moments="bfloat16"))
    rng = np.random.default_rng(0)
    start = {"q": jnp.asarray(rng.normal(0, 0.025, 10_000), jnp.bfloat16)}
    grads = {"q": jnp.full(10_000, 0.01, jnp.float32)}

    @jax.jit
    def after_100(state: TrainState) -> TrainState:
        def step(_: int, s: TrainState) -> TrainState:
            return apply_gradients(s, grads, optimizer, "stochastic")._replace(updates=s.updates + 1)

        return jax.lax.fori_loop(0, 100, step, state)

    state = init_state(start, optimizer, "stochastic")
    assert type(state) is TrainState
    state = after_100(state)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("bfloat16")}
    moved = np.asarray(state.params["q"], np.float64) - np.asarray(start["q"], np.float64)
    assert moved.mean() == pytest.approx(-1e-4, rel=0.05)  # rounded to nearest, most would not have moved at all
    assert moved.std() > 1e-5

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_float32_parameters_have_nothing_to_round() -> None:
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1))
    start = {"q": jnp.ones(3)}
    for rounding in ("masters", "stochastic"):
        state = apply_gradients(init_state(start, optimizer, rounding), start, optimizer, rounding)
        assert type(state) is TrainState
        np.testing.assert_allclose(state.params["q"], 0.9, rtol=1e-6)
