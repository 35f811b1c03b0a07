"""Estimates of the KL to a reference: their values, and what the gradient of each is the gradient of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.objective import Clip, TokenTerms, kl_estimate, policy_loss

V, C = 5, 2
ROWS = np.array(list(itertools.product(range(V), repeat=C)))
PREFIX_OF = np.stack([np.zeros(len(ROWS), int), 1 + ROWS[:, 0]], axis=1)


def tables():
    """Logits of a policy and of its reference, for the empty prefix and for each first token."""
    return jnp.asarray(np.random.default_rng(0).normal(0, 1.0, (2, 1 + V, V)), jnp.float32)


def logp_of(logits):
    return jax.nn.log_softmax(logits)[PREFIX_OF, ROWS]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_values_and_gradients_by_hand(estimator):
    """d = 0.5 and -1; where it is 30, the exponent of k3 is clamped, and its gradient is that of -d."""
    logp, reference = jnp.array([-2.0, -1.0, -40.0]), jnp.array([-1.5, -2.0, -10.0])
    d = np.array([0.5, -1.0, 30.0])
    values = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(np.minimum(d, 20)) - 1 - d}[estimator]
    slopes = {"k1": np.ones(3), "k2": -d, "k3": 1 - np.array([*np.exp(d[:2]), 0.0])}[estimator]
    np.testing.assert_allclose(kl_estimate(logp, reference, estimator), values, rtol=1e-6)
    grads = jax.grad(lambda x, r: kl_estimate(x, r, estimator).sum(), argnums=(0, 1))(logp, reference)
    np.testing.assert_allclose(grads[0], slopes, rtol=1e-6)
    np.testing.assert_array_equal(grads[1], np.zeros(3))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expectations_and_what_their_gradients_are_of(estimator):
    """Over every first token of a tiny policy, with its probability: exact."""
    policy, reference = tables()[:, 0]
    logp, reference_logp = jax.nn.log_softmax(policy), jax.nn.log_softmax(reference)

    def expected(x):
        of_token = kl_estimate(jax.nn.log_softmax(x), reference_logp, estimator)
        return jnp.sum(jnp.exp(logp) * of_token)

    value, grad = jax.value_and_grad(expected)(policy)

    def kl(x, forward):
        p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(reference_logp) * (reference_logp - p) if forward else jnp.exp(p) * (p - reference_logp))

    true, true_grad = jax.value_and_grad(kl)(policy, False)
    if estimator != "k2":
        np.testing.assert_allclose(value, true, rtol=1e-5)
    wanted = {"k1": np.zeros(V), "k2": true_grad, "k3": jax.grad(kl)(policy, True)}[estimator]
    np.testing.assert_allclose(grad, wanted, atol=1e-6)
    assert np.abs(true_grad).max() > 0.1


def test_k1_in_the_reward_has_the_gradient_of_the_kl_of_whole_rollouts():
    """Over all 25 rollouts: the policy gradient of the reward -sum k1 is that of -KL."""
    policy, reference = tables()
    logp, reference_logp = logp_of(policy), logp_of(reference)
    reward = -jnp.sum(kl_estimate(logp, reference_logp, "k1"), axis=1)
    probability = jnp.exp(logp.sum(1))

    def surrogate(x):
        return jnp.sum(probability * reward * logp_of(x).sum(1))

    def minus_kl(x):
        p = logp_of(x).sum(1)
        return -jnp.sum(jnp.exp(p) * (p - reference_logp.sum(1)))

    wanted = jax.grad(minus_kl)(policy)
    np.testing.assert_allclose(jax.grad(surrogate)(policy), wanted, atol=1e-5)
    assert np.abs(wanted).max() > 0.1


def test_the_loss_with_a_penalty_by_hand():
    """Ratio 1 and advantage 1: -1 a token, and 0.3 k2 of three of the four tokens; a weight is of both."""
    logp = jnp.array([[-1.0, -2.0], [-3.0, -1.0]])
    reference = jnp.array([[-1.5, -2.0], [-2.0, jnp.nan]])
    mask, ones = jnp.array([[1, 1], [1, 0]]), jnp.ones((2, 2))

    def loss(x, weight=None):
        terms = TokenTerms(penalty=0.3 * kl_estimate(x, reference, "k2"), weight=weight)
        return policy_loss(x, logp, ones, mask, Clip(0.2, 0.2), terms=terms)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(logp)
    k2 = np.array([0.125, 0.0, 0.5])
    np.testing.assert_allclose(value, -1 + 0.3 * k2.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl_penalty"], 0.3 * k2.mean(), rtol=1e-6)
    np.testing.assert_allclose(grad[0], (-1 + 0.3 * np.array([0.5, 0.0])) / 3, rtol=1e-6)
    np.testing.assert_allclose(grad[1, 0], (-1 + 0.3 * -1.0) / 3, rtol=1e-6)
    weighted = loss(logp, jnp.array([[2.0], [1.0]]))[0]
    np.testing.assert_allclose(weighted, (2 * (-2 + 0.3 * 0.125) + (-1 + 0.3 * 0.5)) / 3, rtol=1e-6)


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4'; choose one of k1, k2, k3"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
