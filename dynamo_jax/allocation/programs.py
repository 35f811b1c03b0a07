"""The programs of allocation: how many rollouts each prompt gets, and what their rewards taught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamo_jax.allocation.allocate import allocate, rows_from_counts, sigma_for
from dynamo_jax.allocation.gvm import gvm_sigma
from dynamo_jax.allocation.knapsack import knapsack
from dynamo_jax.allocation.released import released_allocate, released_priority
from dynamo_jax.allocation.stats import (
    PromptStats,
    discounted,
    init_stats,
    posterior_mean,
    posterior_variance,
    record,
)
from dynamo_jax.allocation.vip import GaussianProcess, fourier_features, init_gp, observe, predict, vip
from dynamo_jax.config import AllocationConfig
from dynamo_jax.sharding import sharding, to_host, to_mesh


class AllocationState(NamedTuple):
    """All that allocation knows: the `stats` of a checkpoint."""

    prompts: PromptStats
    gp: GaussianProcess | None  # `vip` only


class AllocationPrograms:
    """`allocate` and `record` for a run's settings, every array whole on every device; `traces` counts compilations.

        init() -> stats
        allocate(stats, index_P, step) -> counts int32 [P], prompt_of int32 [B], success rates float32 [P]
        record(stats, index_P, prompt_of_B, reward_B, norm_B, step) -> stats

    Success rates are posterior means, with `vip` the Gaussian process's predictions. A rollout of slot P is padding and
    is not recorded; several records of one step add up. `norm_B` is what `gvm_sigma` reads, None for other rules.
    `allocate_program` and `record_program` are the jitted parts of the two: all of them, but that `vip` looks up
    features on the host, and `released` ends there.

    Args:
        config: the rule and its settings.
        num_prompts: N, of the data set.
        budget: B, rollouts of a step.
        mesh: for the shardings.
        features_NF: float [N, F], what `prompt_features` gives; `vip` only.
        advantage: objective.advantage, which `vip` minimises the variance of.

    Raises ValueError if `vip` gets no features, or not N of them.
    """

    def __init__(
        self,
        config: AllocationConfig,
        num_prompts: int,
        budget: int,
        mesh: Mesh,
        *,
        features_NF: np.ndarray | None = None,
        advantage: str = "grpo",
    ) -> None:
        self.traces = {"allocate": 0, "record": 0}
        self._config, self._budget = config, budget
        self._everywhere, self._features_NF = sharding(mesh), features_NF
        if config.rule == "vip":
            _check_features(features_NF, num_prompts)

        def phi(features_PF: jax.Array) -> jax.Array:
            return fourier_features(features_PF, config.vip.fourier, config.vip.length_scale)

        def start() -> AllocationState:
            gp = init_gp(config.vip.fourier) if config.rule == "vip" else None
            return AllocationState(init_stats(num_prompts), gp)

        def plan(
            stats: AllocationState, index_P: jax.Array, step: jax.Array, features_PF: Any
        ) -> tuple[jax.Array, ...]:
            self.traces["allocate"] += 1  # runs once a trace, not once a call
            successes_P, trials_P, norm_P = discounted(stats.prompts, index_P, step, config.half_life)
            success_P = posterior_mean(successes_P, trials_P, config.prior)
            if config.rule == "released":
                return successes_P, trials_P, success_P
            bounds = budget, config.low, config.high
            if config.rule == "knapsack":
                counts_P = knapsack(success_P, *bounds, config.knapsack.value)
            elif config.rule == "gvm":
                sigma_P = gvm_sigma(norm_P, successes_P, success_P, config.gvm.alpha, config.gvm.beta)
                counts_P = allocate(sigma_P, *bounds)
            elif stats.gp is not None:
                success_P = predict(stats.gp, phi(features_PF), step, config)
                counts_P = vip(success_P, *bounds, advantage)
            elif config.rule == "reinforce_ada":
                counts_P = first_round(index_P.shape[0], budget)
            else:
                variance_P = posterior_variance(successes_P, trials_P, config.prior)
                counts_P = allocate(sigma_for(config.rule, variance_P), *bounds)
            return counts_P, rows_from_counts(counts_P, budget), success_P

        def learn(
            stats: AllocationState,
            index_P: jax.Array,
            prompt_of_B: jax.Array,
            reward_B: jax.Array,
            norm_B: jax.Array | None,
            step: jax.Array,
            features_PF: Any,
        ) -> AllocationState:
            self.traces["record"] += 1
            if config.rule == "gvm" and norm_B is None:
                raise ValueError("record: norm_B = None; rule gvm needs the gradient size of each rollout.")
            prompts = record(stats.prompts, index_P, prompt_of_B, reward_B, step, config.half_life, norm_B)
            if stats.gp is None:
                return AllocationState(prompts, None)
            none_P = jnp.zeros(index_P.shape[0], jnp.float32)
            trials_P = none_P.at[prompt_of_B].add(1.0, mode="drop")
            right_P = none_P.at[prompt_of_B].add(reward_B > 0.5, mode="drop")
            gp = observe(stats.gp, phi(features_PF), right_P, trials_P, step, config)
            return AllocationState(prompts, gp)

        self.abstract_stats = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere), jax.eval_shape(start)
        )
        self.init: Callable[[], AllocationState] = jax.jit(start, out_shardings=self._everywhere)
        self.allocate_program: Callable[..., Any] = jax.jit(plan, out_shardings=self._everywhere)
        self.record_program: Callable[..., AllocationState] = jax.jit(learn, out_shardings=self._everywhere)

    def allocate(self, stats: AllocationState, index_P: np.ndarray, step: int) -> tuple[jax.Array, ...]:
        planned: tuple[jax.Array, ...] = self.allocate_program(stats, index_P, step, self._features(index_P))
        return self._released(*planned) if self._config.rule == "released" else planned

    def record(
        self,
        stats: AllocationState,
        index_P: np.ndarray,
        prompt_of_B: np.ndarray,
        reward_B: np.ndarray,
        norm_B: np.ndarray | None,
        step: int,
    ) -> AllocationState:
        features_PF = self._features(index_P)
        return self.record_program(stats, index_P, prompt_of_B, reward_B, norm_B, step, features_PF)

    def _features(self, index_P: np.ndarray) -> np.ndarray | None:
        return None if self._features_NF is None else self._features_NF[np.asarray(index_P)]

    def _released(self, *planned: jax.Array) -> tuple[jax.Array, ...]:
        c = self._config.released
        successes_P, trials_P, success_P = to_host(planned)
        # Whole again, if a long half-life has taken a millionth.
        successes_P, trials_P = np.rint(successes_P), np.rint(trials_P)
        priority_P = released_priority(successes_P, trials_P, c.mastery, c.floor, c.minimum_samples)
        bounds = self._config.low, self._config.high
        counts_P = released_allocate(trials_P, priority_P, self._budget, *bounds, c.initial_budget).astype(np.int32)
        prompt_of_B = np.repeat(np.arange(len(counts_P), dtype=np.int32), counts_P)
        return to_mesh((counts_P, prompt_of_B, success_P), self._everywhere)


def first_round(P: int, budget: int) -> jax.Array:
    """int32 [P], budget / P each: the first round of `reinforce_ada`. Raises ValueError if P does not divide budget."""
    if budget % P:
        raise ValueError(f"first_round: budget = {budget} is not a multiple of {P} prompts. Choose a multiple.")
    return jnp.full(P, budget // P, jnp.int32)


def _check_features(features_NF: np.ndarray | None, num_prompts: int) -> None:
    if features_NF is None or len(features_NF) != num_prompts:
        shape = None if features_NF is None else features_NF.shape
        raise ValueError(
            f"AllocationPrograms: features_NF has shape {shape}; rule vip needs features of all {num_prompts} prompts. "
            "Pass prompt_features(...)."
        )
