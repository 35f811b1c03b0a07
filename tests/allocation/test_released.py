"""The released rule against numbers from running the released code."""

from pathlib import Path

import numpy as np
import pytest

from dynamo_jax.allocation import released_allocate, released_priority


@pytest.mark.shared
def test_all_golden_allocations(shared: Path) -> None:
    z = np.load(shared / "golden" / "alloc.npz")
    assert len(z["total"]) == 117
    for i, (first, last) in enumerate(zip(z["offsets"], z["offsets"][1:], strict=False)):
        inputs = (z[name][first:last] for name in ("sample_count", "priority"))
        settings = (int(z[name][i]) for name in ("total", "n_min", "n_max", "initial_budget"))
        found = released_allocate(*inputs, *settings)
        np.testing.assert_array_equal(found, z["counts"][first:last], err_msg=f"case {i}")
        assert found.sum() == z["effective_total"][i]
    assert z["violates_min"].any()
    assert z["violates_max"].any()


@pytest.mark.shared
def test_golden_priorities(shared: Path) -> None:
    z = np.load(shared / "golden" / "prompt_stats.npz")
    np.testing.assert_allclose(released_priority(z["k"], z["G"]), z["rank_used"], rtol=1e-12)
    for (mastery, floor, least), expected in zip(z["variant_params"], z["rank_used_variants"], strict=True):
        np.testing.assert_allclose(released_priority(z["k"], z["G"], mastery, floor, int(least)), expected, rtol=1e-12)


@pytest.mark.shared
def test_golden_sequence_of_updates(shared: Path) -> None:
    z = np.load(shared / "golden" / "prompt_stats.npz")
    successes, trials = np.zeros(z["seq_n_prompts"], int), np.zeros(z["seq_n_prompts"], int)
    ends = np.cumsum(z["seq_len"])
    for batch, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        np.add.at(trials, z["seq_index"][first:last], 1)
        np.add.at(successes, z["seq_index"][first:last], z["seq_reward"][first:last] > 0)
        np.testing.assert_array_equal(successes, z["seq_used_k"][batch])
        np.testing.assert_array_equal(trials, z["seq_used_G"][batch])
        np.testing.assert_allclose(released_priority(successes, trials), z["seq_used_rank"][batch], rtol=1e-12)


def test_worked_example() -> None:
    """Two unseen prompts get 4 each, all are raised to 2, and the 12 left go 0.3 : 0.1, cut at 8."""
    counts = released_allocate(np.array([0, 0, 9, 9]), np.array([-1.0, -1.0, 0.3, 0.1]), 24, 2, 8, 4)
    # 9 and 3: the third takes 6 of 9 up to 8, the fourth has 5; the 3 left take it to 8.
    np.testing.assert_array_equal(counts, [4, 4, 8, 8])
    # Exploration eats the budget: two prompts get nothing at all.
    counts = released_allocate(np.array([0, 0, 9, 9]), np.array([-1.0, -1.0, 0.3, 0.1]), 8, 2, 8, 4)
    np.testing.assert_array_equal(counts, [4, 4, 0, 0])


def test_priority_by_hand() -> None:
    found = released_priority(np.array([0, 2, 4, 0, 17]), np.array([3, 4, 8, 8, 20]))
    np.testing.assert_allclose(found, [-1, 2 * 2 / 12 + 5e-7, 16 / 56 + 5e-7, 0.01, 0.01], rtol=1e-12)
