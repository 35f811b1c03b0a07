"""The optimizer by hand: its rate, its clipping, its decay."""

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
