"""Schedules of the rate, and moments in bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamo_jax.config import ArchitectureConfig, OptimizerConfig
from dynamo_jax.policy import DecoderConfig, abstract_policy
from dynamo_jax.update import learning_rate_schedule, make_optimizer


def test_learning_rate_by_hand() -> None:
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=0.4, warmup_steps=4))
    np.testing.assert_allclose([rate(u) for u in (0, 1, 3, 4, 99)], [0.1, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    assert learning_rate_schedule(OptimizerConfig(learning_rate=0.4))(0) == pytest.approx(0.4)


def test_clipped_adamw_by_hand() -> None:
    """Two updates, the first at half the rate and clipped from norm 10 to 2, the second below the limit."""
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5, max_grad_norm=2.0
    )
    optimizer = make_optimizer(config)
    w = {"embedding": jnp.array([1.0, -2.0]), "lm_head": jnp.array(3.0)}
    state = optimizer.init(w)
    p, mean, square = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for t, (g, scale) in enumerate(((np.array([6.0, 0.0, 8.0]), 0.2), (np.array([0.3, 1.0, -0.5]), 1.0)), 1):
        changes, state = optimizer.update({"embedding": jnp.array(g[:2]), "lm_head": jnp.array(g[2])}, state, w)
        w = optax.apply_updates(w, changes)
        g = g * scale
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
        step = mean / (1 - 0.8**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3) + 0.5 * p
        p = p - (0.05 if t == 1 else 0.1) * step
        np.testing.assert_allclose([*w["embedding"], w["lm_head"]], p, rtol=1e-5)


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    """Without a gradient, a parameter moves by its decay alone. A norm is stacked over the layers, as a matrix is."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config)
    shape = ArchitectureConfig(hidden_size=8, intermediate_size=8, vocab_size=8, tie_word_embeddings=False)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_policy(DecoderConfig(shape))[1])
    state = jax.jit(optimizer.init)(params)
    changes, _ = jax.jit(optimizer.update)(jax.tree.map(np.zeros_like, params), state, params)
    moved = {path[-2].key for path, x in jax.tree_util.tree_flatten_with_path(changes)[0] if np.any(x)}
    assert moved == {"embedding", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}
    np.testing.assert_allclose(changes["lm_head"].get_value(), -0.05 * params["lm_head"].get_value(), rtol=1e-6)
    # The state of a plain AdamW: a run that was saved with one goes on.
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate_schedule(config)))
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))


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
