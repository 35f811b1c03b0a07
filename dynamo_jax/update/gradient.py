"""Statistics of the tokens in packed rows, and their gradient: of one micro-batch, to be added up over several.

The gradient of a layer's weights is summed over the devices as it is made, and lies split as the weights do. Those of
the embedding and the head, which have a row for each token of the vocabulary, stay apart for each shard of rows until
the update: see `policy.products.copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import PackedRows, Tokens, TokenStats
from dynamo_jax.kernels import token_stats
from dynamo_jax.objective.terms import Metrics
from dynamo_jax.policy.model import Decoder, Tables, param_shardings
from dynamo_jax.policy.params import PARAMS, param_name
from dynamo_jax.sharding import sharding

Objective = Callable[[TokenStats], tuple[jax.Array, Metrics]]


class Accumulated(NamedTuple):
    """What micro-batches add up to. float32, whatever the dtype of the parameters."""

    grads: Any  # as the parameters, but [X, V, D] for embedding and head
    metrics: Metrics
    drift: jax.Array  # nats, the largest


def row_stats(model: Decoder, tables: Tables, rows: PackedRows, mask_GS: jax.Array, temperature: float) -> TokenStats:
    """Log-prob, entropy and E[pi Lambda] of the token that each slot predicts, each [G, S] float32; 0 off the mask."""
    hidden_GSD = model.packed(rows.tokens, rows.rollout, rows.position, tables.embedding)
    G, S, D = hidden_GSD.shape
    stats = token_stats(
        hidden_GSD.reshape(G * S, D),
        tables.head,
        jnp.roll(rows.tokens, -1, axis=1).reshape(-1),
        temperature,
        mask=mask_GS.reshape(-1),
        mesh=model.config.mesh,
    )
    return jax.tree.map(lambda x: x.reshape(G, S), stats)


def logp_drift(tokens: Tokens, logp: jax.Array) -> jax.Array:
    """The largest difference (nats) between what the sampler and what `score` say of a sampled token's log-prob.

    NaN if one of them is NaN for any sampled token.
    """
    gap = jnp.where(tokens.mask > 0, jnp.abs(tokens.sampled_logp - logp), 0.0)
    # A maximum over devices drops NaN, on CPUs as in NCCL.
    return jnp.where(jnp.any(jnp.isnan(gap)), jnp.nan, jnp.max(gap))


def gradient(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    rows: PackedRows,
    tokens: Tokens,
    objective: Objective,
    temperature: float,
) -> Accumulated:
    """The gradient of `objective`, of a micro-batch's statistics, and the metrics that it returns.

    Args:
        rows, tokens: [G, S].
        objective: to a scalar and metrics that add up over micro-batches.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves, tree = jax.tree.flatten(params)
    tables = nnx.merge(graph, params).tables()

    def loss(layers: dict[int, jax.Array], tables: Tables) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        merged = jax.tree.unflatten(tree, [layers.get(i, leaf) for i, leaf in enumerate(leaves)])
        stats = row_stats(nnx.merge(graph, merged), tables, rows, tokens.mask, temperature)
        value, metrics = objective(stats)
        return value, (metrics | {"objective/loss": value}, jax.lax.stop_gradient(stats.logp))

    layers = {i: leaf for i, leaf in enumerate(leaves) if not is_table(paths[i])}
    (d_layers, d_tables), (metrics, logp) = jax.grad(loss, argnums=(0, 1), has_aux=True)(layers, tables)
    of_tables = dict(zip(("embedding", "lm_head"), jax.tree.map(_float32, d_tables), strict=True))
    if not any(param_name(path) == "lm_head" for path in paths):
        of_tables["embedding"] += of_tables["lm_head"]
    grads = [of_tables[param_name(path)] if is_table(path) else _float32(d_layers[i]) for i, path in enumerate(paths)]
    return Accumulated(jax.tree.unflatten(tree, grads), metrics, logp_drift(tokens, logp))


def added(total: Accumulated, one: Accumulated) -> Accumulated:
    """What was there before, and one micro-batch's."""
    grads, metrics = (jax.tree.map(jnp.add, x, y) for x, y in zip(total[:2], one[:2], strict=True))
    return Accumulated(grads, metrics, jnp.maximum(total.drift, one.drift))


def whole_gradient(grads: Any, mesh: Mesh | None) -> Any:
    """float32, as the parameters: those of embedding and head summed over the shards of rows."""

    def whole(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if not is_table(path):
            return x
        x = jnp.sum(x, axis=0)
        axes = PARAMS[param_name(path)].logical_axes
        return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, *axes))

    return jax.tree_util.tree_map_with_path(whole, grads)


def grad_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """Where the `grads` of `Accumulated` lie."""
    where = param_shardings(abstract_params, mesh)
    apart = sharding(mesh, "batch", "vocab")
    return jax.tree_util.tree_map_with_path(lambda path, s: apart if is_table(path) else s, where)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path has a row for each token of the vocabulary."""
    return "V" in PARAMS[param_name(path)].axes


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
