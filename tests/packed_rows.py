"""Mini-batches of the policy update whose rows a test chooses, and what comes out of packed rows, one rollout a row.

A test says what it knows of each rollout in arrays [M, C]; how these lie in rows [I, G, S] must make no difference.
"""

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from dynamo_jax.batch import Pool, PromptBatch, Rollouts, Tokens, TokenStats, tokens_of
from dynamo_jax.config import Config, MeshConfig
from dynamo_jax.policy import abstract_policy, param_shardings
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.sharding import make_mesh, to_mesh
from dynamo_jax.update import MiniBatch, Programs, pack, packing, programs
from dynamo_jax.update.packing import Shape


class Flat(NamedTuple):
    """M rollouts with all that their update reads, one a row. Host arrays."""

    prompts_ML: np.ndarray  # left-padded
    prompt_length_M: np.ndarray
    tokens_MC: np.ndarray
    length_M: np.ndarray
    advantage_M: np.ndarray
    weight_M: np.ndarray
    random_M: np.ndarray
    sampled_logp_MC: np.ndarray

    @property
    def mask_MC(self) -> np.ndarray:
        return np.arange(self.tokens_MC.shape[1]) < self.length_M[:, None]


def packed(flat: Flat, shape: Shape, *, alone: bool = False, rows_M: np.ndarray | None = None) -> MiniBatch:
    """`flat` in rows, or those of its rollouts that `rows_M` names (-1: none). `alone`: one rollout a row."""
    M = len(flat.length_M)
    names = tuple(map(str, range(M)))
    prompts = PromptBatch(np.arange(M), flat.prompts_ML, flat.prompt_length_M, names, names, names)
    rollouts = Rollouts(flat.tokens_MC, flat.length_M, flat.length_M > 0, flat.sampled_logp_MC)
    nothing_M = np.zeros(M, np.float32)
    pool = Pool(prompts, np.arange(M), rollouts, nothing_M > 0, nothing_M, nothing_M, nothing_M)
    rows_M = np.arange(M) if rows_M is None else rows_M
    with pytest.MonkeyPatch.context() as context:
        if alone:
            context.setattr(packing, "fitted", lambda lengths, _: [[i] for i, n in enumerate(lengths) if n])
        return pack(pool, flat.advantage_M, flat.weight_M, flat.random_M, rows_M, shape)


def tokens_in(mini: MiniBatch) -> Tokens:
    """What each slot predicts, on the host."""
    batch = jax.device_get(mini.batch)
    return jax.device_get(tokens_of(batch, batch.rows))


def in_rows(mini: MiniBatch, x_MC: np.ndarray) -> np.ndarray:
    """[I, G, S]: what is known of each token, in the slot that predicts it, and 0 in all others."""
    tokens = tokens_in(mini)
    real, x_IGS = tokens.mask > 0, np.zeros(tokens.mask.shape, np.float32)
    x_IGS[real] = x_MC[tokens.rollout[real], tokens.step[real]]
    return x_IGS


def of_rollouts(mini: MiniBatch, x_IGS: Any, C: int) -> np.ndarray:
    """[M, C]: the inverse; 0 where nothing was sampled."""
    tokens = tokens_in(mini)
    real, x_MC = tokens.mask > 0, np.zeros((len(mini.batch.length_M), C), np.float32)
    x_MC[tokens.rollout[real], tokens.step[real]] = np.asarray(x_IGS)[real]
    return x_MC


@cache
def programs_of(config: Config, vocabulary: int, mesh: MeshConfig | None = None, plain: bool = False) -> Programs:
    """On one device or on a mesh. `plain`: gradient descent at rate 1, so that the change is the gradient."""
    where = make_mesh(mesh or MeshConfig(), jax.devices()[: mesh.size if mesh else 1])
    with pytest.MonkeyPatch.context() as context:
        if plain:
            context.setattr(programs, "make_optimizer", lambda *_: optax.sgd(1.0))
        return Programs(*abstract_policy(decoder_config(config, vocabulary, where)), config, where)


def updated(p: Programs, params: Any, mini: MiniBatch, old: TokenStats) -> tuple[Any, dict[str, float]]:
    """Parameters after one update, on the host, and its metrics. `params`: host arrays; `old`: [M, C]."""
    state = p.init(to_mesh(params, param_shardings(params, p.mesh)))
    placed = p.place(mini._replace(batch=jax.tree.map(np.asarray, mini.batch)))
    there = to_mesh(TokenStats(*(in_rows(mini, np.asarray(x)) for x in old)), placed.batch.rows.tokens.sharding)
    state, metrics = p.update(state, placed, there, first=False)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def replaced(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
