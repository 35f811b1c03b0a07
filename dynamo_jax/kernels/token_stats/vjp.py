"""The gradient of the fused forms, and their run on a mesh: tokens spread over some axes, the vocabulary over another.

One custom VJP for all: a forward pass (`dispatch`) gives the sums over the vocabulary that a device holds, the backward
pass is `chunked`'s. Devices exchange the sums of a token (one pmax, one psum), d_hidden (psum over
the vocabulary's axis) and d_head (psum over the tokens' axes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dynamo_jax.batch import TokenStats
from dynamo_jax.kernels.token_stats import chunked, dispatch
from dynamo_jax.kernels.token_stats.sums import ABSENT, Softmax, finish, merge_devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static. `mesh` None: one device, or arrays that XLA places by itself."""

    impl: str
    temperature: float
    blocks: chunked.Blocks | None = None
    mesh: Mesh | None = None
    token_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None


class Inputs(NamedTuple):
    """What a device, or all of them together, works on."""

    hidden: jax.Array  # [T, D]
    head: jax.Array  # [V, D]; or [X, V, D], a copy for each shard of tokens
    targets: jax.Array  # int [T]
    mask: jax.Array | None  # bool [T], tokens that are wanted; None: all


class Rows(NamedTuple):
    """A device's tokens, those that are wanted first. `order` and `live` are None if all are."""

    hidden: jax.Array
    targets: jax.Array  # counted from the first column that the device holds
    order: jax.Array | None  # row i is token order[i]
    live: jax.Array | None  # how many are wanted, int32 scalar


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_token_stats(plan: Plan, inputs: Inputs) -> TokenStats:
    """See `api.token_stats`."""
    return _forward(plan, inputs)[0]


def _forward(plan: Plan, inputs: Inputs) -> tuple[TokenStats, tuple[Inputs, Softmax]]:
    def local(inputs: Inputs) -> tuple[TokenStats, Softmax]:
        inputs = _own_copy(inputs)
        rows = _wanted_first(plan, inputs)
        sums = dispatch.forward(
            plan.impl, plan.mesh, rows.hidden, inputs.head, rows.targets, rows.live, plan.temperature, plan.blocks
        )
        if plan.vocab_axis is not None:
            sums = merge_devices(sums, plan.vocab_axis)
        stats, softmax = finish(sums)
        if rows.live is None:
            return stats, softmax
        is_live = jnp.arange(rows.targets.shape[0]) < rows.live
        stats = jax.tree.map(lambda x: jnp.where(is_live, x, 0.0), stats)
        # exp(z - top) is then 0 for rows that the forward pass did not compute, whatever z is.
        softmax = Softmax(*(jnp.where(is_live, x, y) for x, y in zip(softmax, (-ABSENT, 0.0, 0.0), strict=True)))
        return jax.tree.map(lambda x: jnp.zeros_like(x).at[rows.order].set(x), (stats, softmax))

    spec = _specs(plan, inputs.head.ndim)
    stats, softmax = _on_mesh(plan, local, (spec,), spec.targets)(inputs)
    return stats, (inputs, softmax)


def _backward(plan: Plan, residuals: tuple[Inputs, Softmax], grads: TokenStats) -> tuple[Inputs]:
    def local(inputs: Inputs, per_token: Any) -> tuple[jax.Array, jax.Array]:
        softmax, g_logp, g_entropy = per_token
        apart, inputs = inputs.head.ndim == 3, _own_copy(inputs)
        if inputs.mask is not None:
            # A token without advantage, or one that the clip decides, gets back exactly 0 and gives exactly 0.
            inputs = inputs._replace(mask=inputs.mask & ((g_logp != 0) | (g_entropy != 0)))
        rows = _wanted_first(plan, inputs)
        if rows.live is not None:
            is_live = jnp.arange(rows.targets.shape[0]) < rows.live
            softmax, g_logp, g_entropy = jax.tree.map(lambda x: x[rows.order], per_token)
            g_logp, g_entropy = jnp.where(is_live, g_logp, 0.0), jnp.where(is_live, g_entropy, 0.0)
        d_hidden, d_head = chunked.backward(
            rows.hidden,
            inputs.head,
            rows.targets,
            rows.live,
            softmax,
            g_logp,
            g_entropy,
            plan.temperature,
            plan.blocks,
        )
        if plan.vocab_axis is not None:
            d_hidden = lax.psum(d_hidden, plan.vocab_axis)
        if apart:
            d_head = d_head[None]
        elif plan.token_axes:
            d_head = lax.psum(d_head, plan.token_axes)
        d_hidden = d_hidden.astype(inputs.hidden.dtype)
        if rows.order is not None:
            d_hidden = jnp.zeros_like(d_hidden).at[rows.order].set(d_hidden, unique_indices=True)
        return d_hidden, d_head

    inputs, softmax = residuals
    spec = _specs(plan, inputs.head.ndim)
    out = (spec.hidden, spec.head)
    f = _on_mesh(plan, local, (spec, spec.targets), out)
    d_hidden, d_head = f(inputs, (softmax, grads.logp, grads.entropy))
    none: Any = None  # integers have no gradient
    return (Inputs(d_hidden, d_head, none, none),)


def _forward_for_gradient(plan: Plan, inputs: Inputs) -> tuple[TokenStats, tuple[Inputs, Softmax]]:
    # The last bit of a logit of 50 is 4e-6. Where p is nearly 1 float32 gradients show such a difference, unless both
    # passes make their logits in the same way. Rounded to bfloat16 they do not.
    if jnp.result_type(inputs.hidden, inputs.head).itemsize > 2:
        plan = dataclasses.replace(plan, impl="chunked")
    return _forward(plan, inputs)


fused_token_stats.defvjp(_forward_for_gradient, _backward)


def _wanted_first(plan: Plan, inputs: Inputs) -> Rows:
    """Tokens sorted so that whole tiles at the end can be skipped, in a device's own share: none moves to another."""
    targets = inputs.targets
    if plan.vocab_axis is not None:
        columns = inputs.head.shape[0]
        targets = targets - lax.axis_index(plan.vocab_axis) * columns
        # Of another device: no column at all, not one of those beyond the end that a block may have.
        targets = jnp.where((targets >= 0) & (targets < columns), targets, -1)
    if inputs.mask is None:
        return Rows(inputs.hidden, targets, None, None)
    order = jnp.argsort(~inputs.mask, stable=True)
    live = jnp.sum(inputs.mask, dtype=jnp.int32)
    # Zeros, so that what padding holds, were it NaN, reaches no sum.
    is_live = jnp.arange(order.shape[0]) < live
    return Rows(jnp.where(is_live[:, None], inputs.hidden[order], 0), targets[order], order, live)


def _own_copy(inputs: Inputs) -> Inputs:
    return inputs._replace(head=inputs.head[0]) if inputs.head.ndim == 3 else inputs


def _specs(plan: Plan, head_ndim: int) -> Any:
    """An `Inputs` of partition specs."""
    tokens = PartitionSpec(plan.token_axes or None)
    head = PartitionSpec(*([plan.token_axes or None] if head_ndim == 3 else []), plan.vocab_axis)
    specs: Any = (tokens, head, tokens, tokens)
    return Inputs(*specs)


def _on_mesh(plan: Plan, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if plan.mesh is None:
        return f
    return jax.shard_map(f, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
