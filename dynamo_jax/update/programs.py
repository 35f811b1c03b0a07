"""The two jitted programs of the policy update: `score` and `update`.

Both work on one mini-batch of M rollouts, a micro-batch at a time. Whatever is a mean, a maximum or a count is taken
over the whole mini-batch, so the micro-batch size and the mesh change the time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import TokenStats, TrainBatch, micro_batches, whole
from dynamo_jax.config import Config
from dynamo_jax.kernels import token_stats
from dynamo_jax.objective import denominators, policy_loss
from dynamo_jax.objective.terms import Metrics, clip_of, token_terms
from dynamo_jax.policy.model import Decoder
from dynamo_jax.run.contents import Form
from dynamo_jax.sharding import sharding
from dynamo_jax.update.optimizer import learning_rate_schedule, make_optimizer
from dynamo_jax.update.state import (
    MasterState,
    State,
    TrainState,
    abstract_state,
    apply_gradients,
    init_state,
    with_masters,
)


def completion_mask(length_M: jax.Array, max_tokens: int) -> jax.Array:
    """float32 [M, C]: 1 on the sampled tokens, the end-of-sequence token included."""
    return (jnp.arange(max_tokens) < length_M[:, None]).astype(jnp.float32)


def completion_stats(model: Decoder, batch: TrainBatch, temperature: float) -> TokenStats:
    """Log-prob, entropy and E[pi Lambda] of every completion token, each [M, C] float32; 0 on padding.

    Prompts are left-padded, so every completion starts in slot L and slot L - 1 predicts its first token.
    """
    (M, C), L = batch.tokens_MC.shape, batch.prompt_tokens_ML.shape[1]
    slot_S = jnp.arange(L + C)
    valid_MS = (slot_S >= L - batch.prompt_length_M[:, None]) & (slot_S < L + batch.length_M[:, None])
    tokens_MS = jnp.concatenate([batch.prompt_tokens_ML, batch.tokens_MC], axis=1)
    hidden_MSD = model(tokens_MS, valid_MS)
    hidden_TD = hidden_MSD[:, L - 1 : L + C - 1].reshape(M * C, -1)
    stats = token_stats(
        hidden_TD,
        model.head().astype(hidden_TD.dtype),
        batch.tokens_MC.reshape(-1),
        temperature,
        mask=completion_mask(batch.length_M, C).reshape(-1),
        mesh=model.config.mesh,
    )
    return jax.tree.map(lambda x: x.reshape(M, C), stats)


def logp_drift(batch: TrainBatch, logp_MC: jax.Array) -> jax.Array:
    """The largest difference (nats) between what the sampler and what `score` say of a sampled token's log-prob.

    NaN if one of them is NaN for any sampled token.
    """
    mask_MC = completion_mask(batch.length_M, batch.tokens_MC.shape[1])
    gap_MC = jnp.where(mask_MC > 0, jnp.abs(batch.sampled_logp_MC - logp_MC), 0.0)
    # A maximum over devices drops NaN, on CPUs as in NCCL.
    return jnp.where(jnp.any(jnp.isnan(gap_MC)), jnp.nan, jnp.max(gap_MC))


class Programs:
    """`score` and `update`, compiled once each; `traces` counts how often they were traced."""

    def __init__(self, graph: nnx.GraphDef[Decoder], abstract_params: Any, config: Config, mesh: Mesh) -> None:
        self.optimizer = make_optimizer(config.optimizer, config.updates)
        self.abstract_state = abstract_state(abstract_params, self.optimizer, mesh, config.optimizer.rounding)
        self.forms = [Form(self.abstract_state)]
        if isinstance(self.abstract_state, MasterState):  # older versions had no masters
            self.forms.append(Form(TrainState(*self.abstract_state[:4]), with_masters))
        self.traces = {"score": 0, "update": 0}
        rows = sharding(mesh, "batch")

        def score(params: Any, batch: TrainBatch) -> tuple[TokenStats, jax.Array]:
            self.traces["score"] += 1  # runs once a trace, not once a call
            stats = score_rollouts(nnx.merge(graph, params), batch, config)
            return stats, logp_drift(batch, stats.logp)

        def update(state: State, batch: TrainBatch, old: TokenStats, now: TokenStats) -> tuple[State, Metrics]:
            self.traces["update"] += 1
            return update_policy(graph, state, batch, old, now, self.optimizer, config)

        # Shardings are pinned: if the compiler chose them, a step's output would not match the next step's input.
        in_state = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self.init: Callable[[Any], State] = jax.jit(
            lambda params: init_state(params, self.optimizer, config.optimizer.rounding), out_shardings=in_state
        )
        self.score: Callable[[Any, TrainBatch], tuple[TokenStats, jax.Array]] = jax.jit(
            score, out_shardings=(rows, sharding(mesh))
        )
        self.update: Callable[..., tuple[State, Metrics]] = jax.jit(
            update, donate_argnums=0, out_shardings=(in_state, sharding(mesh))
        )


def score_rollouts(model: Decoder, batch: TrainBatch, config: Config) -> TokenStats:
    """`completion_stats` of a mini-batch, one micro-batch at a time."""
    micro = micro_batches(batch, config.micro_batch)
    return whole(jax.lax.map(lambda b: completion_stats(model, b, config.rollout.temperature), micro))


def update_policy(
    graph: nnx.GraphDef[Decoder],
    state: State,
    batch: TrainBatch,
    old: TokenStats,
    now: TokenStats,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> tuple[State, Metrics]:
    """One optimizer update on one mini-batch.

    Args:
        old: statistics under the policy that sampled; `now`: under `state.params`. Equal in the first update of a step.

    Returns: the new state, and float32 scalars over the mini-batch. If the loss or the gradient is not finite, the
    parameters and the optimizer stay as they were and `skipped` goes up by one.
    """
    o = config.objective
    mask_MC = completion_mask(batch.length_M, batch.tokens_MC.shape[1])
    advantage_MC, terms, metrics = token_terms(batch, old, now, mask_MC, config)
    whole_batch = denominators(mask_MC, o.aggregation)

    def loss_fn(params: Any, micro: Any) -> tuple[jax.Array, Metrics]:
        rows, old_logp, advantages, mask, terms = micro
        stats = completion_stats(nnx.merge(graph, params), rows, config.rollout.temperature)
        if o.entropy_coefficient:
            terms = terms._replace(bonus=o.entropy_coefficient * stats.entropy)
        return policy_loss(
            stats.logp,
            old_logp,
            advantages,
            mask,
            clip_of(o),
            aggregation=o.aggregation,
            denominators=whole_batch,
            ratio=o.ratio,
            terms=terms,
        )

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    micro = micro_batches((batch, old.logp, advantage_MC, mask_MC, terms), config.micro_batch)
    (loss, sums), grads = _sum_over_micro_batches(lambda m: gradient(state.params, m), micro)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    moved = apply_gradients(state, grads, optimizer, config.optimizer.rounding)
    new_state = jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), moved, state)
    new_state = new_state._replace(updates=state.updates + finite, skipped=state.skipped + ~finite)
    metrics |= sums | {
        "objective/loss": loss,
        "objective/grad_norm": grad_norm,
        "objective/entropy": jnp.sum(now.entropy * mask_MC) / jnp.maximum(jnp.sum(mask_MC), 1),
        "objective/learning_rate": learning_rate_schedule(config.optimizer, config.updates)(state.updates),
    }
    return new_state, metrics


def _sum_over_micro_batches(f: Callable[[Any], Any], micro: Any) -> Any:
    """The sum of f over the leading axis, accumulated in float32 whatever the parameter dtype, one at a time."""

    def add(total: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, f(one)), None

    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, micro)[0]
