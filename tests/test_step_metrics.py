"""What a step tells about its allocation, rollouts and updates, by hand."""

import math

import numpy as np
import pytest

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.step_metrics import allocation_metrics, rollout_metrics, update_metrics


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


def test_rollouts_by_hand() -> None:
    """Group 0 is all wrong, 1 mixed, 2 all right; a truncated rollout and one that ended at the limit differ."""
    rollouts = Rollouts(
        tokens_BC=np.zeros((7, 4), np.int32),
        length_B=np.array([4, 4, 1, 2, 3, 1, 2], np.int32),
        ended_B=np.array([True, False, True, True, True, True, True]),
        logp_BC=np.zeros((7, 4), np.float32),
    )
    reward_B = np.array([0, 0, 1, 0, 0, 1, 1], np.float32)
    prompt_of_B = np.array([0, 0, 1, 1, 1, 2, 2])
    slots, names = np.arange(3), ("a", "b", "c")
    prompts = PromptBatch(slots, slots[:, None], slots, names, names, names)
    metrics = rollout_metrics(Pool(prompts, prompt_of_B, rollouts, reward_B > 0.5, reward_B), seconds=0.5)
    assert metrics == {
        "reward/mean": pytest.approx(3 / 7),
        "reward/right": pytest.approx(3 / 7),
        "reward/mixed_groups": pytest.approx(1 / 3),
        "rollout/length_mean": pytest.approx(17 / 7),
        "rollout/length_max": 4,
        "rollout/truncated_fraction": pytest.approx(1 / 7),
        "rollout/tokens_per_second": pytest.approx(34.0),
    }


def test_extremes_of_updates_stay_extremes() -> None:
    names = ("modulation/comp_max", "modulation/stab_min", "modulation/comp_mean", "objective/maximum")
    updates = [(1.5, 0.75, 1.0, 3.0), (1.25, 0.5, 1.5, 1.0), (1.0, 1.0, 1.25, 2.0)]
    step = update_metrics([dict(zip(names, update, strict=True)) for update in updates])
    assert step == dict(zip(names, (1.5, 0.5, 1.25, 2.0), strict=True))
