"""The knapsack rule: optimal, gains that never rise, an even share where nothing can be gained."""

import heapq
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.allocation import knapsack
from dynamo_jax.allocation.knapsack import _gains

share = jax.jit(knapsack, static_argnames=("budget", "low", "high", "value"))


def objective(p, n, value):
    p = np.asarray(p, np.float64)
    v = p * (1 - p) ** 2 if value == "info_gain" else np.ones_like(p)
    return float(np.sum(v * (1 - p**n - (1 - p) ** n)))


def brute_force(p, budget, low, high, value):
    choices = itertools.product(range(low, high + 1), repeat=len(p))
    return max(objective(p, np.array(n), value) for n in choices if sum(n) == budget)


def greedy(p, budget, low, high, value):
    """One rollout at a time to the largest gain, in float64."""

    def gain(i, n):
        q = 1 - p[i]
        return (p[i] * q * q if value == "info_gain" else 1.0) * (p[i] ** n * q + q**n * p[i])

    p = np.asarray(p, np.float64)
    n = np.full(len(p), low)
    heap = [(-gain(i, low), i) for i in range(len(p))]
    heapq.heapify(heap)
    for _ in range(budget - low * len(p)):
        _, i = heapq.heappop(heap)
        n[i] += 1
        if n[i] < high:
            heapq.heappush(heap, (-gain(i, n[i]), i))
    return n


def random_p(rng, P):
    kind = rng.integers(4)
    if kind == 0:
        return rng.random(P).astype(np.float32)
    if kind == 1:
        return rng.choice(np.float32([0.0, 0.01, 0.5, 0.9, 1.0]), P)
    if kind == 2:
        return np.full(P, rng.random(), np.float32)
    return rng.beta(0.3, 0.3, P).astype(np.float32)


@pytest.mark.parametrize("value", ["info_gain", "one"])
@pytest.mark.parametrize(("P", "budget", "low", "high"), [(1, 3, 1, 5), (3, 11, 2, 6), (4, 12, 1, 6), (5, 12, 1, 4)])
def test_equals_brute_force(P, budget, low, high, value):
    rng = np.random.default_rng(P)
    cases = np.stack([random_p(rng, P) for _ in range(25)])
    f = jax.jit(jax.vmap(partial(knapsack, budget=budget, low=low, high=high, value=value)))
    for p, n in zip(cases, np.asarray(f(cases)), strict=True):
        assert n.sum() == budget
        assert low <= n.min() <= n.max() <= high
        assert objective(p, n, value) >= brute_force(p, budget, low, high, value) - 1e-6


@pytest.mark.parametrize("value", ["info_gain", "one"])
@pytest.mark.parametrize(("P", "budget", "low", "high"), [(64, 512, 2, 24), (100, 1600, 8, 128), (33, 1000, 1, 400)])
def test_equals_greedy(P, budget, low, high, value):
    rng = np.random.default_rng(P)
    for _ in range(8):
        p = random_p(rng, P)
        n = np.asarray(share(p, budget=budget, low=low, high=high, value=value))
        assert n.sum() == budget
        assert low <= n.min() <= n.max() <= high
        best = objective(p, greedy(p, budget, low, high, value), value)
        assert objective(p, n, value) >= best - 1e-6 * max(best, 1.0)


def test_worked_example():
    # value 1, p = 1/2: gains (1/2)^n = .5 .25 .125 from n = 1. p = 3/4: (3/4)^n / 4 + (1/4)^n 3/4 = .375 .1875 .117.
    assert share(jnp.array([0.5, 0.75]), budget=5, low=1, high=9, value="one").tolist() == [3, 2]
    # info_gain: p q^2 = .125 and .047: gains .0625 .0313 .0156 | .0176 .0088.
    assert share(jnp.array([0.5, 0.75]), budget=5, low=1, high=9, value="info_gain").tolist() == [3, 2]
    assert share(jnp.array([0.5, 0.75]), budget=4, low=1, high=9, value="info_gain").tolist() == [3, 1]
    # Hard prompts are worth more than easy ones.
    n = share(jnp.array([0.05, 0.95]), budget=40, low=2, high=38, value="info_gain")
    assert n[0] > n[1]


def test_gains_never_rise():
    p = np.concatenate([np.random.default_rng(0).random(2000), [0.0, 1.0, 1e-7, 1e-30, 0.5, 1 - 1e-7]])
    gains = np.asarray(_gains(jnp.asarray(p, jnp.float32), 1, 1000, "one"))
    assert gains.shape == (1000, 2006)
    assert np.all(np.diff(gains, axis=0) <= 0)
    np.testing.assert_array_equal(_gains(jnp.asarray(p, jnp.float32), 7, 20, "one"), gains[6:26])


@pytest.mark.parametrize("p", [0.0, 1.0, np.nan, 0.5])
def test_without_gain_all_share_evenly(p):
    """p = 1/2 underflows at n = 100."""
    np.testing.assert_array_equal(share(jnp.full(4, p), budget=1002, low=1, high=900), [251, 251, 250, 250])


def test_permutation_and_one_trace():
    rng = np.random.default_rng(1)
    p, order = rng.random(50).astype(np.float32), rng.permutation(50)
    traces = 0

    @jax.jit
    def f(p):
        nonlocal traces
        traces += 1
        return knapsack(p, 400, 2, 24)

    np.testing.assert_array_equal(f(p[order]), np.asarray(f(p))[order])
    assert traces == 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'many'; choose one of info_gain, one"):
        knapsack(jnp.ones(2), 8, 1, 8, "many")
    with pytest.raises(ValueError, match="need 8 rollouts, but budget = 7"):
        knapsack(jnp.ones(4), 7, 2, 8)
