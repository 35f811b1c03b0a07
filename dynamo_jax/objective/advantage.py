"""Group-relative advantages over groups of unequal size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ops import segment_max, segment_min, segment_sum

KINDS = ("grpo", "dr_grpo", "rloo")

_STD_EPSILON = 1e-6  # verl's; a group of nearly equal rewards does not blow up


def group_advantage(rewards: jax.Array, prompt_of: jax.Array, num_prompts: int, kind: str = "grpo") -> jax.Array:
    """How much better each rollout did than the others of its prompt. With mean, std and n of the rollout's group:

        grpo     (r - mean) / (std + 1e-6), std with n - 1 in the denominator   (GRPO, arXiv 2402.03300; verl)
        dr_grpo  r - mean                                                      (Dr. GRPO, arXiv 2503.20783)
        rloo     r - mean of the other n - 1 rewards                           (RLOO, arXiv 2402.14740)

    A group of equal rewards, so also a group of one, gives exactly 0. (The released DynaMO code gives the only rollout
    of a group its raw reward.)

    Args:
        rewards: float [B].
        prompt_of: int32 [B], the group of each rollout, in any order; groups may be empty.
        num_prompts: P, a Python int.
        kind: one of KINDS.

    Returns:
        float32 [B] (float64 for float64 rewards), without gradient.

    Raises ValueError for another kind, or if the shapes differ.
    """
    if kind not in KINDS:
        raise ValueError(f"group_advantage: kind = {kind!r}; choose one of {', '.join(KINDS)}.")
    if rewards.shape != prompt_of.shape or rewards.ndim != 1:
        raise ValueError(
            f"group_advantage: rewards have shape {rewards.shape} and prompt_of {prompt_of.shape}; "
            "give one reward and one prompt slot a rollout, both [B]."
        )
    reward_B = lax.stop_gradient(jnp.asarray(rewards, jnp.result_type(rewards, jnp.float32)))
    size_P = segment_sum(jnp.ones_like(reward_B), prompt_of, num_prompts)
    mean_P = segment_sum(reward_B, prompt_of, num_prompts) / jnp.maximum(size_P, 1.0)
    # The mean of n equal rewards can miss them by a rounding, which std + 1e-6 would magnify: compare, do not subtract.
    equal_P = segment_max(reward_B, prompt_of, num_prompts) == segment_min(reward_B, prompt_of, num_prompts)
    centred_B = jnp.where(equal_P[prompt_of], 0.0, reward_B - mean_P[prompt_of])
    if kind == "dr_grpo":
        return centred_B
    others_P = jnp.maximum(size_P - 1.0, 1.0)
    if kind == "rloo":
        return centred_B * (size_P / others_P)[prompt_of]
    std_P = jnp.sqrt(segment_sum(jnp.square(centred_B), prompt_of, num_prompts) / others_P)
    return centred_B / (std_P[prompt_of] + _STD_EPSILON)
