"""The policy update: packing and accumulation change nothing; clipping, dtypes, skipped updates, traces."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packed_rows import in_rows, packed, programs_of, replaced, updated
from small_batch import (
    ARCHITECTURE,
    CONFIG,
    LENGTHS,
    ONE_EACH,
    SEVERAL,
    C,
    L,
    M,
    V,
    flat,
    graph_of,
    now_stats,
    old_stats,
    params,
)

from dynamo_jax.batch import TokenStats
from dynamo_jax.config import Config, MeshConfig
from dynamo_jax.config.choices import Aggregation
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.update import MiniBatch, Programs
from dynamo_jax.update.packing import Shape

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.filterwarnings("error:Some donated buffers")]

QUARTERS = {"trainer": {"mini_batch": M, "micro_batch": 2}}


def shape_of(config: Config) -> Shape:
    return programs_of(config, V).shape


def of_update(config: Config, mini: MiniBatch | None = None, old: TokenStats | None = None) -> Any:
    """Parameters after one update at rate 1 by the gradient, and the metrics."""
    p = programs_of(config, V, plain=True)
    return updated(p, params(), mini or packed(flat(), p.shape), old or old_stats())


def assert_same(found: Any, expected: Any, atol: float = 1e-5) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_packed_micro_batches_add_up_to_a_rollout_a_row(aggregation: str) -> None:
    """Modulation on, so its extremes are the mini-batch's; rollouts of one token and of all."""
    config = replaced(CONFIG, objective={"aggregation": aggregation})
    whole = of_update(config, packed(flat(), ONE_EACH, alone=True))
    pairs = zip(jax.tree.leaves(whole[0]), jax.tree.leaves(params()), strict=True)
    assert min(np.abs(a - b).max() for a, b in pairs) > 1e-4  # every parameter has a gradient to be compared
    assert 0.0 < whole[1]["objective/clip_fraction"] < 0.9
    assert whole[1]["modulation/comp_max"] > 1.01
    quarters = replaced(config, **QUARTERS)
    mini = packed(flat(), shape_of(quarters))
    assert 1 < mini.live < 4  # rows are shared, and a micro-batch is left out
    assert_same(of_update(quarters, mini), whole)
    assert_same(of_update(quarters, packed(flat(), SEVERAL, alone=True)), whole)


def test_rollouts_that_are_none_change_nothing() -> None:
    """What dynamic sampling leaves empty, here three quarters of the mini-batch: the same update as without it."""
    config = replaced(CONFIG, objective={"aggregation": "seq-mean-token-mean"})
    two = replaced(config, trainer={"mini_batch": 2, "micro_batch": 2})
    old = TokenStats(*(x[2:4] for x in old_stats()))
    expected = of_update(two, packed(flat(), shape_of(two), rows_M=np.array([2, 3])), old)
    assert expected[1]["objective/grad_norm"] > 1e-3
    eight = replaced(config, trainer={"mini_batch": 8, "micro_batch": 4})
    rows_M = np.array([-1, -1, 2, -1, -1, 3, -1, -1])
    old = TokenStats(*(x[rows_M] for x in old_stats()))
    assert_same(of_update(eight, packed(flat(), shape_of(eight), rows_M=rows_M), old), expected, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_is_that_of_the_loss_written_out(tied: bool) -> None:
    """Token-mean, dual clip, no modulation, from logits of the whole vocabulary, differentiated by jax."""
    config = replaced(
        CONFIG,
        modulation={"enabled": False},
        policy={"architecture": dataclasses.replace(ARCHITECTURE, tie_word_embeddings=tied)},
        **QUARTERS,
    )
    rows, old, graph = flat(), old_stats(), graph_of(config)

    def loss(p: Any) -> jax.Array:
        model = nnx.merge(graph, p)
        tokens = np.concatenate([rows.prompts_ML, rows.tokens_MC], axis=1)
        slots = np.arange(L + C)
        valid = (slots >= (L - rows.prompt_length_M)[:, None]) & (slots < (L + rows.length_M)[:, None])
        logp = jax.nn.log_softmax(jax.vmap(model.logits)(model(tokens, valid)[:, L - 1 : -1]) / 0.7)
        logp = jnp.take_along_axis(logp, rows.tokens_MC[..., None], axis=-1)[..., 0]
        ratio, A = jnp.exp(logp - old.logp), rows.advantage_M[:, None]
        values = jnp.maximum(-A * ratio, -A * jnp.clip(ratio, 0.8, 1.2))
        values = jnp.where(A < 0, jnp.minimum(values, -A * 10.0), values)
        return jnp.sum(values * rows.mask_MC) / LENGTHS.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params(config))
    p = programs_of(config, V, plain=True)
    found, metrics = updated(p, params(config), packed(flat(), p.shape), old)
    assert metrics["objective/loss"] == pytest.approx(float(value), abs=1e-5)
    assert metrics["objective/grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - g, params(config), grads)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    assert not [name for name in metrics if name.startswith("modulation/")]


def copied(state: Any) -> Any:
    return jax.tree.map(np.array, state._replace(updates=None, skipped=None))


def device_batch(p: Programs, **changed: np.ndarray) -> tuple[MiniBatch, TokenStats]:
    mini = packed(flat()._replace(**changed), p.shape)
    return p.place(mini), TokenStats(*(jnp.asarray(in_rows(mini, x)) for x in old_stats()))


@pytest.mark.parametrize(("value", "dtype", "rows"), [(math.nan, "float32", 4), (math.inf, "bfloat16", M)])
def test_update_that_is_not_finite_changes_nothing_but_its_count(value: float, dtype: str, rows: int) -> None:
    """The state is donated, so that the program itself must hand the old values on."""
    config = replaced(
        CONFIG, trainer={"mini_batch": M, "micro_batch": rows}, policy={"param_dtype": dtype},
        optimizer={"warmup_steps": 10, "learning_rate": 0.1},
    )  # fmt: skip
    p = programs_of(config, V)
    state = p.init(jax.tree.map(jnp.asarray, params(config)))
    state, _ = p.update(state, *device_batch(p), first=False)  # moments that could be lost
    before = copied(state)
    advantage_M = np.where(np.arange(M) == 3, value, flat().advantage_M).astype(np.float32)
    state, metrics = p.update(state, *device_batch(p, advantage_M=advantage_M), first=False)
    jax.tree.map(np.testing.assert_array_equal, copied(state), before)
    assert (int(state.updates), int(state.skipped)) == (1, 1)
    assert not np.isfinite(metrics["objective/loss"])

    state, metrics = p.update(state, *device_batch(p), first=False)
    assert (int(state.updates), int(state.skipped)) == (2, 1)
    assert np.isfinite(metrics["objective/loss"])
    assert float(metrics["objective/learning_rate"]) == pytest.approx(2 / 10 * 0.1)  # a skipped update takes no turn
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(copied(state)), jax.tree.leaves(before), strict=True)]
    assert all(changed)
    assert p.traces["update"] == 1


def test_bfloat16_parameters_keep_their_dtype_and_have_float32_moments_and_masters() -> None:
    config = replaced(
        CONFIG, policy={"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}, optimizer={"learning_rate": 0.1}
    )
    p = programs_of(config, V)
    before = jax.tree.map(lambda x: np.asarray(x, np.float32), params(config))
    state = p.init(params(config))
    for _ in range(2):
        donated = state
        state, metrics = p.update(state, *device_batch(p), first=False)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    precise = [x for x in jax.tree.leaves((state.opt_state, state.masters)) if x.ndim]
    assert {x.dtype for x in precise} == {jnp.dtype("float32")}
    # A number that went through bfloat16 on the way would have its last 16 bits empty.
    assert all(np.any(np.asarray(x).view(np.uint32) & 0xFFFF) for x in precise)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.masters)
    jax.tree.map(np.testing.assert_array_equal, state.params, rounded)
    assert p.traces["update"] == 1
    assert metrics["objective/loss"].dtype == jnp.float32
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a, np.float32) - b).max(), state.params, before)
    assert min(jax.tree.leaves(moved)) > 0.05


def test_masters_lie_as_their_parameters_do_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    p = programs_of(replaced(CONFIG, policy={"param_dtype": "bfloat16"}), V, MeshConfig(fsdp=2))
    abstract = p.abstract_state
    of_masters, of_params = (jax.tree.map(lambda x: x.sharding, x) for x in (abstract.masters, abstract.params))
    assert of_masters == of_params
    assert len(set(jax.tree.leaves(of_masters))) > 1
    state = p.init(params(p.config))
    state = state._replace(masters=jax.tree.map(lambda x: x + 1e-4, state.masters))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored.masters) == of_masters


def test_the_number_of_live_micro_batches_changes_without_a_trace() -> None:
    """One token a rollout fills one micro-batch of four, all slots fill four; each is what it is by itself."""
    config = replaced(CONFIG, **QUARTERS)
    p = programs_of(config, V, plain=True)
    live = []
    for length in (1, 3, 5, C, 1):
        rollouts = flat()._replace(length_M=np.full(M, length, np.int32), prompt_length_M=np.full(M, L, np.int32))
        mini = packed(rollouts, p.shape)
        live.append(mini.live)
        found = updated(p, params(), mini, old_stats())
        if length in (1, C):
            assert_same(found, of_update(CONFIG, packed(rollouts, ONE_EACH, alone=True)))
    assert live == [2, 4, 4, 4, 2]
    assert p.traces == {"score": 1, "terms": 1, "update": 1, "update (apply)": 1}


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_old_log_probs_of_the_sampler_are_those_of_the_batch(micro_batch: int | None) -> None:
    """`objective.old_logp: sampler` is as `score` would be, had it said what the sampler says."""
    sizes = {"trainer": {"mini_batch": M, "micro_batch": micro_batch}, "rollout": {"prompts": 4}}
    of_score = replaced(CONFIG, **sizes)
    of_sampler = replaced(of_score, objective={"old_logp": "sampler"})
    rollouts = flat()._replace(sampled_logp_MC=np.where(flat().mask_MC, old_stats().logp, 0.0))
    p, q = (programs_of(config, V, plain=True) for config in (of_sampler, of_score))
    assert (p.scores_first, q.scores_first) == (False, True)
    mini = packed(rollouts, p.shape)
    state, metrics = p.update(p.init(params()), p.place(mini), None, first=True)
    found = jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}
    expected = updated(q, params(), mini, old_stats())
    # What differs is whom the sampler is compared with: the policy that is updated, or, here, itself.
    shown = [{k: x for k, x in metrics.items() if not k.startswith("mismatch/")} for _, metrics in (found, expected)]
    assert_same((found[0], shown[0]), (expected[0], shown[1]))
    assert expected[1]["mismatch/weight_max"] == pytest.approx(1, abs=1e-5) != found[1]["mismatch/weight_max"]
    assert found[1]["objective/clip_fraction"] > 0
    gap = np.abs(old_stats().logp - now_stats().logp) * flat().mask_MC
    assert found[1]["rollout/logp_drift"] == pytest.approx(gap.max(), abs=1e-5)


def test_one_update_a_step_of_one_micro_batch_needs_no_pass_before() -> None:
    """The old policy is the one that is updated: ratios are 1, and nothing is scored."""
    p = programs_of(CONFIG, V, plain=True)
    assert not p.scores_first
    mini = packed(flat(), p.shape)
    state, metrics = p.update(p.init(params()), p.place(mini), None, first=True)
    found = jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}
    assert_same(found, updated(p, params(), mini, now_stats()))
    assert p.traces == {"score": 0, "terms": 0, "update": 2, "update (apply)": 0}  # with old log-probs, and without
    assert found[1]["objective/clip_fraction"] == 0


def test_scores_before_the_first_update_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several micro-batches: `now` of the step's first update is what `score` said; later ones score anew."""
    config = replaced(CONFIG, **QUARTERS)
    p = programs_of(config, V, plain=True)
    assert p.scores_first
    mini = p.place(packed(flat(), p.shape))
    scored, drifts = p.score(p.init(params()).params, mini)
    assert len(drifts) == mini.live
    calls = []
    score_program = p.score_program
    monkeypatch.setattr(p, "score_program", lambda *given: calls.append(1) or score_program(*given))
    first = p.update(p.init(params()), mini, scored, first=True)
    assert not calls
    second = p.update(p.init(params()), mini, scored, first=False)
    assert len(calls) == mini.live
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))
