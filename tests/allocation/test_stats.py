"""Success history: discounting, recording through `prompt_of_B`, and the posterior variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.allocation import discounted, init_stats, posterior_variance, record


def test_record_and_discount_by_hand():
    stats = record(init_stats(4), jnp.array([2, 0]), jnp.array([1, 0, 0, 1, 1]), jnp.array([1.0, 0, 1, 1, 0]), 10, 5.0)
    # Slot 1 is prompt 0: rewards 1, 1, 0. Slot 0 is prompt 2: rewards 0, 1.
    np.testing.assert_array_equal(stats.successes_N, [2, 0, 1, 0])
    np.testing.assert_array_equal(stats.trials_N, [3, 0, 2, 0])
    np.testing.assert_array_equal(stats.last_step_N, [10, 0, 10, 0])

    # Ten steps are two half-lives: a quarter is left. Prompt 1 was never tried.
    successes, trials, norm = discounted(stats, jnp.array([0, 1, 2]), 20, 5.0)
    np.testing.assert_array_equal(successes, [0.5, 0, 0.25])
    np.testing.assert_array_equal(trials, [0.75, 0, 0.5])
    np.testing.assert_array_equal(norm, [0, 0, 0])

    # Five steps later prompt 0 gets two more failures; half of its history is left. The others are as they were.
    stats = record(stats, jnp.array([0]), jnp.array([0, 0]), jnp.array([0.0, 0.5]), 15, 5.0)
    np.testing.assert_array_equal(stats.successes_N, [1, 0, 1, 0])
    np.testing.assert_array_equal(stats.trials_N, [3.5, 0, 2, 0])
    np.testing.assert_array_equal(stats.last_step_N, [15, 0, 10, 0])


def test_an_index_twice_decays_once_and_adds_both():
    stats = record(init_stats(3), jnp.array([1]), jnp.zeros(4, jnp.int32), jnp.array([1.0, 1, 0, 1]), 0, 2.0)
    stats = record(stats, jnp.array([1, 0, 1]), jnp.array([0, 0, 1, 2, 2]), jnp.array([1.0, 0, 1, 1, 1]), 2, 2.0)
    # Prompt 1: 3/4 decays to 1.5/2; slot 0 adds 1/2 and slot 2 adds 2/2.
    np.testing.assert_array_equal(stats.successes_N, [1, 4.5, 0])
    np.testing.assert_array_equal(stats.trials_N, [1, 6, 0])


def test_padding_is_ignored():
    """Rows of slot P, whatever their reward; a prompt with nothing but its slot decays and gets no trial."""
    index, slots = jnp.array([1, 2]), jnp.array([0, 2, 2, 0])
    stats = record(init_stats(3), index, slots, jnp.array([1.0, 1.0, 0.0, 0.0]), 0, 2.0, jnp.full(4, 3.0))
    for sums, expected in zip(stats, ([0, 1, 0], [0, 2, 0], [0, 3, 0], [0, 0, 0]), strict=True):
        np.testing.assert_array_equal(sums, expected)
    stats = record(stats, index, jnp.full(4, 2), jnp.ones(4), 2, 2.0)
    np.testing.assert_array_equal(stats.trials_N, [0, 1, 0])


def test_gradient_sizes_add_up_in_any_order():
    rng = np.random.default_rng(0)
    norm, order = (rng.random(500) * 100).astype(np.float32), rng.permutation(500)
    one, other = (
        record(init_stats(1), jnp.array([0]), jnp.zeros(500, jnp.int32), jnp.ones(500), 0, 1.0, x)
        for x in (norm, norm[order])
    )
    np.testing.assert_array_equal(one.norm_N, other.norm_N)
    np.testing.assert_allclose(one.norm_N, norm.sum(), rtol=1e-5)


def test_record_follows_prompt_of_through_any_order():
    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.permutation(100)[:16].astype(np.int32))
    prompt_of, reward = rng.integers(0, 16, 128).astype(np.int32), rng.integers(0, 2, 128).astype(np.float32)
    order = rng.permutation(128)
    jitted = jax.jit(record)
    one = jitted(init_stats(100), index, prompt_of, reward, 7, 100.0)
    other = jitted(init_stats(100), index, prompt_of[order], reward[order], 7, 100.0)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jitted._cache_size() == 1
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), one, init_stats(100))


def test_posterior_variance_is_the_integral():
    # E[p (1 - p)] under Beta(A, B), against midpoint quadrature of the density.
    p = (np.arange(200_000) + 0.5) / 200_000
    for k, g, a, b in [(0, 0, 1, 1), (3, 8, 1, 1), (8, 8, 2, 3), (0, 4, 1.5, 1.5), (2.5, 3.25, 1, 1)]:
        density = p ** (k + a - 1) * (1 - p) ** (g - k + b - 1)
        expected = np.sum(p * (1 - p) * density) / density.sum()
        np.testing.assert_allclose(posterior_variance(jnp.float32(k), jnp.float32(g), (a, b)), expected, rtol=1e-5)
    # By hand: 1 of 2 under Beta(1, 1): A = B = 2, so 2 * 2 / (4 * 5) = 0.2.
    np.testing.assert_allclose(posterior_variance(1.0, 2.0), 0.2, rtol=1e-6)


def test_posterior_variance_is_positive_where_the_raw_one_is_zero():
    assert float(posterior_variance(jnp.float32(0), jnp.float32(4))) > 0.1
    assert float(posterior_variance(jnp.float32(1e6), jnp.float32(1e6))) > 0
    assert posterior_variance(jnp.zeros(3), jnp.zeros(3)).dtype == jnp.float32


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"prior = \(0, 1\)"):
        posterior_variance(jnp.zeros(1), jnp.zeros(1), (0, 1))
    with pytest.raises(ValueError, match="n = 0"):
        init_stats(0)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        record(init_stats(2), jnp.array([0]), jnp.zeros(3, jnp.int32), jnp.zeros(2), 0, 1.0)
