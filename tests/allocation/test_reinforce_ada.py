"""When a prompt has been sampled enough, and which of its rollouts are taken."""

import numpy as np
import pytest

from dynamo_jax.allocation import balanced_choice, satisfied


def test_satisfied() -> None:
    # Of 5: 2 right and 3 wrong.
    right, wrong = np.array([2, 1, 2, 9, 0]), np.array([3, 9, 2, 3, 0])
    np.testing.assert_array_equal(satisfied(right, wrong, 5), [True, False, False, True, False])


def test_worked_example() -> None:
    """Prompt 0 has 3 right, 2 wrong; prompt 1 only wrong ones; prompt 2 one wrong. Row 12 is padding."""
    prompt_of = np.array([1, 0, 0, 2, 1, 0, 2, 0, 1, 2, 1, 0, 3, 2])
    reward = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1.0])
    rows = balanced_choice(reward, prompt_of, 3, 4, np.random.default_rng(0))
    assert set(rows[:4]) > {2, 11}
    assert set(rows[:4]) < {1, 5, 7, 2, 11}
    assert set(rows[4:8]) == {0, 4, 8, 10}
    assert set(rows[8:]) == {3, 6, 9, 13}


def test_any_pool() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        P, per_prompt = rng.integers(1, 6), rng.integers(1, 9)
        prompt_of = rng.permutation(np.repeat(np.arange(P + 1), rng.integers(per_prompt, 20, P + 1)))
        reward = (rng.random(len(prompt_of)) < rng.random()).astype(np.float32)
        rows = balanced_choice(reward, prompt_of, P, per_prompt, rng)
        assert len(set(rows.tolist())) == len(rows) == P * per_prompt
        np.testing.assert_array_equal(prompt_of[rows], np.repeat(np.arange(P), per_prompt))
        for p, taken in enumerate(reward[rows].reshape(P, per_prompt).sum(axis=1)):
            right, wrong = reward[prompt_of == p].sum(), (1 - reward[prompt_of == p]).sum()
            if satisfied(right, wrong, per_prompt):
                assert taken == per_prompt // 2
            elif right < per_prompt // 2:
                assert taken == right
            else:
                assert taken == per_prompt - wrong


def test_the_generator_decides() -> None:
    prompt_of, reward = np.zeros(40, int), np.arange(40) % 2.0
    first, again, other = (balanced_choice(reward, prompt_of, 1, 8, np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    seen = np.concatenate([balanced_choice(reward, prompt_of, 1, 8, np.random.default_rng(s)) for s in range(300)])
    counts = np.bincount(seen, minlength=40)
    assert counts.min() > 30  # each is expected 60 times
    assert counts.max() < 90


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 1 has 1 rollouts in the pool, per_prompt = 2"):
        balanced_choice(np.ones(3), np.array([0, 0, 1]), 2, 2, np.random.default_rng(0))
