"""The training state, and the two jitted programs of the policy update: `score` and `update`.

Both work on one mini-batch of M rollouts, a micro-batch at a time. Whatever is a mean, a maximum or a count is taken
over the whole mini-batch, so the micro-batch size and the mesh change the time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import TokenStats, TrainBatch, micro_batches, whole
from dynamo_jax.config import Config, OptimizerConfig
from dynamo_jax.kernels import token_stats
from dynamo_jax.objective import denominators, policy_loss
from dynamo_jax.objective.terms import Metrics, clip_of, token_terms
from dynamo_jax.policy.model import Decoder, param_shardings
from dynamo_jax.policy.params import PARAMS, param_name
from dynamo_jax.run.contents import Form
from dynamo_jax.sharding import sharding


class TrainState(NamedTuple):
    """What an update changes. Donated to it, and checkpointed. Its parameters are float32."""

    params: Any
    opt_state: Any
    updates: jax.Array  # int32, applied
    skipped: jax.Array  # int32, not applied because the loss or the gradient was not finite


class MasterState(NamedTuple):
    """The state of a policy in bfloat16. The optimizer moves the masters, and the parameters are their rounding.

    A step of 1e-6 is a fraction of a bfloat16 number's last digit: added to it, nearly every one would be lost.
    """

    params: Any
    opt_state: Any
    updates: jax.Array
    skipped: jax.Array
    masters: Any  # float32, else like the parameters


State = TrainState | MasterState


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW, the rate warmed up linearly over `warmup_steps` updates.

    Matrices and embeddings decay. Norms and biases do not: a norm is at home at 1, not at 0.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        _decay_matrices(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _decay_matrices(rate: float) -> optax.GradientTransformation:
    """Adds rate * p to the change of each parameter p that decays. (`optax.masked` would change the state's tree.)"""

    def add(path: tuple[Any, ...], change: jax.Array, param: jax.Array) -> jax.Array:
        return change + rate * param if PARAMS[param_name(path)].decays else change

    return optax.stateless(partial(jax.tree.map_with_path, add))


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Update u (from 0) runs at learning_rate * min(1, (u + 1) / warmup_steps)."""
    peak, steps = config.learning_rate, config.warmup_steps
    return lambda count: peak * jnp.minimum(1.0, (count + 1) / max(steps, 1))


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """Zero counts and moments, and float32 masters of bfloat16 parameters.

    Moments are float32 in any case: with beta2 = 0.999 a bfloat16 second moment cannot move.
    """
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, optimizer.init(_float32(params)), zero, zero)
    return with_masters(state) if _is_rounded(params) else state


def with_masters(state: TrainState) -> MasterState:
    """The state of bfloat16 parameters that were saved without masters: these start from what was rounded."""
    return MasterState(*state, masters=_float32(state.params))


def apply_gradients(state: State, grads: Any, optimizer: optax.GradientTransformation) -> State:
    """The state with its parameters and the optimizer one step on, in float32. The counts stay.

    Raises ValueError for bfloat16 parameters without masters.
    """
    if isinstance(state, TrainState) and _is_rounded(state.params):
        raise ValueError(
            "update: the parameters are bfloat16 and the state has no float32 masters, without which small steps are "
            "lost. Make the state with init_state, or add them to one that was saved without: with_masters(state)."
        )
    weights = state.masters if isinstance(state, MasterState) else state.params
    changes, opt_state = optimizer.update(_float32(grads), state.opt_state, weights)
    weights = optax.apply_updates(weights, changes)
    if isinstance(state, MasterState):
        params = jax.tree.map(lambda x, old: x.astype(old.dtype), weights, state.params)
        return state._replace(params=params, opt_state=opt_state, masters=weights)
    return state._replace(params=weights, opt_state=opt_state)


def _is_rounded(params: Any) -> bool:
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params))


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def abstract_state(abstract_params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state as `ShapeDtypeStruct`s, each moment and master sharded as its parameter is. Allocates nothing."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
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
        self.optimizer = make_optimizer(config.optimizer)
        self.abstract_state = abstract_state(abstract_params, self.optimizer, mesh)
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
            lambda params: init_state(params, self.optimizer), out_shardings=in_state
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
    moved = apply_gradients(state, grads, optimizer)
    new_state = jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), moved, state)
    new_state = new_state._replace(updates=state.updates + finite, skipped=state.skipped + ~finite)
    metrics |= sums | {
        "objective/loss": loss,
        "objective/grad_norm": grad_norm,
        "objective/entropy": jnp.sum(now.entropy * mask_MC) / jnp.maximum(jnp.sum(mask_MC), 1),
        "objective/learning_rate": learning_rate_schedule(config.optimizer)(state.updates),
    }
    return new_state, metrics


def _sum_over_micro_batches(f: Callable[[Any], Any], micro: Any) -> Any:
    """The sum of f over the leading axis, accumulated in float32 whatever the parameter dtype, one at a time."""

    def add(total: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, f(one)), None

    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, micro)[0]
