"""The jitted programs of allocation: bounds and sums whatever the history, the rules, and one trace each."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dynamo_jax.allocation import PromptStats
from dynamo_jax.allocation.programs import AllocationPrograms
from dynamo_jax.config import AllocationConfig, MeshConfig
from dynamo_jax.sharding import make_mesh

N, P, B = 40, 8, 64
CONFIG = AllocationConfig(low=2, high=24, half_life=20.0)


def programs(rule: str = "bernoulli", mesh: MeshConfig = MeshConfig(), **changes: Any) -> AllocationPrograms:  # noqa: B008
    config = dataclasses.replace(CONFIG, rule=rule, **changes)
    return AllocationPrograms(config, N, B, make_mesh(mesh, jax.devices()[: mesh.size]))


def history(rates: Any, trials: float) -> PromptStats:
    """All prompts tried `trials` times at step 0, prompt i with success rate rates[i]."""
    rates = np.resize(np.asarray(rates, np.float32), N)
    return PromptStats(rates * trials, np.full(N, trials, np.float32), np.zeros(N, np.int32))


@pytest.mark.parametrize("rule", ["uniform", "bernoulli", "neyman"])
def test_counts_are_in_bounds_and_sum_to_the_budget_over_a_run(rule: str) -> None:
    """Prompts of every success rate, in random batches; one trace each, whatever the counts."""
    p, rng = programs(rule), np.random.default_rng(0)
    rate_N = rng.uniform(0, 1, N) ** np.where(rng.random(N) < 0.5, 6, 0.1)  # mostly near 0 and near 1
    stats, seen = p.init(), set()
    successes_N, trials_N = np.zeros(N), np.zeros(N)
    for step in range(1, 25):
        index_P = rng.permutation(N)[:P].astype(np.int32)
        counts_P, prompt_of_B, success_P = jax.device_get(p.allocate(stats, index_P, step))
        assert counts_P.sum() == B
        assert counts_P.min() >= CONFIG.low
        assert counts_P.max() <= CONFIG.high
        np.testing.assert_array_equal(prompt_of_B, np.repeat(np.arange(P), counts_P))
        assert np.all((success_P > 0) & (success_P < 1))
        reward_B = (rng.random(B) < rate_N[index_P[prompt_of_B]]).astype(np.float32)
        stats = p.record(stats, index_P, prompt_of_B, reward_B, step)
        np.add.at(successes_N, index_P[prompt_of_B], reward_B)
        np.add.at(trials_N, index_P[prompt_of_B], 1)
        seen.add(tuple(counts_P))
    assert len(seen) == 1 if rule == "uniform" else len(seen) > 12
    assert p.traces == {"allocate": 1, "record": 1}
    # Each prompt's results went to that prompt: its discounted history never exceeds all it ever got.
    assert np.all(np.asarray(stats.trials_N) <= trials_N + 1e-3)
    once = np.asarray(stats.trials_N) > 0
    np.testing.assert_array_equal(once, trials_N > 0)
    assert np.corrcoef((successes_N / np.maximum(trials_N, 1))[once], rate_N[once])[0, 1] > 0.9


def test_rules_share_as_they_say() -> None:
    """p(1-p) of 0.25, 0.09 and 0.0099: shares in proportion to it, to its root, or equal."""
    stats = history([0.5, 0.9, 0.99, 0.5, 0.1, 0.01, 0.5, 0.9], trials=1e6)
    variance_P = np.array([0.25, 0.09, 0.0099, 0.25, 0.09, 0.0099, 0.25, 0.09])
    index_P = np.arange(P, dtype=np.int32)
    for rule, weight_P in (("uniform", np.ones(P)), ("bernoulli", variance_P), ("neyman", np.sqrt(variance_P))):
        counts_P = np.asarray(programs(rule, low=1, half_life=1e9).allocate(stats, index_P, 1)[0])
        np.testing.assert_allclose(counts_P, np.maximum(B * weight_P / weight_P.sum(), 1), atol=1.0)
        assert np.abs(counts_P[[0, 1, 2]] - counts_P[[3, 4, 5]]).max() <= 1  # equals may have to share an odd number


def test_history_moves_the_allocation_and_fades() -> None:
    p, index_P = programs(), np.arange(P, dtype=np.int32)
    stats = p.init()
    counts_P, prompt_of_B, success_P = jax.device_get(p.allocate(stats, index_P, 1))
    np.testing.assert_array_equal(counts_P, B // P)  # nothing is known
    np.testing.assert_allclose(success_P, 0.5)
    # Prompts 0 to 2 always right, 3 to 5 always wrong, 6 and 7 right every other time.
    reward_B = np.select([prompt_of_B < 3, prompt_of_B < 6], [1.0, 0.0], np.arange(B) % 2).astype(np.float32)
    stats = p.record(stats, index_P, prompt_of_B, reward_B, 1)
    counts_P, _, success_P = jax.device_get(p.allocate(stats, index_P, 2))
    assert counts_P[6:].min() > 2 * counts_P[:6].max()
    assert success_P[:3].min() > 0.85
    assert success_P[3:6].max() < 0.15
    # A batch's slot is not the prompt: the same prompts in another order get the same counts.
    order = np.array([7, 0, 3, 6, 1, 4, 2, 5])
    moved_P = np.asarray(p.allocate(stats, order.astype(np.int32), 2)[0])
    assert moved_P[order >= 6].min() > 2 * moved_P[order < 6].max()
    later_P = np.asarray(p.allocate(stats, index_P, 1000)[0])
    np.testing.assert_array_equal(later_P, B // P)  # fifty half-lives later nothing is known again


def test_eight_devices_allocate_the_same() -> None:
    stats, index_P = history(np.linspace(0, 1, N), trials=7.0), np.arange(0, N, 5, dtype=np.int32)
    one, eight = (
        jax.device_get(programs(mesh=m).allocate(stats, index_P, 3)) for m in (MeshConfig(), MeshConfig(2, 2, 2))
    )
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert len(set(one[0])) > 3
