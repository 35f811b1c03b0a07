"""Statistics of the tokens in packed rows, and their gradient: of one micro-batch, to be added up over several.

The gradient of a layer's weights is summed over the devices as it is made, and lies split as the weights do. Those of
the embedding and the head, which have a row for each token of the vocabulary, stay apart for each shard of rows until
the update: see `policy.products.copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import PackedRows, Tokens, TokenStats
from dynamo_jax.kernels import token_stats
from dynamo_jax.objective.terms import Metrics
from dynamo_jax.policy.model import Decoder, param_shardings
from dynamo_jax.policy.params import PARAMS, param_name
from dynamo_jax.policy.products import lookup_gradient, scattered
from dynamo_jax.sharding import sharding

Objective = Callable[[TokenStats], tuple[jax.Array, Metrics]]


class Accumulated(NamedTuple):
    """What micro-batches add up to. float32, whatever the dtype of the parameters."""

    grads: Any  # as the parameters, but [X, V, D] for embedding and head
    metrics: Metrics
    drift: jax.Array  # nats, the largest


def row_stats(
    model: Decoder, x_GSD: jax.Array, head_XVD: jax.Array, rows: PackedRows, mask_GS: jax.Array, temperature: float
) -> TokenStats:
    """Log-prob, entropy and E[pi Lambda] of the token that each slot predicts, each [G, S] float32; 0 off the mask.

    Args:
        x_GSD: the tokens' embeddings. head_XVD: of `model.tables`.
    """
    hidden_GSD = model.packed(x_GSD, rows.rollout, rows.position)
    G, S, D = hidden_GSD.shape
    stats = token_stats(
        hidden_GSD.reshape(G * S, D),
        head_XVD,
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
    total: Accumulated,
    graph: nnx.GraphDef[Decoder],
    params: Any,
    rows: PackedRows,
    tokens: Tokens,
    objective: Objective,
    temperature: float,
) -> Accumulated:
    """`total`, and the gradient of `objective` of a micro-batch's statistics, and the metrics that it returns.

    Args:
        total: of the micro-batches before; `nothing` before the first.
        rows, tokens: [G, S].
        objective: to a scalar and metrics that add up over micro-batches.
    """
    model = nnx.merge(graph, params)
    tables = model.tables()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves, tree = jax.tree.flatten(params)

    def loss(
        layers: dict[int, jax.Array], x_GSD: jax.Array, head_XVD: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
        merged = jax.tree.unflatten(tree, [layers.get(i, leaf) for i, leaf in enumerate(leaves)])
        stats = row_stats(nnx.merge(graph, merged), x_GSD, head_XVD, rows, tokens.mask, temperature)
        value, metrics = objective(stats)
        return value, (metrics | {"objective/loss": value}, logp_drift(tokens, jax.lax.stop_gradient(stats.logp)))

    layers = {i: leaf for i, leaf in enumerate(leaves) if not is_table(paths[i])}
    x_GSD = model.embedded(rows.tokens, tables.embedding)
    gradients = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (d_layers, dx_GSD, d_head_XVD), (metrics, drift) = gradients(layers, x_GSD, tables.head)
    head = "lm_head" if any(param_name(path) == "lm_head" for path in paths) else "embedding"

    def add(path: tuple[Any, ...], i: int, sums: jax.Array) -> jax.Array:
        name = param_name(path)
        if i in d_layers:
            return sums + d_layers[i].astype(sums.dtype)
        if name == head:
            sums = sums + d_head_XVD.astype(sums.dtype)
        return lookup_gradient(sums, rows.tokens, dx_GSD, model.config.mesh) if name == "embedding" else sums

    places = jax.tree.unflatten(tree, range(len(leaves)))
    grads = jax.tree_util.tree_map_with_path(add, places, total.grads)
    return Accumulated(grads, jax.tree.map(jnp.add, total.metrics, metrics), jnp.maximum(total.drift, drift))


def nothing(params: Any, shards: int, metrics: Any) -> Accumulated:
    """Zeros: of the shapes of parameters and metrics, on so many shards of rows."""

    def zeros(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jnp.zeros((shards, *x.shape) if is_table(path) else x.shape, jnp.float32)

    grads = jax.tree_util.tree_map_with_path(zeros, params)
    return Accumulated(grads, {name: jnp.float32(0) for name in metrics}, jnp.float32(0))


def whole_gradient(grads: Any, mesh: Mesh | None) -> Any:
    """float32, as the parameters: those of embedding and head summed over the shards of rows."""

    def whole(path: tuple[Any, ...], x_XVD: jax.Array) -> jax.Array:
        if not is_table(path):
            return x_XVD
        if mesh is None:
            return x_XVD[0]
        apart, whole = (sharding(mesh, *axes).spec for axes in (("batch", "vocab"), ("vocab", "embed")))
        f = partial(scattered, mesh=mesh, axis=1)
        return jax.shard_map(lambda x: f(x[0]), mesh=mesh, in_specs=apart, out_specs=whole, check_vma=False)(x_XVD)

    return jax.tree_util.tree_map_with_path(whole, grads)


def grad_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """Where the `grads` of `Accumulated` lie."""
    where = param_shardings(abstract_params, mesh)
    apart = sharding(mesh, "batch", "vocab")
    return jax.tree_util.tree_map_with_path(lambda path, s: apart if is_table(path) else s, where)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path has a row for each token of the vocabulary."""
    return "V" in PARAMS[param_name(path)].axes
