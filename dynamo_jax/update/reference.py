"""The reference policy: the one before training, kept to tell how far the policy has gone from it."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.batch import Pool, TrainBatch, tokens_of
from dynamo_jax.config import Config
from dynamo_jax.objective import kl_estimate
from dynamo_jax.run.keeper import Keeper
from dynamo_jax.sharding import sharding, to_host
from dynamo_jax.update.packing import MiniBatch, pack
from dynamo_jax.update.programs import Programs

log = logging.getLogger("dynamo_jax")

NAME = "reference"  # of its folder in the run's


class NoReference:
    """Of a run that pays nothing for leaving it: nothing is kept and nothing changes."""

    def start(self, params: Any, keeper: Keeper) -> None:
        """Take the policy before training, and save it: a resumed run has no other."""

    def resume(self, keeper: Keeper) -> None:
        """Restore it. Raises `CheckpointError` if it is missing, damaged, or of another model."""

    def in_reward(self, pool: Pool) -> tuple[Pool, dict[str, float]]:
        """The pool with what its rollouts pay taken from their rewards, and the metrics of that."""
        return pool, {}

    def in_loss(self, mini: MiniBatch) -> MiniBatch:
        """The mini-batch, on the devices, with the reference's log-probs for the loss to read."""
        return mini


class Reference(NoReference):
    """bfloat16, split over the devices as the policy is, or with `host_memory` in their hosts' memory between passes.

    Of a float32 policy it is rounded: at the start the divergence is not 0, but that of the rounding.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs, self._kl = programs, programs.config.objective.kl
        self._abstract = abstract_reference(programs)
        self._on_device = jax.tree.map(lambda x: x.sharding, self._abstract)
        kind = "pinned_host" if self._kl.host_memory else None
        self._at_rest = jax.tree.map(lambda s: s.with_memory_kind(kind) if kind else s, self._on_device)
        # A copy even where it is bfloat16 already: the policy's own arrays are donated to its updates.
        self._rounded = jax.jit(
            lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16, copy=True), tree),
            out_shardings=self._on_device,
        )
        self._penalties = jax.jit(self._penalties_of, out_shardings=sharding(programs.mesh))
        if self._kl.in_ == "loss" and self._kl.estimator == "k1":
            log.warning(
                "objective.kl.estimator = k1 with objective.kl.in = loss: the expectation of its gradient is 0, "
                "whatever the reference. Set estimator=k2, or in=reward."
            )

    def start(self, params: Any, keeper: Keeper) -> None:
        arrays = {"params": self._rounded(params)}
        keeper.save_apart(NAME, arrays)
        self._params = jax.device_put(arrays["params"], self._at_rest)

    def resume(self, keeper: Keeper) -> None:
        arrays = keeper.restore_apart(NAME, {"params": self._abstract})
        self._params = jax.device_put(arrays["params"], self._at_rest)

    def in_reward(self, pool: Pool) -> tuple[Pool, dict[str, float]]:
        if self._kl.in_ != "reward":
            return pool, {}
        M, unused_R = self._programs.config.mini_batch, np.zeros_like(pool.reward_R)
        found = []
        for rows_M in np.arange(len(pool.reward_R)).reshape(-1, M):
            mini = pack(pool, unused_R, unused_R, unused_R.astype(np.uint32), rows_M, self._programs.shape)
            mini = self._programs.place(mini)
            found.append(self._penalties(mini.batch, self._logp(mini)))
        penalty, k3 = (np.concatenate(x) for x in zip(*to_host(found), strict=True))
        metrics = {
            "reward/kl_penalty": float(penalty.mean()),
            "objective/kl_reference": float(k3.sum() / np.asarray(pool.rollouts.length_B).sum()),
        }
        return pool._replace(penalty_R=pool.penalty_R - penalty), metrics

    def in_loss(self, mini: MiniBatch) -> MiniBatch:
        if self._kl.in_ != "loss":
            return mini
        rows = mini.batch.rows._replace(reference_logp=self._logp(mini))
        return mini._replace(batch=mini.batch._replace(rows=rows))

    def _logp(self, mini: MiniBatch) -> jax.Array:
        """[I, G, S], nats."""
        stats, _ = self._programs.score(jax.device_put(self._params, self._on_device), mini)
        return stats.logp

    def _penalties_of(self, batch: TrainBatch, reference_logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[M] each: what a rollout pays, and the sum of its k3, nats. Under the sampler, which it was drawn from."""
        tokens, M = tokens_of(batch, batch.rows), len(batch.length_M)

        def by_rollout(x: jax.Array) -> jax.Array:
            x = jnp.where(tokens.mask > 0, x, 0.0)
            return jax.ops.segment_sum(x.ravel(), tokens.rollout.ravel(), M + 1)[:M]

        paid, k3 = (kl_estimate(tokens.sampled_logp, reference_logp, k) for k in (self._kl.estimator, "k3"))
        return by_rollout(self._kl.coefficient * paid), by_rollout(k3)


def abstract_reference(programs: Programs) -> Any:
    """The reference's parameters as `ShapeDtypeStruct`s, where they lie for its pass. Allocates nothing."""
    params = programs.abstract_state.params
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params)


def make_reference(config: Config, programs: Programs) -> NoReference:
    """By `objective.kl`."""
    return Reference(programs) if config.objective.kl.coefficient else NoReference()
