"""The two jitted programs of allocation: how many rollouts each prompt gets, and what their rewards taught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dynamo_jax.allocation.allocate import allocate, rows_from_counts, sigma_for
from dynamo_jax.allocation.stats import PromptStats, discounted, init_stats, posterior_variance, record
from dynamo_jax.config import AllocationConfig
from dynamo_jax.sharding import sharding


class AllocationPrograms:
    """`allocate` and `record` for a run's settings, every array whole on every device; `traces` counts compilations."""

    def __init__(self, config: AllocationConfig, num_prompts: int, budget: int, mesh: Mesh) -> None:
        self.traces = {"allocate": 0, "record": 0}
        everywhere = sharding(mesh)
        shapes = jax.eval_shape(lambda: init_stats(num_prompts))
        self.abstract_stats = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        )

        def plan(stats: PromptStats, index_P: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            self.traces["allocate"] += 1  # runs once a trace, not once a call
            successes_P, trials_P = discounted(stats, index_P, step, config.half_life)
            variance_P = posterior_variance(successes_P, trials_P, config.prior)
            counts_P = allocate(sigma_for(config.rule, variance_P), budget, config.low, config.high)
            a, b = config.prior
            return counts_P, rows_from_counts(counts_P, budget), (successes_P + a) / (trials_P + a + b)

        def learn(
            stats: PromptStats, index_P: jax.Array, prompt_of_B: jax.Array, reward_B: jax.Array, step: jax.Array
        ) -> PromptStats:
            self.traces["record"] += 1
            return record(stats, index_P, prompt_of_B, reward_B, step, config.half_life)

        self.init: Callable[[], PromptStats] = jax.jit(lambda: init_stats(num_prompts), out_shardings=everywhere)
        # (stats, index_P, step) -> counts int32 [P], prompt_of int32 [B], posterior mean success rate float32 [P]
        self.allocate: Callable[..., Any] = jax.jit(plan, out_shardings=everywhere)
        # (stats, index_P, prompt_of_B, reward_B, step) -> stats
        self.record: Callable[..., PromptStats] = jax.jit(learn, out_shardings=everywhere)
