"""Statistics of packed tokens: those of each rollout on its own; their drift; what the passes keep."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed_rows import of_rollouts, packed, replaced, tokens_in
from small_batch import ARCHITECTURE, CONFIG, ONE_EACH, SEVERAL, C, L, M, V, flat, graph_of, now_stats, params

from dynamo_jax.batch import TokenStats, tokens_of
from dynamo_jax.config import MeshConfig
from dynamo_jax.kernels import token_stats
from dynamo_jax.policy import abstract_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.sharding import make_mesh, sharding
from dynamo_jax.update import MiniBatch, gradient, init_state, make_optimizer
from dynamo_jax.update.gradient import logp_drift, row_stats
from dynamo_jax.update.steps import PolicyUpdate


def test_statistics_are_those_of_each_rollout_alone_without_padding() -> None:
    """The slot before a token predicts it, whatever the padding holds: a rollout on its own has none to be wrong."""
    model = nnx.merge(graph_of(CONFIG), jax.tree.map(jnp.asarray, params()))
    rollouts, stats = flat(), now_stats()
    for m in (1, 2, 6):  # one token after one, some of each, all after two: each shape is compiled
        start, length = L - rollouts.prompt_length_M[m], rollouts.length_M[m]
        tokens = np.concatenate([rollouts.prompts_ML[m, start:], rollouts.tokens_MC[m, :length]])
        hidden = model(tokens[None], np.ones((1, len(tokens)), bool))[0, L - start - 1 : -1]
        logp = np.asarray(jax.nn.log_softmax(model.logits(hidden) / 0.7), np.float64)
        taken = logp[np.arange(length), rollouts.tokens_MC[m, :length]]
        entropy = -np.sum(np.exp(logp) * logp, axis=1)
        lambda_mean = np.sum(np.exp(2 * logp) * (logp + entropy[:, None]), axis=1)
        for found, expected in zip(stats, (taken, entropy, lambda_mean), strict=True):
            np.testing.assert_allclose(found[m, :length], expected, atol=2e-5)


def stats_of(mini: MiniBatch) -> TokenStats:
    """Of all rows at once."""
    rows, mask = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (mini.batch.rows, tokens_in(mini).mask))

    @jax.jit
    def run(params: Any, rows: Any, mask: Any) -> TokenStats:
        model = nnx.merge(graph_of(CONFIG), params)
        tables = model.tables()
        return row_stats(model, model.embedded(rows.tokens, tables.embedding), tables.head, rows, mask, 0.7)

    return jax.tree.map(lambda x: np.asarray(x).reshape(mini.batch.rows.tokens.shape), run(params(), rows, mask))


def test_several_rollouts_in_a_row_do_not_see_each_other_or_the_padding() -> None:
    for shape in (SEVERAL, SEVERAL._replace(slots=2 * (L + C) + 3)):
        mini = packed(flat(), shape)
        rollouts = mini.batch.rows.rollout.reshape(-1, shape.slots)
        assert max(len(set(row[row < M].tolist())) for row in rollouts) > 1
        stats = stats_of(mini)
        for found, expected in zip(stats, now_stats(), strict=True):
            np.testing.assert_allclose(of_rollouts(mini, found, C), expected, atol=1e-5)
        # What stands in slots without a token is not read.
        rows, rng = mini.batch.rows, np.random.default_rng(5)
        free = rows.rollout == M
        junk = rows._replace(
            tokens=np.where(free, rng.integers(0, V, shape), rows.tokens).astype(np.int32),
            position=np.where(free, rng.integers(0, 9, shape), rows.position).astype(np.int32),
        )
        again = stats_of(mini._replace(batch=mini.batch._replace(rows=junk)))
        jax.tree.map(np.testing.assert_array_equal, again, stats)


def sizes(jaxpr: Any) -> list[int]:
    """The number of elements of every value in a program, those inside its loops and calls included."""
    found = [math.prod(v.aval.shape) for v in (*jaxpr.invars, *jaxpr.constvars)]
    for equation in jaxpr.eqns:
        found += [math.prod(v.aval.shape) for v in equation.outvars]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += sizes(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_no_array_of_tokens_by_vocabulary_anywhere_in_the_update(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: a vocabulary of a million makes the logits of all tokens larger than all else together.

    With the reference kernel there is such an array: the search is able to find it.
    """
    vocabulary, rows = 2**20, 64
    config = replaced(
        CONFIG,
        policy={"architecture": dataclasses.replace(ARCHITECTURE, vocab_size=vocabulary)},
        rollout={"prompts": 8, "per_prompt": 8},
    )
    monkeypatch.setattr(gradient, "token_stats", partial(token_stats, impl=impl))
    graph, abstract = abstract_policy(decoder_config(config, V, None))
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), abstract)
    batch = packed(flat(), ONE_EACH).batch
    slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, rows, x.shape[2]), x.dtype), batch.rows)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows,), x.dtype), batch)._replace(rows=slots)
    step = PolicyUpdate(graph, config, None, optimizer)
    program = jax.make_jaxpr(step.whole)(state, batch, slots.sampled_logp)
    logits = rows * (L + C) * vocabulary
    assert max(sizes(program.jaxpr)) < logits / 4 or impl == "reference"
    assert max(sizes(program.jaxpr)) >= logits or impl == "auto"


def test_drift_looks_at_sampled_tokens_only() -> None:
    mini = packed(flat(), SEVERAL)
    tokens, logp = tokens_in(mini), mini.batch.rows.sampled_logp.copy()
    logp[tokens.mask == 0] = 1e9
    assert float(logp_drift(tokens, logp)) == 0.0
    last = (tokens.rollout == 2) & (tokens.step == flat().length_M[2] - 1)
    assert last.sum() == 1
    logp[last] += 0.25
    assert float(logp_drift(tokens, logp)) == pytest.approx(0.25)


@pytest.mark.parametrize("devices", [1, 8])
def test_drift_shows_a_value_that_is_not_a_number(devices: int) -> None:
    """Of a sampled token, wherever it lies on the mesh; what other slots hold does not show."""
    mini = packed(flat(), ONE_EACH, alone=True)
    rows = jax.tree.map(lambda x: np.concatenate([x[0]] * 8), mini.batch.rows)
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    whole, split = sharding(mesh), sharding(mesh, "batch")
    drift = jax.jit(
        lambda batch, rows, logp: logp_drift(tokens_of(batch, rows), logp),
        in_shardings=(whole, split, split),
        out_shardings=whole,
    )
    batch, sampled = mini.batch._replace(rows=None), rows.sampled_logp
    mask = np.concatenate([tokens_in(mini).mask[0]] * 8)
    for value in (np.nan, np.inf, -np.inf):
        assert float(drift(batch, rows, np.where(mask == 0, value, sampled).astype(np.float32))) == 0.0
        for row in (0, len(rows.tokens) // 2, len(rows.tokens) - 1):
            wrong = sampled.copy()
            wrong[row, np.argmax(mask[row])] = value
            np.testing.assert_equal(float(drift(batch, rows, wrong)), abs(value))
            both = rows._replace(sampled_logp=wrong)
            np.testing.assert_equal(float(drift(batch, both, sampled)), abs(value))
            assert np.isnan(float(drift(batch, both, wrong)))  # also where the two infinities agree
