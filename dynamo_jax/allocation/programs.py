"""The programs of allocation: how many rollouts each prompt gets, and what their rewards taught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamo_jax.allocation.allocate import rows_from_counts
from dynamo_jax.allocation.rule import Allocation, Known, Terms
from dynamo_jax.allocation.rules import RULES
from dynamo_jax.allocation.stats import PromptStats, discounted, init_stats, posterior_mean, record
from dynamo_jax.allocation.vip import GaussianProcess, fourier_features, init_gp, observe, predict
from dynamo_jax.batch import Pool
from dynamo_jax.config import AllocationConfig
from dynamo_jax.run.contents import Form
from dynamo_jax.sharding import sharding, to_host, to_mesh

OLDER_GP_NAMES = ("precision_MM", "information_M", "last_step")  # in checkpoints, before W meant Fourier features


class AllocationState(NamedTuple):
    """All that allocation knows: the `stats` of a checkpoint."""

    prompts: PromptStats
    gp: GaussianProcess | None  # of rules that read features


class AllocationPrograms:
    """`allocate` and `record` for a run's settings, every array whole on every device; `traces` counts compilations.

        init() -> stats
        allocate(stats, index_P, step) -> Allocation: counts int32 [P], prompt_of int32 [B], success rates float32 [P]
        record(stats, index_P, prompt_of_B, reward_B, norm_B, step) -> stats
        record_pool(stats, pool, step) -> stats, of one round of at most B rollouts

    A rollout of slot P is padding and is not recorded; several records of one step add up. `norm_B` is what the rule's
    `gradient_size` gives, None for rules without. `allocate_program` and `record_program` are the jitted parts of the
    two: all of them, but that features are looked up on the host, and that a rule `on_host` ends there.

    Args:
        config: the rule and its settings.
        num_prompts: N, of the data set.
        budget: B, rollouts of a step.
        mesh: for the shardings.
        features_NE: float [N, E], what `prompt_features` gives; only for a rule that reads features.
        advantage: objective.advantage, which `vip` minimises the variance of.

    Raises ValueError if a rule that reads features gets none, or not N of them.
    """

    def __init__(
        self,
        config: AllocationConfig,
        num_prompts: int,
        budget: int,
        mesh: Mesh,
        *,
        features_NE: np.ndarray | None = None,
        advantage: str = "grpo",
    ) -> None:
        self.traces = {"allocate": 0, "record": 0}
        self._config, self._rule = config, RULES[config.rule]
        self._terms = Terms(budget, config.low, config.high, advantage)
        self._everywhere, self._features_NE = sharding(mesh), features_NE
        if self._rule.features:
            _check_features(config.rule, features_NE, num_prompts)

        def phi(features_PE: jax.Array) -> jax.Array:
            return fourier_features(features_PE, config.vip.fourier, config.vip.length_scale)

        def start() -> AllocationState:
            gp = init_gp(config.vip.fourier) if self._rule.features else None
            return AllocationState(init_stats(num_prompts), gp)

        def plan(stats: AllocationState, index_P: jax.Array, step: jax.Array, features_PE: Any) -> Allocation | Known:
            self.traces["allocate"] += 1  # runs once a trace, not once a call
            successes_P, trials_P, norm_P = discounted(stats.prompts, index_P, step, config.half_life)
            if stats.gp is None:
                success_P = posterior_mean(successes_P, trials_P, config.prior)
            else:
                success_P = predict(stats.gp, phi(features_PE), step, config)
            known = Known(successes_P, trials_P, norm_P, success_P)
            return known if self._rule.on_host else self._shared(known)

        def learn(
            stats: AllocationState,
            index_P: jax.Array,
            prompt_of_B: jax.Array,
            reward_B: jax.Array,
            norm_B: jax.Array | None,
            step: jax.Array,
            features_PE: Any,
        ) -> AllocationState:
            self.traces["record"] += 1
            if self._rule.gradient_size and norm_B is None:
                raise ValueError(f"record: norm_B = None; rule {config.rule} needs the gradient size of each rollout.")
            prompts = record(stats.prompts, index_P, prompt_of_B, reward_B, step, config.half_life, norm_B)
            if stats.gp is None:
                return AllocationState(prompts, None)
            none_P = jnp.zeros(index_P.shape[0], jnp.float32)
            trials_P = none_P.at[prompt_of_B].add(1.0, mode="drop")
            right_P = none_P.at[prompt_of_B].add(reward_B > 0.5, mode="drop")
            gp = observe(stats.gp, phi(features_PE), right_P, trials_P, step, config)
            return AllocationState(prompts, gp)

        self.abstract_stats = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere), jax.eval_shape(start)
        )
        self.forms = [Form(self.abstract_stats)]
        if self.abstract_stats.gp is not None:
            older = self.abstract_stats._replace(gp=dict(zip(OLDER_GP_NAMES, self.abstract_stats.gp, strict=True)))
            self.forms.append(Form(older, _with_todays_gp))
        self.init: Callable[[], AllocationState] = jax.jit(start, out_shardings=self._everywhere)
        self.allocate_program: Callable[..., Any] = jax.jit(plan, out_shardings=self._everywhere)
        self.record_program: Callable[..., AllocationState] = jax.jit(learn, out_shardings=self._everywhere)

    def allocate(self, stats: AllocationState, index_P: np.ndarray, step: int) -> Allocation:
        planned = self.allocate_program(stats, index_P, step, self._features(index_P))
        if not self._rule.on_host:
            return planned
        return to_mesh(self._shared(to_host(planned)), self._everywhere)

    def record(
        self,
        stats: AllocationState,
        index_P: np.ndarray,
        prompt_of_B: np.ndarray,
        reward_B: np.ndarray,
        norm_B: np.ndarray | None,
        step: int,
    ) -> AllocationState:
        features_PE = self._features(index_P)
        return self.record_program(stats, index_P, prompt_of_B, reward_B, norm_B, step, features_PE)

    def record_pool(self, stats: AllocationState, pool: Pool, step: int) -> AllocationState:
        """`record` of one round's verdicts, filled up to B rollouts so that one program serves rounds of any size."""
        size, right_R = self._rule.gradient_size, pool.right_R.astype(np.float32)
        norm_R = size(np.asarray(pool.rollouts.logp_BC)) if size else np.zeros_like(right_R)
        room = (0, self._terms.budget - len(right_R))
        prompt_of_B = np.pad(pool.prompt_of_R, room, constant_values=len(pool.prompts.index_P)).astype(np.int32)
        return self.record(stats, pool.prompts.index_P, prompt_of_B, np.pad(right_R, room), np.pad(norm_R, room), step)

    def _shared(self, known: Known) -> Allocation:
        counts_P = self._rule.counts(known, self._terms, self._config)
        return Allocation(counts_P, rows_from_counts(counts_P, self._terms.budget), known.success_P)

    def _features(self, index_P: np.ndarray) -> np.ndarray | None:
        return None if self._features_NE is None else self._features_NE[np.asarray(index_P)]


def _with_todays_gp(stats: Any) -> AllocationState:
    return AllocationState(stats.prompts, GaussianProcess(*(stats.gp[name] for name in OLDER_GP_NAMES)))


def _check_features(rule: str, features_NE: np.ndarray | None, num_prompts: int) -> None:
    if features_NE is None or len(features_NE) != num_prompts:
        shape = None if features_NE is None else features_NE.shape
        raise ValueError(
            f"AllocationPrograms: features_NE has shape {shape}; rule {rule} needs features of all {num_prompts} "
            "prompts. Pass prompt_features(...)."
        )
