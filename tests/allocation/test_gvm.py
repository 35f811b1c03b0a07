"""GVM's weights by hand, and the running gradient size that they read."""

import jax.numpy as jnp
import numpy as np

from dynamo_jax.allocation import gvm_sigma, init_stats, record


def test_worked_example() -> None:
    # G: 6 / 2 = 3 and 1 / 1 = 1; the third has no success and takes their mean, 2.
    norm, successes, p = jnp.array([6.0, 1.0, 0.0]), jnp.array([2.0, 1.0, 0.0]), jnp.array([0.25, 0.5, 0.01])
    expected = np.array([3.0, 1.0, 2.0]) / np.sqrt([0.25 + 1e-3 / 0.25, 0.5 + 1e-3 / 0.5, 0.01 + 1e-3 / 0.01])
    np.testing.assert_allclose(gvm_sigma(norm, successes, p), expected, rtol=1e-6)
    expected = np.array([3.0, 1.0, 2.0]) / np.sqrt([0.25 + 0.1, 0.5 + 0.1, 0.01 + 0.1])
    np.testing.assert_allclose(gvm_sigma(norm, successes, p, alpha=0.1, beta=1.0), expected, rtol=1e-6)


def test_nothing_known() -> None:
    p = jnp.array([0.5, 0.5])
    np.testing.assert_allclose(gvm_sigma(jnp.zeros(2), jnp.zeros(2), p), 1 / np.sqrt(0.502), rtol=1e-6)


def test_norms_of_right_rollouts_are_summed_and_fade() -> None:
    index, prompt_of = jnp.array([2, 0]), jnp.array([0, 0, 1, 1, 2])  # the last row is padding
    reward, norm = jnp.array([1.0, 0, 1, 1, 1]), jnp.array([1.5, 9.0, 2.25, 0.75, 7.0])
    stats = record(init_stats(3), index, prompt_of, reward, 0, 10.0, norm)
    np.testing.assert_array_equal(stats.norm_N, [3.0, 0, 1.5])
    np.testing.assert_array_equal(stats.successes_N, [2, 0, 1])
    np.testing.assert_array_equal(stats.trials_N, [2, 0, 2])
    stats = record(stats, index, prompt_of, reward, 10, 10.0, norm)
    np.testing.assert_array_equal(stats.norm_N, [4.5, 0, 2.25])
    np.testing.assert_array_equal(record(stats, index, prompt_of, reward, 10, 10.0).norm_N, [4.5, 0, 2.25])
