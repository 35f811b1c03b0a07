"""Rewards shaped by length and advantages shaped by entropy, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.objective import entropy_advantage, overlong_penalty


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_overlong_penalty_by_hand(kind):
    length = kind([0, 1, 12, 13, 14, 16, 20])
    # L_max = 16, buffer 4: nothing up to 12, then -1/4, -2/4, -4/4, times 2; beyond 16 it stays there.
    penalty = overlong_penalty(length, 16, 4, 2.0)
    np.testing.assert_array_equal(penalty, np.float32([0, 0, 0, -0.5, -1.0, -2.0, -2.0]))
    assert not np.signbit(np.asarray(penalty)[:3]).any()
    assert penalty.dtype == np.float32
    assert isinstance(penalty, np.ndarray if kind is np.asarray else jax.Array)


def test_overlong_penalty_ends_exactly_at_the_factor():
    for buffer in range(1, 50):
        assert overlong_penalty(np.array([50], np.int32), 50, buffer, 1.0)[0] == -1.0


@pytest.mark.parametrize("buffer", [0, -1, 17])
def test_overlong_penalty_refuses_a_buffer_that_does_not_fit(buffer):
    with pytest.raises(ValueError, match=rf"buffer = {buffer}; .* max_tokens = 16"):
        overlong_penalty(np.array([1]), 16, buffer, 1.0)
    with pytest.raises(ValueError, match="factor = -1"):
        overlong_penalty(np.array([1]), 16, 4, -1.0)


def test_entropy_advantage_by_hand():
    entropy = jnp.array([[0.5, 4.0, 0.0, jnp.nan], [0.5, 4.0, 1.0, 1.0]])
    advantages, mask = jnp.array([[1.0], [-2.0]]), jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    # alpha 0.4, kappa 2. Row 0: min(0.4 H, 1/2) = 0.2, 0.5, 0. Row 1: min(0.4 H, 2/2) = 0.2, 1, 0.4, 0.4.
    expected = [[1.2, 1.5, 1.0, 1.0], [-1.8, -1.0, -1.6, -1.6]]
    out = entropy_advantage(advantages, entropy, mask, 0.4, 2.0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(entropy_advantage(advantages * 0, entropy, mask, 0.4, 2.0), np.zeros((2, 4)))
    with jax.enable_x64(True):
        double = (np.asarray(x, np.float64) for x in (advantages, entropy))
        assert entropy_advantage(*double, mask, 0.4, 2.0).dtype == jnp.float64


def test_entropy_advantage_carries_no_gradient():
    def f(advantages, entropy):
        return jnp.sum(entropy_advantage(advantages, entropy, jnp.ones((2, 3)), 0.4, 2.0))

    for grad in jax.grad(f, argnums=(0, 1))(jnp.ones((2, 1)), jnp.ones((2, 3))):
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))
    with pytest.raises(ValueError, match=r"alpha = 0.4, kappa = 0"):
        entropy_advantage(jnp.ones((2, 1)), jnp.ones((2, 3)), jnp.ones((2, 3)), 0.4, 0.0)
