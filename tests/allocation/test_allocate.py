"""The allocation is optimal, exact in its sum, within its bounds, deterministic, and traced once."""

import heapq
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.allocation import allocate, largest_steps, rows_from_counts, sigma_for
from dynamo_jax.allocation.allocate import scaled

share = jax.jit(allocate, static_argnames=("budget", "low", "high"))


def objective(sigma, n):
    return float(np.sum(np.square(np.asarray(sigma, np.float64)) / n))


def brute_force(sigma, budget, low, high):
    choices = itertools.product(range(low, high + 1), repeat=len(sigma))
    return min(objective(sigma, np.array(n)) for n in choices if sum(n) == budget)


def greedy(sigma, budget, low, high):
    """One rollout at a time to the largest gain, as `allocate` defines it: root gain in float32, lowest index first."""
    _, exponent = np.frexp(sigma.max())
    scaled = np.maximum(np.ldexp(sigma, 100 - exponent), np.float32(1e-30))

    def gain(i, n):
        return np.float32(scaled[i]) * np.float32(1.0 / np.sqrt(n * (n + 1.0)))

    counts = [low] * len(sigma)
    heap = [(-gain(i, low), i) for i in range(len(sigma)) if low < high]
    heapq.heapify(heap)
    for _ in range(budget - low * len(sigma)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < high:
            heapq.heappush(heap, (-gain(i, counts[i]), i))
    return np.array(counts)


def random_sigma(rng, P):
    """Values as they come in training, and awkward ones: ties, zeros, one-hot, many decades."""
    kind = rng.integers(6)
    if kind == 0:
        return rng.random(P).astype(np.float32)
    if kind == 1:
        return rng.choice(np.float32([0.25, 0.1875, 0.125, 0.0]), P)
    if kind == 2:
        return np.eye(P, dtype=np.float32)[rng.integers(P)] * np.float32(0.3)
    if kind == 3:
        return (10.0 ** rng.uniform(-30, 30, P)).astype(np.float32)
    if kind == 4:
        return np.full(P, rng.random(), np.float32)
    p = rng.random(P)
    return (p * (1 - p)).astype(np.float32)


SMALL = [(1, 3, 1, 5), (2, 12, 3, 9), (3, 9, 1, 7), (3, 11, 2, 5), (4, 12, 1, 6), (5, 13, 1, 4)]


@pytest.mark.parametrize(("P", "budget", "low", "high"), SMALL)
def test_equals_brute_force(P, budget, low, high):
    rng = np.random.default_rng(P * 1000 + budget)
    sigmas = np.stack([random_sigma(rng, P) for _ in range(84)])  # 504 cases in all
    counts = np.asarray(jax.vmap(partial(allocate, budget=budget, low=low, high=high))(sigmas))
    assert counts.dtype == np.int32
    for sigma, n in zip(sigmas, counts, strict=True):
        assert n.sum() == budget
        assert n.min() >= low
        assert n.max() <= high
        # Gains are compared in float32; a choice between two that differ only in float64 costs less than 1e-6.
        assert objective(sigma, n) <= brute_force(sigma, budget, low, high) * (1 + 1e-6)


LARGE = [(64, 512, 2, 24), (100, 1600, 8, 24), (33, 1000, 1, 900), (257, 1500, 1, 24), (7, 4000, 1, 4000)]


@pytest.mark.parametrize(("P", "budget", "low", "high"), LARGE)
def test_equals_greedy(P, budget, low, high):
    rng = np.random.default_rng(P)
    sigmas = np.stack([random_sigma(rng, P) for _ in range(10)])
    counts = np.asarray(jax.vmap(partial(allocate, budget=budget, low=low, high=high))(sigmas))
    for sigma, n in zip(sigmas, counts, strict=True):
        np.testing.assert_array_equal(n, greedy(sigma, budget, low, high))


WIDE = [(64, 512, 2, 24), (3, 20000, 1, 19000), (500, 5000, 8, 24), (40, 90000, 2000, 3000), (9, 100, 10, 90)]


@pytest.mark.parametrize(("P", "budget", "low", "high"), WIDE)
def test_equals_the_largest_of_all_steps(P, budget, low, high):
    """The rough threshold and its closed form change nothing: the same as choosing from the table of all gains."""

    def slow(sigma):
        n = np.arange(low, low + min(high - low, budget - P * low), dtype=np.float64)
        table = (1 / np.sqrt(n * (n + 1))).astype(np.float32)
        return low + largest_steps(scaled(sigma) * table[:, None], budget - P * low)

    fast, slow = (jax.jit(f) for f in (partial(allocate, budget=budget, low=low, high=high), slow))
    rng = np.random.default_rng(budget)
    for _ in range(40):
        sigma = random_sigma(rng, P)
        np.testing.assert_array_equal(fast(sigma), slow(sigma))


def test_largest_steps_by_hand():
    gains = jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    for extra, expected in enumerate([[0, 0, 0], [1, 0, 0], [1, 0, 1], [2, 0, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]]):
        np.testing.assert_array_equal(largest_steps(gains, extra), expected)


def test_worked_example():
    # Gains sigma^2 / (n (n + 1)) of sigma = (3, 1, 2), from n = 1: 4.5 1.5 .75 .45 | .5 .17 | 2 .67 .33.
    # The 4 largest are 4.5, 2, 1.5, .75: n = (4, 1, 2).
    np.testing.assert_array_equal(share(jnp.array([3.0, 1.0, 2.0]), budget=7, low=1, high=9), [4, 1, 2])
    # With high = 3 the first prompt stops after 4.5 and 1.5, and the next best is .67: n = (3, 1, 3).
    np.testing.assert_array_equal(share(jnp.array([3.0, 1.0, 2.0]), budget=7, low=1, high=3), [3, 1, 3])


def test_ties_and_nothing_go_evenly_lowest_index_first():
    np.testing.assert_array_equal(share(jnp.ones(5), budget=17, low=1, high=8), [4, 4, 3, 3, 3])
    np.testing.assert_array_equal(share(jnp.zeros(5), budget=17, low=1, high=8), [4, 4, 3, 3, 3])
    np.testing.assert_array_equal(share(jnp.zeros(1), budget=4, low=2, high=8), [4])
    one_hot = jnp.array([0.0, 0.0, 0.25, 0.0])
    np.testing.assert_array_equal(share(one_hot, budget=16, low=1, high=8), [3, 3, 8, 2])


@pytest.mark.parametrize("scale", [2.0**-90, 1.0, 2.0**90])
def test_scale_does_not_matter(scale):
    sigma = np.random.default_rng(0).random(50).astype(np.float32)
    n = partial(share, budget=400, low=2, high=24)
    np.testing.assert_array_equal(n(sigma * np.float32(scale)), n(sigma))


@pytest.mark.parametrize("scale", [1e-35, 1e-10, 1.0, 1e35])
def test_constant_sigma(scale):
    """What XLA may compute in advance, and takes apart to do so: `uniform` is such a sigma."""
    for sigma in (np.ones(8), np.linspace(0, 1, 8)):
        sigma = (sigma * scale).astype(np.float32)
        folded = jax.jit(lambda s=sigma: allocate(jnp.asarray(s), 64, 2, 24))()
        np.testing.assert_array_equal(folded, share(sigma, budget=64, low=2, high=24))


def test_bad_sigma_stays_within_the_bounds():
    n = np.asarray(share(jnp.array([jnp.nan, -1.0, jnp.inf, 0.5, 3e38, 1e-45]), budget=40, low=2, high=20))
    assert n.sum() == 40
    assert n.min() >= 2
    assert n.max() <= 20


def test_permutation():
    rng = np.random.default_rng(3)
    distinct = rng.random(64).astype(np.float32)
    tied = rng.choice(np.float32([0.25, 0.2, 0.1, 0.0]), 64)
    n = partial(share, budget=512, low=2, high=24)
    order = rng.permutation(64)
    np.testing.assert_array_equal(n(distinct[order]), n(distinct)[order])
    assert sorted(zip(tied, np.asarray(n(tied)), strict=True)) == sorted(
        zip(tied[order], np.asarray(n(tied[order])), strict=True)
    )


def test_one_trace_for_all_sigma():
    traces = 0

    @jax.jit
    def f(sigma):
        nonlocal traces
        traces += 1
        return rows_from_counts(allocate(sigma, budget=64, low=2, high=24), 64)

    rng = np.random.default_rng(4)
    rows = [f(random_sigma(rng, 8)) for _ in range(10)]
    assert traces == 1
    assert all(r.shape == (64,) for r in rows)


@pytest.mark.parametrize(
    ("budget", "low", "high", "words"),
    [
        (7, 2, 9, ["low = 2", "need 8", "budget = 7", "at most 1"]),
        (41, 2, 10, ["high = 10", "only 40", "budget = 41", "at least 11"]),
        (40, 0, 10, ["low = 0", "low >= 1"]),
        (2**31, 1, 2**31, ["int32"]),
        (200_000, 1, 150_000, ["high = 150000", "at most 100000"]),
    ],
)
def test_impossible_bounds_are_refused(budget, low, high, words):
    with pytest.raises(ValueError, match="allocate") as error:
        allocate(jnp.ones(4), budget=budget, low=low, high=high)
    for word in words:
        assert word in str(error.value)


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        allocate(jnp.ones((2, 2)), budget=8, low=1, high=8)
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        allocate(jnp.ones(0), budget=8, low=1, high=8)


def test_rows_from_counts():
    rows = rows_from_counts(jnp.array([2, 1, 3], jnp.int32), 6)
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(rows, [0, 0, 1, 2, 2, 2])


def test_sigma_for():
    variance = jnp.array([0.25, 0.16, 0.0])
    np.testing.assert_array_equal(sigma_for("uniform", variance), [1, 1, 1])
    np.testing.assert_array_equal(sigma_for("bernoulli", variance), variance)
    np.testing.assert_allclose(sigma_for("neyman", variance), [0.5, 0.4, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="uniform, bernoulli, neyman"):
        sigma_for("released", variance)


def test_proportional_between_the_bounds():
    sigma = np.random.default_rng(5).uniform(0.5, 1.5, 200).astype(np.float32)
    n = np.asarray(share(sigma, budget=200 * 200, low=1, high=1000))
    np.testing.assert_allclose(n, sigma / sigma.sum() * 200 * 200, atol=1.5)
