"""Reinforce-Ada (arXiv 2510.04996, its balanced variant): sample in rounds until a prompt has right and wrong answers.

`rounds.py` samples; here is how it begins, when a prompt is done, and which of its rollouts are trained on. All but the
first is numpy, on the host.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.allocation.rule import Known, Terms
from dynamo_jax.config import AllocationConfig


def first_round(known: Known, terms: Terms, config: AllocationConfig) -> jax.Array:
    """int32 [P], budget / P each, whatever is known. Raises ValueError if P does not divide the budget."""
    P = known.success_P.shape[0]
    if terms.budget % P:
        raise ValueError(f"first_round: budget = {terms.budget} is not a multiple of {P} prompts. Choose a multiple.")
    return jnp.full(P, terms.budget // P, jnp.int32)


def satisfied(right_P: np.ndarray, wrong_P: np.ndarray, target: int) -> np.ndarray:
    """bool [P]: at least target // 2 right and target - target // 2 wrong rollouts: no further round is needed."""
    right = target // 2
    return (np.asarray(right_P) >= right) & (np.asarray(wrong_P) >= target - right)


def balanced_choice(
    reward_R: np.ndarray, prompt_of_R: np.ndarray, num_prompts: int, per_prompt: int, rng: np.random.Generator
) -> np.ndarray:
    """`per_prompt` rollouts of each prompt: per_prompt // 2 right and the others wrong, as far as the pool has them.

    What one kind lacks, the other fills up. Which ones are taken, the generator decides.

    Args:
        reward_R: float [R], the pool of all rounds; above 0.5 is right.
        prompt_of_R: int [R], the slot of each rollout, in any order; num_prompts or more: padding, never chosen.
        num_prompts: P.
        per_prompt: rollouts of each prompt to choose.
        rng: is advanced.

    Returns:
        int64 [P * per_prompt], different rows of the pool, those of a prompt together, prompts in order.

    Raises ValueError if a prompt has fewer than `per_prompt` rollouts.
    """
    shuffled_R = rng.permutation(len(reward_R))
    right_R = reward_R[shuffled_R] > 0.5
    chosen = []
    for p in range(num_prompts):
        of_p_R = prompt_of_R[shuffled_R] == p
        right, wrong = shuffled_R[of_p_R & right_R], shuffled_R[of_p_R & ~right_R]
        if len(right) + len(wrong) < per_prompt:
            raise ValueError(
                f"balanced_choice: prompt {p} has {len(right) + len(wrong)} rollouts in the pool, per_prompt = "
                f"{per_prompt} are asked for. Sample at least that many in the first round."
            )
        number = min(len(right), max(per_prompt // 2, per_prompt - len(wrong)))
        chosen += [right[:number], wrong[: per_prompt - number]]
    return np.concatenate(chosen)
