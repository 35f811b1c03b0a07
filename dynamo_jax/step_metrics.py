"""What a step tells about its allocation, rollouts and updates, from host arrays. Names as in `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamo_jax.batch import Pool

# Posterior mean success rates that divide prompts into hard, middle and easy ones.
HARD, EASY = 1 / 3, 2 / 3


def allocation_metrics(counts_P: np.ndarray, success_P: np.ndarray) -> dict[str, float]:
    """How B rollouts were shared: extremes, entropy of the shares (nats), and how many prompts of each kind got.

    `success_P` is each prompt's posterior mean success rate before the step. `allocation/mean_<kind>` is the mean
    rollouts of a prompt of that kind, 0 if the step had none.
    """
    share_P = counts_P / counts_P.sum()
    metrics = {
        "allocation/min": int(counts_P.min()),
        "allocation/max": int(counts_P.max()),
        "allocation/entropy": float(-np.sum(share_P * np.log(share_P))),
    }
    kinds = {"hard": success_P < HARD, "easy": success_P > EASY}
    kinds["middle"] = ~kinds["hard"] & ~kinds["easy"]
    for name, of_kind_P in kinds.items():
        metrics[f"allocation/prompts_{name}"] = int(of_kind_P.sum())
        metrics[f"allocation/mean_{name}"] = float(counts_P[of_kind_P].mean()) if of_kind_P.any() else 0.0
    return metrics


def rollout_metrics(pool: Pool, seconds: float) -> dict[str, float]:
    """Rewards, lengths in tokens, and sampled tokens per second of sampling, of all that was sampled."""
    rollouts, counts = pool.rollouts, np.bincount(pool.prompt_of_R, minlength=len(pool.prompts.ids))
    right = np.bincount(pool.prompt_of_R, weights=pool.right_R, minlength=len(pool.prompts.ids))
    return {
        "reward/mean": float(pool.reward_R.mean()),
        "reward/right": float(pool.right_R.mean()),
        # Only groups with right and wrong answers have a gradient.
        "reward/mixed_groups": float(np.mean((right > 0) & (right < counts))),
        "rollout/length_mean": float(rollouts.length_B.mean()),
        "rollout/length_max": int(rollouts.length_B.max()),
        "rollout/truncated_fraction": float(1 - np.asarray(rollouts.ended_B).mean()),
        "rollout/tokens_per_second": float(rollouts.length_B.sum() / seconds),
    }


def update_metrics(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A step's metrics from those of its updates: extremes of what ends in `_max` or `_min`, means of all else."""
    combine = {"max": np.max, "min": np.min}
    return {
        name: float(combine.get(name.rpartition("_")[2], np.mean)([update[name] for update in updates]))
        for name in updates[0]
    }
