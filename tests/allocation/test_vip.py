"""VIP: features, a Gaussian process that predicts prompts it never saw, and exact allocation by its predictions."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.allocation import prompt_features, vip
from dynamo_jax.allocation.vip import fourier_features, init_gp, observe, predict
from dynamo_jax.config import AllocationConfig

CONFIG = AllocationConfig(rule="vip", half_life=50.0)


def prompts(rng: np.random.Generator, N: int) -> tuple[list[list[int]], np.ndarray]:
    """Chains like the built-in task's: the longer, and the more often token 7 occurs, the harder."""
    lists = [rng.integers(0, 12, rng.integers(4, 16)).tolist() for _ in range(N)]
    hardness = np.array([0.35 * len(tokens) + 0.8 * tokens.count(7) for tokens in lists])
    return lists, 1 / (1 + np.exp(hardness - hardness.mean()))


@pytest.fixture(scope="module")
def learned():
    """Half of 600 prompts tried over 40 steps of 32, 8 rollouts each; the state after each step."""
    rng = np.random.default_rng(0)
    lists, rate_N = prompts(rng, 600)
    phi_NM = jax.jit(partial(fourier_features, fourier=256, length_scale=1.0))(prompt_features(lists, 64))
    learn = jax.jit(partial(observe, config=CONFIG))
    gp = init_gp(256)
    for step in range(1, 41):
        index = rng.permutation(300)[:32]
        gp = learn(gp, phi_NM[index], rng.binomial(8, rate_N[index]).astype(np.float32), np.full(32, 8.0), step)
    return gp, phi_NM, rate_N


def test_prompts_never_tried_are_predicted(learned) -> None:
    gp, phi_NM, rate_N = learned
    found = np.asarray(jax.jit(partial(predict, config=CONFIG))(gp, phi_NM, 40))
    assert np.corrcoef(found[300:], rate_N[300:])[0, 1] > 0.85
    assert np.abs(found[300:] - rate_N[300:]).mean() < 0.6 * np.abs(rate_N - 0.5).mean()
    assert found.min() > 0
    assert found.max() < 1


def test_it_forgets(learned) -> None:
    gp, phi_NM, _ = learned
    foresee = jax.jit(partial(predict, config=CONFIG))
    now, later, much_later = (np.abs(np.asarray(foresee(gp, phi_NM, step)) - 0.5).mean() for step in (40, 400, 4000))
    assert later < now
    assert much_later < 1e-6
    # And what is learned anew counts: prompts that all turn easy are soon predicted so.
    learn = jax.jit(partial(observe, config=CONFIG))
    for step in range(240, 260):
        gp = learn(gp, phi_NM[:300:3], np.full(100, 8.0), np.full(100, 8.0), step)
    assert np.asarray(foresee(gp, phi_NM[300:], 260)).mean() > 0.75


def test_nothing_known_is_the_prior() -> None:
    phi = jnp.ones((3, 8)) / 3
    config = dataclasses.replace(CONFIG, prior=(1.0, 3.0))
    np.testing.assert_allclose(predict(init_gp(8), phi, 5, config), 0.25, rtol=1e-6)
    nothing = observe(init_gp(8), phi, jnp.zeros(3), jnp.zeros(3), 7, config)
    assert not nothing.precision_WW.any()
    assert nothing.last_step == 7


def test_one_feature_by_hand() -> None:
    """phi = 1, 3 of 4 right under Beta(1, 1): r = 4/6, precision 4 (2/3)(1/3) = 8/9, prior precision 1/4."""
    gp = observe(init_gp(1), jnp.ones((1, 1)), jnp.array([3.0]), jnp.array([4.0]), 0, CONFIG)
    np.testing.assert_allclose(gp.precision_WW, 8 / 9, rtol=1e-6)
    latent = np.log(2.0) * (8 / 9) / (8 / 9 + 1 / 4)
    np.testing.assert_allclose(predict(gp, jnp.ones((1, 1)), 0, CONFIG), 1 / (1 + np.exp(-latent)), rtol=1e-6)
    # A half-life later the data weigh half.
    latent = np.log(2.0) * (4 / 9) / (4 / 9 + 1 / 4)
    np.testing.assert_allclose(predict(gp, jnp.ones((1, 1)), 50, CONFIG), 1 / (1 + np.exp(-latent)), rtol=1e-6)


def test_fourier_features_have_the_kernel() -> None:
    x = np.random.default_rng(2).normal(size=(20, 6)).astype(np.float32) * 0.5
    phi = np.asarray(fourier_features(jnp.asarray(x), 20_000, 1.5))
    expected = np.exp(-np.sum(np.square(x[:, None] - x), axis=2) / (2 * 1.5**2))
    np.testing.assert_allclose(phi @ phi.T, expected, atol=0.04)


def test_features() -> None:
    lists = [[1, 2, 3], [3, 2, 1], [1, 2, 3], [1, 2, 3] * 30, [70_000], [5], []]
    found = prompt_features(lists, 64)
    assert (found.shape, found.dtype) == ((7, 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found[:6, :-1], axis=1), 1.0, rtol=1e-6)
    assert not found[6, :-1].any()
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 0.1  # order counts, through bigrams
    np.testing.assert_allclose([found[:, -1].mean(), found[:, -1].std()], [0, 1], atol=1e-6)
    assert found[3, -1] == found[:, -1].max()
    np.testing.assert_array_equal(prompt_features([[1, 2], [3, 4]], 8)[:, -1], 0)  # all of one length
    # The same on every machine and in every version: these numbers are part of what a checkpoint means.
    pinned = [[0, -(0.2**0.5), 0, 0, 0.8**0.5, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0, -1]]
    np.testing.assert_allclose(prompt_features([[1, 2, 3], [4]], 10), pinned, atol=1e-6)


@pytest.mark.parametrize(("advantage", "low"), [("rloo", 2), ("dr_grpo", 3), ("grpo", 1)])
def test_equals_brute_force(advantage: str, low: int) -> None:
    factor = {"rloo": lambda n: 1 / (n - 1), "dr_grpo": lambda n: (n - 1) / n**2, "grpo": lambda n: 1 / n}[advantage]
    rng = np.random.default_rng(low)
    p = rng.random((20, 4)).astype(np.float32)
    budget, high = 4 * low + 7, low + 5
    found = np.asarray(jax.jit(jax.vmap(lambda p: vip(p, budget, low, high, advantage)))(p))
    choices = np.array([n for n in itertools.product(range(low, high + 1), repeat=4) if sum(n) == budget])
    for p_P, n in zip(p.astype(np.float64), found, strict=True):
        assert n.sum() == budget
        assert low <= n.min() <= n.max() <= high
        cost = np.sum(p_P * (1 - p_P) * factor(choices), axis=1)
        assert np.sum(p_P * (1 - p_P) * factor(n)) <= cost.min() * (1 + 1e-6)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="low = 2; gains of dr_grpo fall only from n = 3"):
        vip(jnp.ones(2), 8, 2, 8, "dr_grpo")
    with pytest.raises(ValueError, match="dim = 1"):
        prompt_features([[1]], 1)
    with pytest.raises(ValueError, match="0 prompts"):
        prompt_features([], 8)
