"""What the programs of the policy update compute: pure functions of their arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import PackedRows, Tokens, TokenStats, TrainBatch, tokens_of
from dynamo_jax.config import Config
from dynamo_jax.objective import Denominators, TokenTerms, kl_estimate, kl_metrics, policy_loss, rollout_scale
from dynamo_jax.objective.segments import Segments
from dynamo_jax.objective.terms import Metrics, clip_of, token_terms
from dynamo_jax.policy.model import Decoder
from dynamo_jax.update.gradient import Accumulated, Objective, gradient, logp_drift, nothing, row_stats, whole_gradient
from dynamo_jax.update.optimizer import learning_rate_schedule
from dynamo_jax.update.packing import Shape
from dynamo_jax.update.state import State, apply_gradients


class PolicyUpdate:
    """See `programs`, which compiles them. `mesh` None: one device."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        config: Config,
        mesh: Mesh | None,
        optimizer: optax.GradientTransformation,
    ) -> None:
        self.graph, self.config, self.mesh, self.optimizer = graph, config, mesh, optimizer

    def no_stats(self, shape: Shape) -> TokenStats:
        return TokenStats(*(jnp.zeros(shape) for _ in TokenStats._fields))

    def score(self, params: Any, batch: TrainBatch, index: jax.Array, into: TokenStats) -> tuple[TokenStats, jax.Array]:
        """`into` with the statistics of micro-batch `index`, and their `logp_drift`."""
        rows = _at(batch.rows, index)
        tokens, model = tokens_of(batch, rows), nnx.merge(self.graph, params)
        tables = model.tables()
        x_GSD = model.embedded(rows.tokens, tables.embedding)
        stats = row_stats(model, x_GSD, tables.head, rows, tokens.mask, self.config.rollout.temperature)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return jax.tree.map(put, into, stats), logp_drift(tokens, stats.logp)

    def terms(
        self, params: Any, batch: TrainBatch, old_logp_IGS: jax.Array, now: TokenStats
    ) -> tuple[tuple[jax.Array, TokenTerms], Metrics, Accumulated]:
        """Advantage and terms of each token, the method's metrics, and zeros to add gradients to."""
        tokens = tokens_of(batch, batch.rows)
        advantage, terms, metrics = token_terms(tokens, old_logp_IGS, now, len(batch.length_M), self.config)
        rows, old_logp, *kept = _at((batch.rows, old_logp_IGS, advantage, terms), 0)
        objective = partial(self._loss, batch, tokens_of(batch, rows), old_logp, *kept)
        return (advantage, terms), metrics, self._nothing(params, rows, objective)

    def add_gradient(
        self,
        total: Accumulated,
        params: Any,
        batch: TrainBatch,
        old_logp_IGS: jax.Array,
        terms: tuple[jax.Array, TokenTerms],
        index: jax.Array,
    ) -> Accumulated:
        """`total`, and what micro-batch `index` adds."""
        rows, old_logp, kept = _at((batch.rows, old_logp_IGS, terms), index)
        tokens = tokens_of(batch, rows)
        objective = partial(self._loss, batch, tokens, old_logp, *kept)
        return self._gradient(total, params, rows, tokens, objective)

    def apply(self, state: State, total: Accumulated, metrics: Metrics) -> tuple[State, Metrics]:
        """The optimizer's step."""
        grads = whole_gradient(total.grads, self.mesh)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total.metrics["objective/loss"]) & jnp.isfinite(grad_norm)
        moved = apply_gradients(state, grads, self.optimizer, self.config.optimizer.rounding)
        new_state = jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), moved, state)
        new_state = new_state._replace(updates=state.updates + finite, skipped=state.skipped + ~finite)
        rate = learning_rate_schedule(self.config.optimizer, self.config.updates)(state.updates)
        own = {"objective/grad_norm": grad_norm, "objective/learning_rate": rate, "rollout/logp_drift": total.drift}
        return new_state, metrics | total.metrics | own

    def whole(self, state: State, batch: TrainBatch, old_logp_IGS: jax.Array | None) -> tuple[State, Metrics]:
        """All of it, of a mini-batch of one micro-batch. Without `old_logp_IGS`: what `objective.old_logp` says."""
        rows = _at(batch.rows, 0)
        tokens = tokens_of(batch, rows)
        if self.config.objective.old_logp == "sampler":
            old_logp_IGS = batch.rows.sampled_logp

        def objective(stats: TokenStats) -> tuple[jax.Array, Metrics]:
            now = jax.tree.map(lambda x: jax.lax.stop_gradient(x)[None], stats)
            old_logp = now.logp if old_logp_IGS is None else old_logp_IGS
            of_all = tokens_of(batch, batch.rows)
            advantage, terms, metrics = token_terms(of_all, old_logp, now, len(batch.length_M), self.config)
            loss, sums = self._loss(batch, tokens, old_logp[0], advantage[0], _at(terms, 0), stats)
            return loss, metrics | sums

        zeros = self._nothing(state.params, rows, objective)
        return self.apply(state, self._gradient(zeros, state.params, rows, tokens, objective), {})

    def _gradient(
        self, total: Accumulated, params: Any, rows: PackedRows, tokens: Tokens, objective: Objective
    ) -> Accumulated:
        return gradient(total, self.graph, params, rows, tokens, objective, self.config.rollout.temperature)

    def _loss(
        self,
        batch: TrainBatch,
        tokens: Tokens,
        old_logp: jax.Array,
        advantage: jax.Array,
        terms: TokenTerms,
        stats: TokenStats,
    ) -> tuple[jax.Array, Metrics]:
        """A micro-batch's part of the mini-batch's loss and of its metrics, both sums."""
        o, M = self.config.objective, len(batch.length_M)
        count = jnp.maximum(jnp.sum(batch.length_M), 1).astype(jnp.float32)
        scale_M = rollout_scale(batch.length_M, self.config.rollout.max_tokens, o.aggregation)
        scale = jnp.append(scale_M, 0.0)[tokens.rollout]
        terms = terms._replace(weight=scale if terms.weight is None else scale * terms.weight)
        if o.entropy_coefficient:
            terms = terms._replace(bonus=o.entropy_coefficient * stats.entropy)
        extra: Metrics = {}
        if tokens.reference_logp is not None:
            penalty = kl_estimate(stats.logp, tokens.reference_logp, o.kl.estimator)
            terms = terms._replace(penalty=o.kl.coefficient * penalty)
            extra = kl_metrics(stats.logp, tokens.reference_logp, tokens.mask, count)
        loss, metrics = policy_loss(
            stats.logp,
            old_logp,
            advantage,
            tokens.mask,
            clip_of(o),
            aggregation="seq-mean-token-sum",  # the plain sum: `rollout_scale` has the rest
            denominators=Denominators(jnp.float32(1.0), count),
            ratio=o.ratio,
            terms=terms,
            segments=Segments(tokens.rollout, M),
        )
        entropy = jnp.sum(jax.lax.stop_gradient(stats.entropy) * tokens.mask) / count
        return loss, metrics | extra | {"objective/entropy": entropy}

    def _nothing(self, params: Any, rows: PackedRows, objective: Objective) -> Accumulated:
        """Zeros, to add the gradients of micro-batches like these rows to."""
        stats = jax.eval_shape(lambda: TokenStats(*(jnp.zeros(rows.tokens.shape) for _ in TokenStats._fields)))
        _, metrics = jax.eval_shape(objective, stats)
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return nothing(params, shards, [*metrics, "objective/loss"])


def _at(tree: Any, index: Any) -> Any:
    """Micro-batch `index` of arrays whose first axis they are."""
    return jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False), tree)
