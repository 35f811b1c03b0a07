"""Group-relative advantages over groups of unequal size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ops import segment_max, segment_min, segment_sum

from dynamo_jax.config.choices import Advantage, GroupWeight, check_choice

_STD_EPSILON = 1e-6  # verl's; a group of nearly equal rewards does not blow up


def group_advantage(
    rewards: jax.Array,
    prompt_of: jax.Array,
    num_prompts: int,
    kind: Advantage = "grpo",
    *,
    positive_weight: float = 0.1,
) -> jax.Array:
    """How much better each rollout did than the others of its prompt. With mean, std and n of the rollout's group:

        grpo         (r - mean) / (std + 1e-6), std with n - 1 in the denominator   (GRPO, arXiv 2402.03300; verl)
        dr_grpo      r - mean                                                      (Dr. GRPO, arXiv 2503.20783)
        rloo         r - mean of the other n - 1 rewards                           (RLOO, arXiv 2402.14740)
        w_reinforce  positive_weight if r > 0.5, else -1: no baseline, no group    (W-REINFORCE, arXiv 2506.01347)

    Except for w_reinforce, a group of equal rewards, so also a group of one, gives exactly 0. (The released DynaMO code
    gives the only rollout of a group its raw reward.) Rewards need not be 0 and 1, but w_reinforce reads only on which
    side of 0.5 they are: give it the verdicts, not a reward that a length penalty has moved across.

    Args:
        rewards: float [B].
        prompt_of: int32 [B], the group of each rollout, in any order; groups may be empty. A row outside
            0 .. num_prompts - 1 is padding: no statistic reads it, and its advantage is exactly 0.
        num_prompts: P, a Python int.
        kind: a word of `Advantage`.
        positive_weight: w_reinforce only, what a right rollout counts; a wrong one counts 1.

    Returns:
        float32 [B] (float64 for float64 rewards), without gradient.

    Raises ValueError for another kind, if the shapes differ, or if positive_weight is negative.
    """
    check_choice("group_advantage: kind", kind, Advantage)
    if rewards.shape != prompt_of.shape or rewards.ndim != 1:
        raise ValueError(
            f"group_advantage: rewards have shape {rewards.shape} and prompt_of {prompt_of.shape}; "
            "give one reward and one prompt slot a rollout, both [B]."
        )
    if positive_weight < 0:
        raise ValueError(f"group_advantage: positive_weight = {positive_weight}; it must not be negative.")
    reward_B = lax.stop_gradient(jnp.asarray(rewards, jnp.result_type(rewards, jnp.float32)))
    slot_B, real_B = _slots(prompt_of, num_prompts)
    if kind == "w_reinforce":
        advantage_B = jnp.where(reward_B > 0.5, positive_weight, -1.0).astype(reward_B.dtype)
    else:
        advantage_B = _relative(reward_B, slot_B, num_prompts, kind)
    return jnp.where(real_B, advantage_B, 0.0)


def group_weight(prompt_of: jax.Array, num_prompts: int, kind: GroupWeight) -> jax.Array:
    """What each rollout's loss is multiplied by, when groups are of unequal size:

        rollout  1: a prompt weighs as much as it has rollouts
        prompt   mean group size / n, over groups that are not empty: every prompt weighs the same

    Either way the weights sum to the number of rollouts.

    Args:
        prompt_of: int32 [B], the group of each rollout. A row outside 0 .. num_prompts - 1 is padding and weighs 0.
        num_prompts: P, a Python int.
        kind: a word of `GroupWeight`.

    Returns:
        float32 [B].

    Raises ValueError for another kind.
    """
    check_choice("group_weight: kind", kind, GroupWeight)
    slot_B, real_B = _slots(prompt_of, num_prompts)
    weight_B = real_B.astype(jnp.float32)
    if kind == "rollout":
        return weight_B
    size_P = segment_sum(real_B.astype(jnp.int32), slot_B, num_prompts)
    mean = jnp.sum(size_P) / jnp.maximum(jnp.sum(size_P > 0), 1)
    return weight_B * (mean / jnp.maximum(size_P, 1).astype(jnp.float32))[slot_B]


def _slots(prompt_of: jax.Array, num_prompts: int) -> tuple[jax.Array, jax.Array]:
    """Each row's group, padding moved to `num_prompts`, which segment sums drop; and which rows are not padding."""
    prompt_of = jnp.asarray(prompt_of)
    real_B = (prompt_of >= 0) & (prompt_of < num_prompts)
    return jnp.where(real_B, prompt_of, num_prompts), real_B


def _relative(reward_B: jax.Array, slot_B: jax.Array, num_prompts: int, kind: Advantage) -> jax.Array:
    size_P = segment_sum(jnp.ones_like(reward_B), slot_B, num_prompts)
    mean_P = segment_sum(reward_B, slot_B, num_prompts) / jnp.maximum(size_P, 1.0)
    # The mean of n equal rewards can miss them by a rounding, which std + 1e-6 would magnify: compare, do not subtract.
    equal_P = segment_max(reward_B, slot_B, num_prompts) == segment_min(reward_B, slot_B, num_prompts)
    centred_B = jnp.where(equal_P[slot_B], 0.0, reward_B - mean_P[slot_B])
    if kind == "dr_grpo":
        return centred_B
    others_P = jnp.maximum(size_P - 1.0, 1.0)
    if kind == "rloo":
        return centred_B * (size_P / others_P)[slot_B]
    std_P = jnp.sqrt(segment_sum(jnp.square(centred_B), slot_B, num_prompts) / others_P)
    return centred_B / (std_P[slot_B] + _STD_EPSILON)
