"""Group-relative advantages: by hand, against the released code, and in any order of the rollouts."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.config.choices import Advantage
from dynamo_jax.objective import group_advantage, group_weight

GOLDEN_NAME = {"grpo": "grpo_std", "dr_grpo": "grpo_nostd", "rloo": "rloo"}


def test_by_hand():
    rewards = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    prompt_of = jnp.array([1, 1, 0, 1, 0, 1])
    # Group 0: rewards 1, 0; mean 1/2; std (n - 1) sqrt(1/2). Group 1: 1, 0, 0, 1; mean 1/2; std sqrt(1/3).
    small, large = 0.5 / (np.sqrt(1 / 2) + 1e-6), 0.5 / (np.sqrt(1 / 3) + 1e-6)
    grpo = [large, -large, small, -large, -small, large]
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 2), grpo, rtol=1e-6)
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 2, "dr_grpo"), [0.5, -0.5, 0.5, -0.5, -0.5, 0.5])
    # The others' mean: group 0: 0, 1. Group 1: 1/3 for a right answer, 2/3 for a wrong one.
    rloo = [2 / 3, -2 / 3, 1, -2 / 3, -1, 2 / 3]
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 2, "rloo"), rloo, rtol=1e-6)


@pytest.mark.parametrize("kind", GOLDEN_NAME)
def test_equal_rewards_singletons_and_empty_groups_give_exactly_zero(kind):
    # 0.1 summed 7 times in float32 over 7 is not 0.1: divided by 1e-6 the difference would show.
    rewards = jnp.array([0.1] * 7 + [1.0] * 3 + [0.7])
    prompt_of = jnp.array([0] * 7 + [3] * 3 + [4])
    np.testing.assert_array_equal(group_advantage(rewards, prompt_of, 6, kind), np.zeros(11))


@pytest.mark.parametrize("kind", GOLDEN_NAME)
def test_order_does_not_matter(kind):
    rng = np.random.default_rng(0)
    prompt_of = np.repeat(np.arange(5), [2, 9, 1, 4, 16]).astype(np.int32)
    rewards = rng.integers(0, 2, 32).astype(np.float32)
    order = rng.permutation(32)
    f = jax.jit(group_advantage, static_argnums=(2, 3))
    one, other = f(rewards, prompt_of, 5, kind), f(rewards[order], prompt_of[order], 5, kind)
    np.testing.assert_allclose(other, one[order], rtol=1e-6)


@pytest.mark.parametrize("kind", get_args(Advantage))
def test_padding_rows_are_never_read(kind):
    """A pool of fixed size: rows of prompt P (or any other that does not exist) change nothing and get exactly 0."""
    rewards, prompt_of = np.float32([1, 0, 1, 1, 0]), np.int32([0, 0, 2, 2, 2])
    expected = group_advantage(rewards, prompt_of, 3, kind)
    for bad in (7.0, np.nan, np.inf):
        pool = np.insert(rewards, [0, 3, 5, 5], bad), np.insert(prompt_of, [0, 3, 5, 5], [3, 3, 99, -1])
        out = np.asarray(jax.jit(group_advantage, static_argnums=(2, 3))(*pool, 3, kind))
        padding = (pool[1] < 0) | (pool[1] >= 3)
        np.testing.assert_array_equal(out[padding], np.zeros(4))
        np.testing.assert_array_equal(out[~padding], expected)


def test_graded_rewards_by_hand():
    # A right answer, one right but long (1 - 0.4), one wrong and long (0 - 0.3): mean 0.4333.
    rewards, prompt_of = jnp.array([1.0, 0.6, -0.3]), jnp.zeros(3, jnp.int32)
    mean = 1.3 / 3
    centred = np.array([1 - mean, 0.6 - mean, -0.3 - mean])
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 1, "dr_grpo"), centred, rtol=1e-5)
    std = np.sqrt(np.sum(centred**2) / 2)
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 1, "grpo"), centred / (std + 1e-6), rtol=1e-5)
    # The others' means: 0.15, 0.35, 0.8.
    np.testing.assert_allclose(group_advantage(rewards, prompt_of, 1, "rloo"), [0.85, 0.25, -1.1], rtol=1e-5)


def test_w_reinforce_by_hand():
    # No baseline: groups of one and of equal rewards count like any other. A length penalty that leaves a right answer
    # above 0.5 does not change its sign.
    rewards, prompt_of = jnp.array([1.0, 1.0, 0.0, 0.6, -1.0]), jnp.array([0, 0, 1, 2, 3])
    out = group_advantage(rewards, prompt_of, 3, "w_reinforce")
    np.testing.assert_array_equal(out, np.float32([0.1, 0.1, -1.0, 0.1, 0.0]))
    assert out.dtype == jnp.float32
    out = group_advantage(rewards, prompt_of, 3, "w_reinforce", positive_weight=0.0)
    np.testing.assert_array_equal(out, np.float32([0, 0, -1, 0, 0]))
    with pytest.raises(ValueError, match="positive_weight = -1"):
        group_advantage(rewards, prompt_of, 3, "w_reinforce", positive_weight=-1.0)


def test_group_weight_by_hand():
    # Groups of 1, 0, 4 and 1 rollouts, two rows of padding: the mean of 1, 4, 1 is 2, so 2 / n is 2, 0.5, 2.
    prompt_of = jnp.array([2, 0, 2, 4, 2, 3, 2, -1])
    np.testing.assert_array_equal(group_weight(prompt_of, 4, "prompt"), [0.5, 2, 0.5, 0, 0.5, 2, 0.5, 0])
    np.testing.assert_array_equal(group_weight(prompt_of, 4, "rollout"), [1, 1, 1, 0, 1, 1, 1, 0])
    for kind in ("prompt", "rollout"):
        assert group_weight(prompt_of, 4, kind).dtype == jnp.float32
        np.testing.assert_array_equal(group_weight(prompt_of * 0 + 4, 4, kind), np.zeros(8))  # nothing but padding
    with pytest.raises(ValueError, match=r"'token'.*rollout, prompt"):
        group_weight(prompt_of, 4, "token")


def test_group_weight_makes_every_prompt_weigh_the_same():
    sizes = np.array([3, 24, 8, 1, 12])
    prompt_of = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes))
    weight = np.asarray(group_weight(prompt_of, 5, "prompt"), np.float64)
    np.testing.assert_allclose(np.bincount(prompt_of, weight), np.full(5, sizes.sum() / 5), rtol=1e-6)


def test_carries_no_gradient():
    prompt_of = jnp.array([0, 0, 1])
    grad = jax.grad(lambda r: jnp.sum(group_advantage(r, prompt_of, 2) * jnp.arange(3.0)))(jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(grad, np.zeros(3))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="grpo, dr_grpo, rloo"):
        group_advantage(jnp.ones(2), jnp.zeros(2, jnp.int32), 1, "gae")
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        group_advantage(jnp.ones(2), jnp.zeros(3, jnp.int32), 1)


@pytest.mark.shared
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-7), (False, 1e-5)])
@pytest.mark.parametrize("kind", GOLDEN_NAME)
def test_golden(shared, kind, x64, tolerance):
    folder = shared / "golden"
    cases = json.loads((folder / "manifest.json").read_text())["files"]["advantages.npz"]["cases"]
    checked = 0
    compiled = jax.jit(group_advantage, static_argnums=(2, 3))
    with np.load(folder / "advantages.npz") as arrays, jax.enable_x64(x64):
        for case in cases:
            read = {n: arrays[f"{case['case']:03d}/{n}"] for n in ("token_level_rewards", "group", "mask")}
            expected = arrays[f"{case['case']:03d}/{GOLDEN_NAME[kind]}"]
            _, prompt_of, sizes = np.unique(read["group"], return_inverse=True, return_counts=True)
            rewards = read["token_level_rewards"].astype(np.float64).sum(-1).astype(np.float64 if x64 else np.float32)
            # One shape for all cases, so that the program compiles once: the rest is a group of its own.
            rest = 96 - len(rewards)
            padded = np.pad(rewards, (0, rest)), np.pad(prompt_of, (0, rest), constant_values=7).astype(np.int32)
            advantage = compiled(*padded, 8, kind)
            assert advantage.dtype == rewards.dtype
            ours = np.asarray(advantage)[: len(rewards), None] * read["mask"]
            alone = sizes[prompt_of] == 1  # the released code gives these their raw reward
            np.testing.assert_array_equal(ours[alone], 0.0)
            # Groups of equal rewards: exactly 0 here, a magnified rounding there (the manifest's note).
            equal = np.array([len(set(rewards[prompt_of == g])) == 1 for g in prompt_of]) & ~alone
            np.testing.assert_array_equal(ours[equal], 0.0)
            compare = ~alone & ~equal
            np.testing.assert_allclose(ours[compare], expected[compare], rtol=tolerance, atol=tolerance)
            checked += int(compare.sum())
    assert checked > 300
