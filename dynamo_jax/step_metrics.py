"""What a step tells about its allocation, rollouts and updates, from host arrays. Names as in `metrics.jsonl`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamo_jax.batch import Pool
from dynamo_jax.config import Config
from dynamo_jax.rounds import mixed_groups
from dynamo_jax.update import MiniBatch
from dynamo_jax.update.packing import Shape

log = logging.getLogger("dynamo_jax")

# Posterior mean success rates that divide prompts into hard, middle and easy ones.
HARD, EASY = 1 / 3, 2 / 3


def shares(sampled: Sequence[Pool]) -> tuple[np.ndarray, np.ndarray]:
    """What each prompt got in all rounds of a step: rollouts, int, and its success rate before the step, float.

    A prompt drawn by several rounds is one, and has the sum. One that a batch holds twice, where an epoch ends, is two:
    that is how it was allocated.
    """
    counts: dict[tuple[int, int], int] = {}
    success: dict[tuple[int, int], float] = {}
    for one in sampled:
        seen: Counter[int] = Counter()
        of_slot = np.bincount(one.prompt_of_R, minlength=len(one.prompts.ids))
        for index, n, rate in zip(one.prompts.index_P.tolist(), of_slot.tolist(), one.success_P.tolist(), strict=True):
            prompt = index, seen[index]
            seen[index] += 1
            counts[prompt] = counts.get(prompt, 0) + n
            success[prompt] = rate
    return np.array(list(counts.values())), np.array(list(success.values()), np.float32)


def allocation_metrics(counts_P: np.ndarray, success_P: np.ndarray) -> dict[str, float]:
    """How rollouts were shared: extremes, entropy of the shares (nats), and how many prompts of each kind got.

    `success_P` is each prompt's posterior mean success rate before the step. `allocation/mean_<kind>` is the mean
    rollouts of a prompt of that kind, 0 if the step had none.
    """
    share_P = counts_P[counts_P > 0] / counts_P.sum()  # 0 log 0 = 0
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
    """Rewards, lengths in tokens, and sampled tokens per second of sampling, of all that was sampled.

    `reward/mean` weighs a prompt by its rollouts, so that an allocation which starves hard prompts raises it;
    `reward/prompt_mean` weighs every prompt that has rollouts alike.
    """
    rollouts = pool.rollouts
    _, prompt_of_R = np.unique(pool.prompts.index_P[pool.prompt_of_R], return_inverse=True)
    return {
        "reward/mean": float(pool.reward_R.mean()),
        "reward/prompt_mean": float(
            np.mean(np.bincount(prompt_of_R, weights=pool.reward_R) / np.bincount(prompt_of_R))
        ),
        "reward/right": float(pool.right_R.mean()),
        "reward/mixed_groups": float(mixed_groups(pool).mean()),  # the share that has a gradient
        "rollout/length_mean": float(rollouts.length_B.mean()),
        "rollout/prompt_length_mean": float(pool.prompts.length_P[pool.prompt_of_R].mean()),
        "rollout/length_max": int(rollouts.length_B.max()),
        "rollout/truncated_fraction": float(1 - np.asarray(rollouts.ended_B).mean()),
        "rollout/tokens_per_second": float(rollouts.length_B.sum() / seconds),
    }


def update_metrics(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A step's metrics from those of its updates: extremes of what ends in `_max` or `_min`, means of all else.

    Updates that were skipped do not count, unless all were: then what is not finite shows.
    """
    combine = {"max": np.max, "min": np.min}
    counted = [update for update in updates if not not_finite(update)] or updates
    return {
        name: float(combine.get(name.rpartition("_")[2], np.mean)([update[name] for update in counted]))
        for name in updates[0]
    }


def packing_metrics(batches: Sequence[MiniBatch], shape: Shape) -> dict[str, float]:
    """The share of computed slots that hold no token, in all updates of the step."""
    slots = sum(batch.live for batch in batches) * shape.rows * shape.slots
    return {"update/padding_fraction": 1 - sum(batch.tokens for batch in batches) / slots}


def logp_drift(scored: Sequence[Sequence[float]], updates: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference between a token's log-prob as sampled and before the step's first update, nats.

    Over the micro-batches of all that was `scored` then, else over what the first update has looked at.
    """
    before = [drift for of_batch in scored for drift in of_batch] or [updates[0]["rollout/logp_drift"]]
    return float(np.max(before))


def skipped_updates(step: int, updates: Sequence[Mapping[str, Any]]) -> int:
    """How many of the step's updates were skipped, each with a warning that names the metric and the step."""
    for number, update in enumerate(updates, 1):
        for name in not_finite(update):
            log.warning("step %d, update %d: %s is %s; the update is skipped", step, number, name, update[name])
    return sum(bool(not_finite(update)) for update in updates)


def not_finite(update: Mapping[str, Any]) -> list[str]:
    """Why an update with these metrics was skipped; nothing if it changed the policy."""
    return [name for name in ("objective/loss", "objective/grad_norm") if not np.isfinite(update[name])]


def shaping_metrics(config: Config, pool: Pool) -> dict[str, float]:
    """The mean of what over-long rollouts lose, where they lose anything."""
    return {"reward/overlong_penalty": float(pool.penalty_R.mean())} if config.objective.overlong.enabled else {}
