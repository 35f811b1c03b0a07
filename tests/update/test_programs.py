"""The policy update: alignment, accumulation, clipping, dtypes, skipped updates, and what the backward pass keeps."""

import dataclasses
import math
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynamo_jax.batch import TokenStats, TrainBatch, micro_batches, whole
from dynamo_jax.config import (
    ArchitectureConfig,
    Config,
    MeshConfig,
    ModulationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
)
from dynamo_jax.config.choices import Aggregation
from dynamo_jax.kernels import token_stats
from dynamo_jax.objective.terms import token_advantages
from dynamo_jax.policy import Decoder, abstract_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.sharding import make_mesh, sharding
from dynamo_jax.update import (
    Programs,
    TrainState,
    apply_gradients,
    completion_mask,
    completion_stats,
    init_state,
    learning_rate_schedule,
    logp_drift,
    make_optimizer,
    update_policy,
    with_masters,
)
from dynamo_jax.update import programs as module

M, L, C, V = 8, 4, 6, 16
LENGTHS = np.array([6, 1, 3, 1, 5, 2, 6, 4], np.int32)
SHAPE = ArchitectureConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, vocab_size=V,
    tie_word_embeddings=False,
)  # fmt: skip
CONFIG = Config(
    run_dir="unused",
    policy=PolicyConfig(architecture=SHAPE),
    rollout=RolloutConfig(prompts=2, per_prompt=4, max_tokens=C, temperature=0.7),
)
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # values are compared here, not speed


def replaced(config: Config = CONFIG, **sections: dict[str, Any]) -> Config:
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def graph_of(config: Config) -> nnx.GraphDef[Decoder]:
    return abstract_policy(decoder_config(config, V, None))[0]


@cache
def params(config: Config = CONFIG) -> Any:
    """Random, the norms and biases too."""
    rng = np.random.default_rng(0)
    abstract = abstract_policy(decoder_config(config, V, None))[1]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.4, x.shape), x.dtype), abstract)


def batch() -> TrainBatch:
    """Lengths from 1 token to all, prompts from 1 token to all; padding holds tokens like any other."""
    rng = np.random.default_rng(1)
    return TrainBatch(
        prompt_tokens_ML=rng.integers(0, V, (M, L)).astype(np.int32),
        prompt_length_M=np.array([4, 1, 2, 3, 4, 1, 2, 3], np.int32),
        tokens_MC=rng.integers(0, V, (M, C)).astype(np.int32),
        length_M=LENGTHS,
        advantage_M=np.array([1.0, -0.5, 0.7, -1.2, 0.0, 2.0, -0.1, 0.4], np.float32),
        weight_M=np.ones(M, np.float32),
        random_M=rng.integers(2**32, size=M, dtype=np.uint32),
        sampled_logp_MC=rng.normal(-2, 0.5, (M, C)).astype(np.float32),
    )


@cache
def old_stats() -> TokenStats:
    """Of a policy that is not the current one, far enough for some tokens to be clipped."""
    stats = now_stats()
    shift = np.random.default_rng(2).normal(0, 0.3, (M, C)).astype(np.float32)
    return TokenStats(stats.logp + shift, stats.entropy + 0.1, stats.lambda_mean * 1.1)


@cache
def now_stats() -> TokenStats:
    return jax.jit(lambda p: completion_stats(nnx.merge(graph_of(CONFIG), p), batch(), 0.7))(params())


def updated(config: Config, rows: slice = slice(None), empty: int = 0) -> tuple[Any, dict[str, float]]:
    """One update of `params()` by plain gradient descent at rate 1, so that the change is the gradient.

    Of these rows of the batch, with as many empty ones behind them.
    """
    optimizer = optax.sgd(1.0)
    run = partial(update_policy, graph_of(config), optimizer=optimizer, config=config)
    program = jax.jit(run, compiler_options=FAST_COMPILE)
    arrays = jax.tree.map(lambda x: np.asarray(x)[rows], (batch(), old_stats(), now_stats()))
    arrays = jax.tree.map(lambda x: np.concatenate([x, x[:1].repeat(empty, 0) * 0]), arrays)
    state, metrics = program(init_state(params(), optimizer), *arrays)
    return state.params, {name: float(value) for name, value in metrics.items()}


def test_statistics_are_those_of_each_row_alone_without_padding() -> None:
    """Slot L - 1 predicts the first token, whatever stands in the padding: a row on its own has none to be wrong."""
    model, rows, stats = nnx.merge(graph_of(CONFIG), params()), batch(), now_stats()
    for m in (1, 2, 6):  # one token after one, some of each, all after two: each shape is compiled
        start, length = L - rows.prompt_length_M[m], rows.length_M[m]
        tokens = np.concatenate([rows.prompt_tokens_ML[m, start:], rows.tokens_MC[m, :length]])
        hidden = model(tokens[None], np.ones((1, len(tokens)), bool))[0, L - start - 1 : -1]
        logp = np.asarray(jax.nn.log_softmax(model.logits(hidden) / 0.7), np.float64)
        taken = logp[np.arange(length), rows.tokens_MC[m, :length]]
        entropy = -np.sum(np.exp(logp) * logp, axis=1)
        lambda_mean = np.sum(np.exp(2 * logp) * (logp + entropy[:, None]), axis=1)
        for found, expected in zip(stats, (taken, entropy, lambda_mean), strict=True):
            np.testing.assert_allclose(found[m, :length], expected, atol=2e-5)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_micro_batches_add_up_to_the_whole(aggregation: str) -> None:
    """Modulation on, so its extremes are the mini-batch's; rows of one token and of all."""
    expected, metrics = updated(replaced(objective={"aggregation": aggregation}))
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(params()), strict=True)]
    assert min(moved) > 1e-4  # every parameter has a gradient to be compared
    assert 0.0 < metrics["objective/clip_fraction"] < 0.9
    assert metrics["modulation/comp_max"] > 1.01
    quarter = replaced(objective={"aggregation": aggregation}, trainer={"micro_batch": M // 4, "mini_batch": M})
    found, found_metrics = updated(quarter)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    assert found_metrics == pytest.approx(metrics, abs=1e-5)


def test_rows_without_a_rollout_change_nothing() -> None:
    """What dynamic sampling leaves empty, here three quarters of the mini-batch: the same update as without it."""
    config = replaced(objective={"aggregation": "seq-mean-token-mean"})
    expected, metrics = updated(replaced(config, trainer={"mini_batch": 2, "micro_batch": 2}), slice(2, 4))
    assert metrics["objective/grad_norm"] > 1e-3
    found, found_metrics = updated(replaced(config, trainer={"mini_batch": 8, "micro_batch": 4}), slice(2, 4), empty=6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)
    assert found_metrics == pytest.approx(metrics, abs=1e-5)


def test_gradient_is_that_of_the_loss_written_out() -> None:
    """Token-mean, dual clip, no modulation, from logits of the whole vocabulary, differentiated by jax."""
    config, rows, old = replaced(modulation={"enabled": False}), batch(), old_stats()

    def loss(p: Any) -> jax.Array:
        model = nnx.merge(graph_of(config), p)
        tokens = np.concatenate([rows.prompt_tokens_ML, rows.tokens_MC], axis=1)
        slots = np.arange(L + C)
        valid = (slots >= (L - rows.prompt_length_M)[:, None]) & (slots < (L + rows.length_M)[:, None])
        logp = jax.nn.log_softmax(jax.vmap(model.logits)(model(tokens, valid)[:, L - 1 : -1]) / 0.7)
        logp = jnp.take_along_axis(logp, rows.tokens_MC[..., None], axis=-1)[..., 0]
        ratio, A = jnp.exp(logp - old.logp), rows.advantage_M[:, None]
        values = jnp.maximum(-A * ratio, -A * jnp.clip(ratio, 0.8, 1.2))
        values = jnp.where(A < 0, jnp.minimum(values, -A * 10.0), values)
        return jnp.sum(values * completion_mask(rows.length_M, C)) / LENGTHS.sum()

    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(params())
    found, metrics = updated(config)
    assert metrics["objective/loss"] == pytest.approx(float(value), abs=1e-5)
    assert metrics["objective/grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - g, params(), grads)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    assert not [name for name in metrics if name.startswith("modulation/")]


def test_modulation_by_hand() -> None:
    """The factors of every token from their equations in float64; extremes over the tokens of the whole mini-batch."""
    old, now, mask = old_stats(), now_stats(), np.asarray(completion_mask(LENGTHS, C))
    m = ModulationConfig(gamma=5.0, tau=0.5)
    config = dataclasses.replace(CONFIG, modulation=m, objective=ObjectiveConfig(clip_ratio_c=3.0))
    found, metrics = token_advantages(batch().advantage_M, old, now, mask, config)

    A = batch().advantage_M[:, None].astype(np.float64) * mask
    logp, H, lam = (np.asarray(x, np.float64) for x in now)
    ratio = np.exp(logp - old.logp)
    free = ((A > 0) & (ratio <= 1.2)) | ((A < 0) & (ratio >= 0.8) & (ratio <= 3.0))
    xi = np.abs(free * ratio * A * (np.exp(logp) * (logp + H) - lam))
    real = H[mask > 0]
    comp = np.where(A > 0, 1 + m.alpha * (real.max() - H) / (real.max() - real.min()), 1.0)
    stab = m.lambda_min + (1 - m.lambda_min) / (1 + np.exp(m.gamma * (xi / xi.max() - m.tau)))
    np.testing.assert_allclose(found, A * comp * stab, atol=1e-5)
    assert float(metrics["modulation/comp_mean"]) == pytest.approx(comp[mask > 0].mean(), abs=1e-5)
    assert float(metrics["modulation/stab_min"]) == pytest.approx(stab[mask > 0].min(), abs=1e-5)

    off = dataclasses.replace(config, modulation=dataclasses.replace(m, enabled=False))
    found, metrics = token_advantages(batch().advantage_M, old, now, mask, off)
    np.testing.assert_array_equal(found, batch().advantage_M[:, None] * mask)
    assert metrics == {}


def test_learning_rate_by_hand() -> None:
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=0.4, warmup_steps=4))
    np.testing.assert_allclose([rate(u) for u in (0, 1, 3, 4, 99)], [0.1, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    assert learning_rate_schedule(OptimizerConfig(learning_rate=0.4))(0) == pytest.approx(0.4)


def test_clipped_adamw_by_hand() -> None:
    """Two updates, the first at half the rate and clipped from norm 10 to 2, the second below the limit."""
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5, max_grad_norm=2.0
    )
    optimizer = make_optimizer(config)
    w = {"embedding": jnp.array([1.0, -2.0]), "lm_head": jnp.array(3.0)}
    state = optimizer.init(w)
    p, mean, square = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for t, (g, scale) in enumerate(((np.array([6.0, 0.0, 8.0]), 0.2), (np.array([0.3, 1.0, -0.5]), 1.0)), 1):
        changes, state = optimizer.update({"embedding": jnp.array(g[:2]), "lm_head": jnp.array(g[2])}, state, w)
        w = optax.apply_updates(w, changes)
        g = g * scale
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
        step = mean / (1 - 0.8**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-3) + 0.5 * p
        p = p - (0.05 if t == 1 else 0.1) * step
        np.testing.assert_allclose([*w["embedding"], w["lm_head"]], p, rtol=1e-5)


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    """Without a gradient, a parameter moves by its decay alone. A norm is stacked over the layers, as a matrix is."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config)
    state = optimizer.init(params())
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params()), state, params())
    moved = {path[-2].key for path, x in jax.tree_util.tree_flatten_with_path(changes)[0] if np.any(x)}
    assert moved == {"embedding", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}
    np.testing.assert_allclose(changes["lm_head"].get_value(), -0.05 * params()["lm_head"].get_value(), rtol=1e-6)
    # The state of a plain AdamW: a run that was saved with one goes on.
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate_schedule(config)))
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params()))


def programs_of(config: Config) -> Programs:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = decoder_config(config, V, mesh)
    return Programs(*abstract_policy(decoder), config, mesh)


def copies(state: Any) -> Any:
    return jax.tree.map(lambda x: np.array(x), state._replace(updates=None, skipped=None))


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (math.inf, "bfloat16")])
def test_update_that_is_not_finite_changes_nothing_but_its_count(value: float, dtype: str) -> None:
    """The state is donated, so that the program itself must hand the old values on."""
    config = replaced(
        trainer={"mini_batch": M, "micro_batch": 4}, optimizer={"warmup_steps": 10, "learning_rate": 0.1},
        policy={"param_dtype": dtype},
    )  # fmt: skip
    p = programs_of(config)
    state = p.init(jax.tree.map(jnp.copy, params(config)))
    state, _ = p.update(state, batch(), old_stats(), now_stats())  # moments that could be lost
    before = copies(state)
    bad = batch()._replace(advantage_M=np.where(np.arange(M) == 3, value, batch().advantage_M).astype(np.float32))
    state, metrics = p.update(state, bad, old_stats(), now_stats())
    jax.tree.map(np.testing.assert_array_equal, copies(state), before)
    assert (int(state.updates), int(state.skipped)) == (1, 1)
    assert not np.isfinite(metrics["objective/loss"])

    state, metrics = p.update(state, batch(), old_stats(), now_stats())
    assert (int(state.updates), int(state.skipped)) == (2, 1)
    assert np.isfinite(metrics["objective/loss"])
    assert float(metrics["objective/learning_rate"]) == pytest.approx(2 / 10 * 0.1)  # a skipped update takes no turn
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(copies(state)), jax.tree.leaves(before), strict=True)]
    assert all(changed)
    assert p.traces["update"] == 1


def test_bfloat16_parameters_keep_their_dtype_and_have_float32_moments_and_masters() -> None:
    config = replaced(policy={"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}, optimizer={"learning_rate": 0.1})
    p = programs_of(config)
    before = jax.tree.map(lambda x: np.asarray(x, np.float32), params(config))
    state = p.init(params(config))
    for _ in range(2):
        donated = state
        state, metrics = p.update(state, batch(), old_stats(), now_stats())
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


def test_small_steps_of_a_bfloat16_policy_add_up() -> None:
    """A hundred steps of 1e-6, each less than half the last digit of most parameters, move it as they do in float32."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6))
    rng = np.random.default_rng(0)
    start = {"q": jnp.asarray(rng.normal(0, 0.025, 10_000), jnp.bfloat16)}
    grads = {"q": jnp.asarray(rng.choice([-0.01, 0.01], 10_000), jnp.float32)}

    @jax.jit
    def after_100(state: Any) -> Any:
        return jax.lax.fori_loop(0, 100, lambda _, s: apply_gradients(s, grads, optimizer), state)

    exact = after_100(init_state(jax.tree.map(lambda x: x.astype(jnp.float32), start), optimizer))
    assert type(exact) is TrainState
    half = after_100(init_state(start, optimizer))
    np.testing.assert_array_equal(half.masters["q"], exact.params["q"])
    np.testing.assert_array_equal(half.params["q"], exact.params["q"].astype(jnp.bfloat16))
    moved = (np.asarray(half.params["q"], np.float32) - np.asarray(start["q"], np.float32)) * -np.sign(grads["q"])
    assert np.mean(moved > 0) > 0.7
    assert moved.mean() == pytest.approx(1e-4, rel=0.15)


def test_bfloat16_parameters_without_masters_are_refused_or_given_some() -> None:
    """A run that was saved without goes on from its rounded parameters."""
    optimizer = optax.sgd(1.0)
    start = {"q": jnp.ones(3, jnp.bfloat16)}
    state = init_state(start, optimizer)
    bare = TrainState(*state[:4])
    with pytest.raises(ValueError, match=r"bfloat16 and the state has no float32 masters.*with_masters\(state\)"):
        apply_gradients(bare, start, optimizer)
    jax.tree.map(np.testing.assert_array_equal, with_masters(bare), state)


def test_masters_lie_as_their_parameters_do_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    config, mesh = replaced(policy={"param_dtype": "bfloat16"}), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    p = Programs(*abstract_policy(decoder_config(config, V, mesh)), config, mesh)
    abstract = p.abstract_state
    of_masters, of_params = (jax.tree.map(lambda x: x.sharding, x) for x in (abstract.masters, abstract.params))
    assert of_masters == of_params
    assert len(set(jax.tree.leaves(of_masters))) > 1
    state = p.init(params(config))
    state = state._replace(masters=jax.tree.map(lambda x: x + 1e-4, state.masters))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored.masters) == of_masters


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
        policy={"architecture": dataclasses.replace(SHAPE, vocab_size=vocabulary)},
        rollout={"prompts": 8, "per_prompt": 8},
        trainer={"mini_batch": rows, "micro_batch": rows},
    )
    monkeypatch.setattr(module, "token_stats", partial(token_stats, impl=impl))
    graph, abstract = abstract_policy(decoder_config(config, V, None))
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), abstract)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), (batch(), now_stats()))
    run = partial(update_policy, graph, optimizer=optimizer, config=config)
    program = jax.make_jaxpr(run)(state, shapes[0], shapes[1], shapes[1])
    logits = rows * C * vocabulary
    assert max(sizes(program.jaxpr)) < logits / 4 or impl == "reference"
    assert max(sizes(program.jaxpr)) >= logits or impl == "auto"


def test_micro_batches_are_strided_and_whole_is_their_inverse() -> None:
    """Each takes as many rows from every device's shard, which are contiguous: no row has to move."""
    rows, shards, size = np.arange(24), 4, 8
    split = np.asarray(micro_batches(rows, size))
    assert split.shape == (3, size)
    for micro in split:
        np.testing.assert_array_equal(np.bincount(micro // (len(rows) // shards)), [size // shards] * shards)
    tree = {"x": rows, "y": np.arange(48).reshape(24, 2)}
    jax.tree.map(np.testing.assert_array_equal, whole(micro_batches(tree, size)), tree)


def test_drift_looks_at_sampled_tokens_only() -> None:
    rows = batch()
    logp = rows.sampled_logp_MC.copy()
    logp[1, 1:] = 1e9  # padding: row 1 has one token
    assert float(logp_drift(rows, logp)) == 0.0
    logp[2, 2] += 0.25  # its last token
    assert float(logp_drift(rows, logp)) == pytest.approx(0.25)


@pytest.mark.parametrize("devices", [1, 8])
def test_drift_shows_a_value_that_is_not_a_number(devices: int) -> None:
    """Of a sampled token, wherever it lies on the mesh; what padding holds does not show."""
    rows = jax.tree.map(lambda x: np.concatenate([x] * 8), batch())
    logp = rows.sampled_logp_MC.copy()
    padding = np.arange(logp.shape[1]) >= rows.length_M[:, None]
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    drift = jax.jit(logp_drift, in_shardings=sharding(mesh, "batch"), out_shardings=sharding(mesh))
    for value in (np.nan, np.inf, -np.inf):
        assert float(drift(rows, np.where(padding, value, logp))) == 0.0
        for row in (0, len(logp) // 2, len(logp) - 1):
            wrong = logp.copy()
            wrong[row, 0] = value
            np.testing.assert_equal(float(drift(rows, wrong)), abs(value))
            both = rows._replace(sampled_logp_MC=wrong)
            np.testing.assert_equal(float(drift(both, logp)), abs(value))
            assert np.isnan(float(drift(both, wrong)))  # also where the two infinities agree
