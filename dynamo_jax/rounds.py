"""The rounds in which a step samples, and which of its rollouts are trained on. On the host.

Most methods sample once and train on everything. Two sample again, up to a limit:

    dynamic sampling  (DAPO, arXiv 2503.14476): groups whose rewards are all equal are dropped, and other prompts are
                      drawn until the kept groups fill the batch.
    reinforce_ada     (arXiv 2510.04996): prompts without enough right and wrong answers are sampled again; then each
                      prompt keeps `rollout.per_prompt` of its rollouts, half right and half wrong where there are such.

Advantages are those of the whole group, dropped rollouts included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from dynamo_jax.allocation.reinforce_ada import balanced_choice, satisfied
from dynamo_jax.batch import Pool, PromptBatch
from dynamo_jax.config import Config
from dynamo_jax.rollout.sampler import join

EMPTY = -1  # a row of the training batch without a rollout


class Draw(NamedTuple):
    """What one round is to sample: a rollout for each entry of `prompt_of_R`."""

    prompts: PromptBatch
    prompt_of_R: np.ndarray  # int, slot in `prompts`, nondecreasing
    success_P: np.ndarray  # float32, success rates as known before the step


class Once:
    """One round, all of it trained on. The other two forms change what their methods are named for.

    `slots` and `capacity`: prompt slots and rollouts that the rounds of a step can have at most.
    """

    def __init__(self, config: Config, max_rounds: int = 1) -> None:
        self.per_prompt, self.budget = config.rollout.per_prompt, config.rollout.budget
        self.max_rounds, self.slots, self.capacity = max_rounds, config.rollout.prompts, self.budget * max_rounds

    def next(self, sampled: Sequence[Pool], draw: Callable[[], Draw]) -> Draw | None:
        """What to sample after the rounds in `sampled`, None if that was enough. `draw` takes new prompts."""
        if not sampled:
            return draw()
        return self.again(sampled, draw) if len(sampled) < self.max_rounds else None

    def again(self, sampled: Sequence[Pool], draw: Callable[[], Draw]) -> Draw | None:
        """`next`, after the first round and below the limit."""
        return None

    def trained_rows(self, pool: Pool, rng: np.random.Generator) -> np.ndarray:
        """int [B]: rows of the pool that are trained on, those of a group together; EMPTY where there are too few."""
        return np.arange(self.budget)

    def padded(self, reward_R: np.ndarray, prompt_of_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Filled up to the capacity, so that one compiled program serves any number of rounds.

        The filling belongs to the prompt slot after the last one, which group statistics leave out.
        """
        room = (0, self.capacity - len(reward_R))
        return np.pad(reward_R, room), np.pad(prompt_of_R, room, constant_values=self.slots).astype(np.int32)

    def metrics(self, sampled: Sequence[Pool], pool: Pool, rows_B: np.ndarray) -> dict[str, float]:
        """What sampling in rounds cost and found; nothing for a method that samples once."""
        if self.max_rounds == 1:
            return {}
        return {
            "rollout/rounds": len(sampled),
            "rollout/sampled": len(pool.reward_R),
            "rollout/mixed_groups": int(mixed_groups(pool).sum()),
            "rollout/empty_rows": int((rows_B == EMPTY).sum()),
        }


class DynamicSampling(Once):
    """New prompts, until the groups of unequal rewards fill the batch.

    DAPO drops groups that are all right or all wrong: where rewards are verdicts, the same. Where they are graded, or
    told apart by a penalty on length, only groups of equal rewards have no advantage and teach nothing. What is dropped
    does not depend on the kind of advantage: `w_reinforce` would learn from equal groups too, but whoever switches
    dynamic sampling on asks for prompts that are neither solved nor hopeless.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config, 1 + config.rollout.dynamic_sampling.max_refills)
        self.slots *= self.max_rounds

    def again(self, sampled: Sequence[Pool], draw: Callable[[], Draw]) -> Draw | None:
        pool = merged(sampled)
        return draw() if np.sum(mixed_groups(pool)[pool.prompt_of_R]) < self.budget else None

    def trained_rows(self, pool: Pool, rng: np.random.Generator) -> np.ndarray:
        kept: list[np.ndarray] = []
        room = self.budget
        for p in np.flatnonzero(mixed_groups(pool)):
            rows = np.flatnonzero(pool.prompt_of_R == p)
            if len(rows) <= room:  # groups stay whole; a smaller one may still fit
                kept.append(rows)
                room -= len(rows)
        return np.concatenate([*kept, np.full(room, EMPTY)])


class ReinforceAda(Once):
    """The same prompts, those of them that lack right or wrong answers, `per_prompt` more rollouts each."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.allocation.reinforce_ada.max_rounds)

    def again(self, sampled: Sequence[Pool], draw: Callable[[], Draw]) -> Draw | None:
        pool = merged(sampled)
        right_P = np.bincount(pool.prompt_of_R[pool.right_R], minlength=self.slots)
        wrong_P = np.bincount(pool.prompt_of_R[~pool.right_R], minlength=self.slots)
        lacking = np.flatnonzero(~satisfied(right_P, wrong_P, self.per_prompt))
        if not len(lacking):
            return None
        return Draw(sampled[0].prompts, np.repeat(lacking, self.per_prompt), sampled[0].success_P)

    def trained_rows(self, pool: Pool, rng: np.random.Generator) -> np.ndarray:
        return balanced_choice(pool.right_R, pool.prompt_of_R, self.slots, self.per_prompt, rng)


def make_rounds(config: Config) -> Once:
    """The form that the config's method samples in."""
    if config.rollout.dynamic_sampling.enabled:
        return DynamicSampling(config)
    return ReinforceAda(config) if config.allocation.rule == "reinforce_ada" else Once(config)


def merged(sampled: Sequence[Pool]) -> Pool:
    """All rounds as one pool. A round of the very batch of an earlier one shares its slots, any other adds its own."""
    if len(sampled) == 1:
        return sampled[0]
    batches: list[Pool] = []  # the first round of each batch of prompts
    for one in sampled:
        if not any(one.prompts is other.prompts for other in batches):
            batches.append(one)
    first = {id(one.prompts): sum(len(before.prompts.ids) for before in batches[:i]) for i, one in enumerate(batches)}
    *arrays, ids, texts, answers = zip(*(one.prompts for one in batches), strict=True)
    index, tokens, lengths = (np.concatenate(x) for x in arrays)
    return Pool(
        PromptBatch(index, tokens, lengths, *(tuple(chain(*names)) for names in (ids, texts, answers))),
        np.concatenate([one.prompt_of_R + first[id(one.prompts)] for one in sampled]),
        join([one.rollouts for one in sampled]),
        np.concatenate([one.right_R for one in sampled]),
        np.concatenate([one.reward_R for one in sampled]),
        np.concatenate([one.penalty_R for one in sampled]),
        np.concatenate([one.success_P for one in batches]),
    )


def mixed_groups(pool: Pool) -> np.ndarray:
    """bool [slots]: groups whose rewards, as advantages read them, are not all equal.

    The advantages of the others are 0, but for `w_reinforce`, which has no baseline.
    """
    low = np.full(len(pool.prompts.ids), np.inf, np.float32)
    high = -low
    np.minimum.at(low, pool.prompt_of_R, pool.shaped_R)
    np.maximum.at(high, pool.prompt_of_R, pool.shaped_R)
    return low < high
