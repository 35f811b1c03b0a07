"""Reinforce-Ada (arXiv 2510.04996, its balanced variant): sample in rounds until a prompt has right and wrong answers.

The trainer samples; here is when a prompt is done, and which of its rollouts are trained on. Numpy, on the host.
"""

from __future__ import annotations

import numpy as np


def satisfied(right_P: np.ndarray, wrong_P: np.ndarray, target: int) -> np.ndarray:
    """bool [P]: at least target // 2 right and target - target // 2 wrong rollouts: no further round is needed."""
    right = target // 2
    return (np.asarray(right_P) >= right) & (np.asarray(wrong_P) >= target - right)


def balanced_choice(
    reward_K: np.ndarray, prompt_of_K: np.ndarray, num_prompts: int, per_prompt: int, rng: np.random.Generator
) -> np.ndarray:
    """`per_prompt` rollouts of each prompt: per_prompt // 2 right and the others wrong, as far as the pool has them.

    What one kind lacks, the other fills up. Which ones are taken, the generator decides.

    Args:
        reward_K: float [K], the pool of all rounds; above 0.5 is right.
        prompt_of_K: int [K], the slot of each rollout, in any order; num_prompts or more: padding, never chosen.
        num_prompts: P.
        per_prompt: rollouts of each prompt to choose.
        rng: is advanced.

    Returns:
        int64 [P * per_prompt], different rows of the pool, those of a prompt together, prompts in order.

    Raises ValueError if a prompt has fewer than `per_prompt` rollouts.
    """
    shuffled_K = rng.permutation(len(reward_K))
    right_K = reward_K[shuffled_K] > 0.5
    chosen = []
    for p in range(num_prompts):
        of_p_K = prompt_of_K[shuffled_K] == p
        right, wrong = shuffled_K[of_p_K & right_K], shuffled_K[of_p_K & ~right_K]
        if len(right) + len(wrong) < per_prompt:
            raise ValueError(
                f"balanced_choice: prompt {p} has {len(right) + len(wrong)} rollouts in the pool, per_prompt = "
                f"{per_prompt} are asked for. Sample at least that many in the first round."
            )
        number = min(len(right), max(per_prompt // 2, per_prompt - len(wrong)))
        chosen += [right[:number], wrong[: per_prompt - number]]
    return np.concatenate(chosen)
