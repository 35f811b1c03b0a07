"""What a rule of allocation is: what it is told of a step's prompts, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamo_jax.config import AllocationConfig


class Known(NamedTuple):
    """What is known of a step's P prompts; float32 [P] each, past results counted less the older they are."""

    successes_P: jax.Array
    trials_P: jax.Array
    norm_P: jax.Array  # sum of the gradient sizes of right rollouts, 0 unless the rule measures them
    success_P: jax.Array  # expected success rate: posterior mean, or what a Gaussian process over features predicts


class Terms(NamedTuple):
    """What a step's counts must keep to, and the estimator that they serve."""

    budget: int  # B, their sum
    low: int
    high: int
    advantage: str  # objective.advantage

    @property
    def bounds(self) -> tuple[int, int, int]:
        return self.budget, self.low, self.high


class Allocation(NamedTuple):
    """A step's rollouts, shared among its prompts."""

    counts_P: jax.Array  # int32, sums to B
    prompt_of_B: jax.Array  # int32, the slot of each rollout, nondecreasing
    success_P: jax.Array  # float32, as in `Known`


class Rule(NamedTuple):
    """A rule: a pure function from `Known`, `Terms` and its settings to int32 [P], and what it needs of the run."""

    counts: Callable[[Known, Terms, AllocationConfig], Any]
    on_host: bool = False  # takes and returns numpy arrays; otherwise it is traced, once
    features: bool = False  # success rates come from a Gaussian process over the prompts' features
    gradient_size: Callable[[np.ndarray], np.ndarray] | None = None  # of rollouts with log-probs [R, C]; None: not read
