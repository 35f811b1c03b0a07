"""Schedules of the rate, and moments in bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.update import learning_rate_schedule, make_optimizer


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [{"updates": 24}, {"updates": 99, "decay_steps": 24}])
def test_falling_rates_by_hand(schedule: str, steps: dict[str, int]) -> None:
    """Up over 4 updates to 0.4, down to a quarter of it at update 24, and no further."""
    updates, rest = steps["updates"], {k: v for k, v in steps.items() if k != "updates"}
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4, schedule=schedule, floor=0.25, **rest)
    rate = learning_rate_schedule(config, updates)
    x = np.clip((np.arange(30) - 4) / 20, 0, 1)
    share = 1 - 0.75 * x if schedule == "linear" else 0.25 + 0.75 * (1 + np.cos(math.pi * x)) / 2
    expected = 0.4 * share * np.minimum(1, (np.arange(30) + 1) / 4)
    np.testing.assert_allclose([rate(u) for u in range(30)], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(14)), expected[14], rtol=1e-6)
    assert float(rate(24)) == float(rate(1000)) == pytest.approx(0.1)


def test_a_rate_that_falls_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule = cosine and optimizer.decay_steps = null; set decay_steps, or"):
        make_optimizer(OptimizerConfig(schedule="cosine"))
    make_optimizer(OptimizerConfig(schedule="cosine", decay_steps=5))


def test_bfloat16_moments_follow_the_float32_ones() -> None:
    """Gradients whose size falls to a tenth half way: the second moment has to come down by steps of a thousandth.

    Rounded to nearest, a bfloat16 one stays where it is (which is shown here, too), and the updates are 10 times too
    small. Rounded stochastically it goes with the float32 one, within the noise of its last digit.
    """
    rng = np.random.default_rng(0)
    w = {"q": jnp.zeros(4096)}
    grads = rng.normal(0, 1, (3000, 1)) * np.where(np.arange(3000) < 500, 1.0, 0.1)[:, None]
    grads = jnp.asarray(np.sign(rng.normal(0, 1, (3000, 4096))) * np.abs(grads), jnp.float32)

    def after(optimizer: optax.GradientTransformation) -> tuple[optax.ScaleByAdamState, jax.Array]:
        def step(state: tuple[object, ...], g: jax.Array) -> tuple[tuple[object, ...], jax.Array]:
            changes, state = optimizer.update({"q": g}, state, w)
            return state, jnp.sqrt(jnp.mean(changes["q"] ** 2))

        state, sizes = jax.jit(lambda: jax.lax.scan(step, optimizer.init(w), grads))()
        (adam,) = (x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
        return adam, sizes[-1]

    exact, size = after(make_optimizer(OptimizerConfig(max_grad_norm=1e9)))
    half, size_half = after(make_optimizer(OptimizerConfig(max_grad_norm=1e9, moments="bfloat16")))
    assert {x.dtype for x in jax.tree.leaves((half.mu, half.nu))} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(half) == jax.tree.structure(exact)
    error = np.asarray(half.nu["q"], np.float64) / np.asarray(exact.nu["q"], np.float64) - 1
    assert abs(error.mean()) < 0.005
    assert error.std() < 0.1
    assert float(size_half) == pytest.approx(float(size), rel=0.02)

    nearest = jnp.bfloat16(1.0)
    for _ in range(100):
        nearest = (jnp.float32(0.999) * nearest.astype(jnp.float32) + 0.001 * 0.01).astype(jnp.bfloat16)
    assert float(nearest) == 1.0
