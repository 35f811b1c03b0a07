"""The allocation of the authors' released code, reproduced with its flaws, to compare against. Numpy, on the host.

Source of the facts: GithubX-F/DynaMO-RL, `get_rollout_n_per_prompt` in recipe/dynamo/dynamo_ray_trainer.py and
`update_rank` in verl/utils/dataset/rl_dataset.py. Where their code leaves ties to numpy's unstable sort, the lowest
index wins here.
"""

from __future__ import annotations

import numpy as np

from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.config import AllocationConfig

_ELIGIBLE = 1e-8  # priorities up to this get nothing while others can take more


def released_rule(known: Known, terms: Terms, config: AllocationConfig) -> np.ndarray:
    """`released_allocate` by `released_priority`, of host arrays: the shares are proportions in float64."""
    r = config.released
    # Whole again, if a long half-life has taken a millionth.
    successes_P, trials_P = np.rint(known.successes_P), np.rint(known.trials_P)
    priority_P = released_priority(successes_P, trials_P, r.mastery, r.floor, r.minimum_samples)
    return released_allocate(trials_P, priority_P, *terms.bounds, r.initial_budget).astype(np.int32)


def released_allocate(
    sample_count: np.ndarray, priority: np.ndarray, total: int, low: int, high: int, initial_budget: int
) -> np.ndarray:
    """How the released code shares `total` rollouts among P prompts.

    `total` is clipped to [P * low, P * high]. Prompts with fewer than max(low, initial_budget) samples first get what
    they lack; then every prompt is filled up to `low`; the rest goes out in proportion to priority, rounded by largest
    remainder and cut at `high`, again and again until nothing is left.

    What is wrong with it:
        - Exploration comes first: when it takes the whole budget, prompts end below `low`, even with no rollout.
        - If exploration does not fit, it is scaled down, and rounding takes from the largest one by one.
        - Prompts whose priority is 0 or -1 (not yet judged) get a share of the rest only when no other can take more;
          it is dealt one each in turn, without looking at `high`, so that some end above it.
        - Priorities matter only relative to each other: at the start of a run, the few judged ones take all.
        - n in proportion to the variance is not what minimises it (see `sigma_for`), and the cut at `high` is repeated
          proportional filling, not an optimum.

    Args:
        sample_count: int [P], rollouts that each prompt has had so far.
        priority: float [P], see `released_priority`.
        total: rollouts to share out.
        low, high: bounds, kept only mostly; a negative low counts as 0.
        initial_budget: see above.

    Returns:
        int64 [P] with the clipped total as its sum.
    """
    P = len(sample_count)
    low = max(0, low)
    high = max(low, high)
    total = int(np.clip(total, P * low, P * high))
    counts, left = _explore(np.asarray(sample_count), total, low, high, max(low, initial_budget))

    missing = np.maximum(low - counts, 0)
    if missing.sum() > left:
        missing = (missing * (left / missing.sum())).astype(np.int64)
    counts += missing
    left -= int(missing.sum())

    while left > 0:
        open_to = np.flatnonzero((counts < high) & (priority > _ELIGIBLE))
        if not len(open_to):
            in_turn = np.flatnonzero(counts < high)
            counts += np.bincount(in_turn[np.arange(left) % len(in_turn)], minlength=P)
            break
        share = left * (priority[open_to] / priority[open_to].sum())
        added = np.floor(share).astype(np.int64)
        by_remainder = np.argsort(-(share - added), kind="stable")
        added[by_remainder[: left - int(added.sum())]] += 1
        added = np.minimum(added, high - counts[open_to])
        counts[open_to] += added
        left -= int(added.sum())
    return counts


def released_priority(
    successes: np.ndarray, trials: np.ndarray, mastery: float = 0.85, floor: float = 0.01, minimum_samples: int = 4
) -> np.ndarray:
    """The released code's priority of prompts with k successes in G trials, counted over the whole run:

        -1                                                       if G < minimum_samples
        floor                                                    if k / G >= mastery
        max(k (G - k) / (G (G - 1)) + 1e-6 (1 - k / G), floor)   otherwise

    What is wrong with it: counts never fade, so that late in a run a priority hardly moves; a prompt that was never
    solved is at the floor like one that always is; the code refreshes priorities once an epoch only, and its counts
    mix prompts up (they are read through one order of the batch and rewards through another). The last two are not
    reproduced: the caller decides when, and with which counts.

    Args:
        successes, trials: int or float [P].
        mastery, floor, minimum_samples: see above; minimum_samples at least 2.

    Returns:
        float64 [P].
    """
    k, G = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    judged = np.maximum(G, 2)  # the others' values are not used; this only keeps them finite
    rate = k / judged
    variance = k * (G - k) / (judged * (judged - 1))
    priority = np.where(rate >= mastery, floor, np.maximum(variance + (1.0 - rate) * 1e-6, floor))
    return np.where(minimum_samples > G, -1.0, priority)


def _explore(sample_count: np.ndarray, total: int, low: int, high: int, initial: int) -> tuple[np.ndarray, int]:
    """What prompts with fewer than `initial` samples get first, and what that leaves."""
    wanted = np.clip(initial - sample_count, 0, high).astype(np.int64)
    if wanted.sum() > total:
        wanted = np.maximum((wanted * (total / wanted.sum())).astype(np.int64), low)
        while wanted.sum() > total:
            wanted[np.argmax(wanted)] -= 1
    return wanted, total - int(wanted.sum())
