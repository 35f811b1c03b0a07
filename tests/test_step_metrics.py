"""What a step tells about its allocation, rollouts and updates, by hand."""

import math

import numpy as np
import pytest

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.step_metrics import (
    allocation_metrics,
    logp_drift,
    not_finite,
    packing_metrics,
    rollout_metrics,
    shares,
    update_metrics,
)
from dynamo_jax.update import MiniBatch
from dynamo_jax.update.packing import Shape


def test_allocation_by_hand() -> None:
    metrics = allocation_metrics(np.array([2, 6, 4, 3, 1]), np.array([0.1, 0.5, 0.6, 0.9, 0.0], np.float32))
    assert metrics == {
        "allocation/min": 1,
        "allocation/max": 6,
        "allocation/entropy": pytest.approx(-sum(n / 16 * math.log(n / 16) for n in (2, 6, 4, 3, 1))),
        "allocation/prompts_hard": 2,
        "allocation/mean_hard": 1.5,
        "allocation/prompts_middle": 2,
        "allocation/mean_middle": 5.0,
        "allocation/prompts_easy": 1,
        "allocation/mean_easy": 3.0,
    }


def test_every_prompt_is_of_one_kind_and_kinds_without_prompts_have_none() -> None:
    """1/3 and 2/3 in float32, on either side of the same numbers in float64, must not fall between the kinds."""
    thirds = np.array([1 / 3, 2 / 3, 0.5], np.float32)
    metrics = allocation_metrics(np.array([4, 4, 4]), thirds)
    assert sum(metrics[f"allocation/prompts_{kind}"] for kind in ("hard", "middle", "easy")) == 3
    uniform = allocation_metrics(np.full(8, 4), np.full(8, 0.5))
    assert uniform["allocation/entropy"] == pytest.approx(math.log(8))
    assert uniform["allocation/mean_hard"] == uniform["allocation/mean_easy"] == 0.0
    assert uniform["allocation/mean_middle"] == 4.0


def pool(
    index: list[int], prompt_of: list[int], reward: list[float], success: list[float], lengths: list[int] | None = None
) -> Pool:
    slots, R = np.array(index, np.int32), len(reward)
    names = tuple(map(str, index))
    prompts = PromptBatch(slots, slots[:, None], slots, names, names, names)
    length_B = np.full(R, 2, np.int32) if lengths is None else np.array(lengths, np.int32)
    rollouts = Rollouts(np.zeros((R, 4), np.int32), length_B, np.ones(R, bool), np.zeros((R, 4), np.float32))
    reward_R, none_R = np.array(reward, np.float32), np.zeros(R, np.float32)
    return Pool(prompts, np.array(prompt_of), rollouts, reward_R > 0.5, reward_R, none_R, np.array(success, np.float32))


def test_rollouts_by_hand() -> None:
    """Group 0 is all wrong, 1 mixed, 2 all right; a truncated rollout and one that ended at the limit differ."""
    one = pool([0, 1, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 0, 0, 1, 1], [0.5] * 3, [4, 4, 1, 2, 3, 1, 2])
    one.rollouts.ended_B[1] = False
    assert rollout_metrics(one, seconds=0.5) == {
        "reward/mean": pytest.approx(3 / 7),
        "reward/prompt_mean": pytest.approx((0 + 1 / 3 + 1) / 3),
        "reward/right": pytest.approx(3 / 7),
        "reward/mixed_groups": pytest.approx(1 / 3),
        "rollout/length_mean": pytest.approx(17 / 7),
        "rollout/prompt_length_mean": pytest.approx((0 * 2 + 1 * 3 + 2 * 2) / 7),
        "rollout/length_max": 4,
        "rollout/truncated_fraction": pytest.approx(1 / 7),
        "rollout/tokens_per_second": pytest.approx(34.0),
    }


def test_extremes_of_updates_stay_extremes_and_skipped_ones_do_not_count() -> None:
    names = (
        "modulation/comp_max",
        "modulation/stab_min",
        "modulation/comp_mean",
        "objective/loss",
        "objective/grad_norm",
    )
    updates = [(1.5, 0.75, 1.0, 3.0, 1.0), (1.25, 0.5, 1.5, 1.0, 3.0), (9.0, 0.0, 9.0, math.nan, 2.0)]
    updates += [(1.0, 1.0, 1.25, 2.0, 2.0), (9.0, 0.0, 9.0, 1.0, math.inf)]
    told = [dict(zip(names, update, strict=True)) for update in updates]
    assert update_metrics(told) == dict(zip(names, (1.5, 0.5, 1.25, 2.0, 2.0), strict=True))
    assert [not_finite(update) for update in told[2:]] == [["objective/loss"], [], ["objective/grad_norm"]]
    assert math.isnan(update_metrics(told[2:3])["objective/loss"])  # none happened


def test_mixed_groups_go_by_rewards() -> None:
    """Unequal on one side of a half; equal, but for a penalty; equal."""
    graded = pool([0, 1, 2], [0, 0, 1, 1, 2, 2], [0.1, 0.4, 0.9, 0.9, 0.7, 0.7], [0.5] * 3)
    assert rollout_metrics(graded, 1.0)["reward/mixed_groups"] == pytest.approx(1 / 3)
    shaped = graded._replace(penalty_R=np.array([0, 0, 0, -0.5, 0, 0], np.float32))
    assert rollout_metrics(shaped, 1.0)["reward/mixed_groups"] == pytest.approx(2 / 3)
    assert rollout_metrics(shaped, 1.0)["reward/mean"] == rollout_metrics(graded, 1.0)["reward/mean"]


def test_mean_over_prompts_does_not_know_the_allocation() -> None:
    """Prompt 7, always right, got one rollout and then seven; prompt 3, always wrong, the others; prompt 5 got none."""
    for easy in (1, 7):
        one = pool([7, 3, 5], [0] * easy + [1] * (8 - easy), [1] * easy + [0] * (8 - easy), [0.5] * 3)
        assert rollout_metrics(one, 1.0)["reward/prompt_mean"] == 0.5
        assert rollout_metrics(one, 1.0)["reward/mean"] == easy / 8
    twice = pool([7, 3, 7], [0, 1, 2, 2, 2], [1, 0, 0, 0, 0], [0.5] * 3)  # one prompt in two slots is one prompt
    assert rollout_metrics(twice, 1.0)["reward/prompt_mean"] == (1 / 4 + 0) / 2


def test_shares_are_those_of_all_rounds() -> None:
    """The same batch again, another with one of its prompts, and one whose epoch ends within: a prompt twice."""
    first = pool([4, 9, 2], [0, 0, 1, 2], [0] * 4, [0.1, 0.5, 0.9])
    again = first._replace(prompt_of_R=np.array([1, 1, 1]))
    other = pool([9, 7, 7], [0, 0, 1, 2, 2], [0] * 5, [0.5, 0.3, 0.3])
    counts, success = shares([first, again, other])
    assert counts.tolist() == [2, 6, 1, 1, 2]  # prompts 4, 9, 2, 7 and 7
    np.testing.assert_allclose(success, [0.1, 0.5, 0.9, 0.3, 0.3])
    metrics = allocation_metrics(counts, success)
    assert (metrics["allocation/prompts_hard"], metrics["allocation/mean_hard"]) == (3, pytest.approx(5 / 3))
    assert (metrics["allocation/mean_middle"], metrics["allocation/mean_easy"]) == (6, 1)
    np.testing.assert_array_equal(shares([first])[0], [2, 1, 1])


def test_a_prompt_without_rollouts_has_no_share() -> None:
    """The released rule may leave one with nothing."""
    metrics = allocation_metrics(np.array([0, 4, 4]), np.full(3, 0.5))
    assert metrics["allocation/min"] == 0
    assert metrics["allocation/entropy"] == pytest.approx(math.log(2))


def test_padding_is_what_live_micro_batches_hold_beside_tokens() -> None:
    """Rows of 10 slots, two a micro-batch: 33 tokens in two of them and 9 in one make 42 of 60 slots."""
    batches = [MiniBatch(None, live=2, tokens=33), MiniBatch(None, live=1, tokens=9)]
    assert packing_metrics(batches, Shape(4, 2, 10)) == {"update/padding_fraction": pytest.approx(18 / 60)}


def test_drift_is_that_of_before_the_first_update() -> None:
    """Of what was scored then, in all mini-batches; else of the first update's own look. NaN shows."""
    updates = [{"rollout/logp_drift": 0.5}, {"rollout/logp_drift": 9.0}]
    assert logp_drift([], updates) == 0.5
    assert logp_drift([[0.125, 0.25], [0.0]], updates) == 0.25
    assert math.isnan(logp_drift([[0.125], [math.nan]], updates))
