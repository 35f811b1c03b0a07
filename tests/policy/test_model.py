"""The decoder: cache, padding, precision, sharding and gradients."""

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamo_jax.config import ArchitectureConfig, MeshConfig
from dynamo_jax.config.choices import Remat
from dynamo_jax.policy import (
    DecoderConfig,
    KVCache,
    abstract_policy,
    init_policy,
    param_shardings,
)
from dynamo_jax.policy.params import PARAMS, param_name
from dynamo_jax.sharding import make_mesh

TINY = ArchitectureConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=48
)  # fmt: skip
CONFIG = DecoderConfig(TINY)


def make_params(config: DecoderConfig) -> Any:
    """Random parameters, the norms and biases too, so that one that is left out is seen."""
    rng = np.random.default_rng(0)

    def fill(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = param_name(path)
        center, scale = (1.0, 0.2) if name.endswith("norm") else (0.0, 0.25)
        return jnp.asarray(rng.normal(center, scale, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_policy(config)[1])


@pytest.fixture(scope="module")
def params() -> Any:
    return make_params(CONFIG)


@cache
def compiled_forward(config: DecoderConfig) -> Any:
    graph = abstract_policy(config)[0]
    return jax.jit(lambda params, tokens, valid: nnx.merge(graph, params)(tokens, valid))


@cache
def compiled_loss(config: DecoderConfig) -> Any:
    graph = abstract_policy(config)[0]

    def loss(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        logp = jax.nn.log_softmax(jax.vmap(model.logits)(model(tokens, valid)), axis=-1)
        logp = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        counted = valid[:, :-1] & valid[:, 1:]
        return -jnp.sum(logp * counted) / jnp.sum(counted)

    # Values are compared here, not speed, and compiling is most of the time.
    return jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})


def forward(config: DecoderConfig, params: Any, tokens: Any, valid: Any) -> np.ndarray:
    hidden = compiled_forward(config)(params, np.asarray(tokens, np.int32), np.asarray(valid, bool))
    return np.asarray(hidden, np.float32)


def loss_and_grad(config: DecoderConfig, params: Any, tokens: Any, valid: Any) -> tuple[np.ndarray, Any]:
    """Mean negative log-likelihood of the next token over all real positions, and its gradient."""
    value, grad = compiled_loss(config)(params, np.asarray(tokens, np.int32), np.asarray(valid, bool))
    return np.asarray(value), jax.tree.map(lambda x: np.asarray(x, np.float32), grad)


def batch(rows: int = 8, slots: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and left padding of different lengths."""
    tokens = np.random.default_rng(1).integers(0, 48, (rows, slots))
    return tokens, np.arange(slots) >= np.arange(rows)[:, None] % 4


def test_decoding_equals_the_whole_sequence(params: Any) -> None:
    L, C = 5, 6
    tokens = np.random.default_rng(2).integers(0, 48, (4, L + C)).astype(np.int32)
    length = np.array([5, 3, 1, 4], np.int32)
    valid = np.arange(L + C) >= L - length[:, None]
    whole = forward(CONFIG, params, tokens, valid)

    graph = abstract_policy(CONFIG)[0]
    prefill = jax.jit(lambda p, tokens, valid: nnx.merge(graph, p).prefill(tokens, valid))
    decode = jax.jit(lambda p, *args: nnx.merge(graph, p).decode(*args))
    hidden, cache = prefill(params, tokens[:, :L], valid[:, :L])
    for row in range(4):
        np.testing.assert_allclose(hidden[row, L - length[row] :], whole[row, L - length[row] : L], atol=1e-5)
    # What the unwritten slots of the cache hold must not matter.
    room = [(0, 0), (0, 0), (0, C), (0, 0), (0, 0)]
    cache = KVCache(*(jnp.pad(x, room, constant_values=100.0) for x in cache))
    for step in range(C):
        slot = L + step
        seen = valid & (np.arange(L + C) <= slot)
        hidden, cache = decode(params, tokens[:, slot], length + step, jnp.int32(slot), seen, cache)
        np.testing.assert_allclose(hidden, whole[:, slot], atol=1e-5)


def test_padding_does_not_matter(params: Any) -> None:
    text = np.random.default_rng(3).integers(0, 48, 5)
    starts = (0, 2, 4)  # padding on the right, on both sides, on the left
    tokens = np.random.default_rng(4).integers(0, 48, (2, 3, 9))  # two different fillings of the padding
    valid = np.zeros((3, 9), bool)
    for row, start in enumerate(starts):
        tokens[:, row, start : start + 5] = text
        valid[row, start : start + 5] = True
    first, second = (forward(CONFIG, params, t, valid) for t in tokens)
    states = [first[row, start : start + 5] for row, start in enumerate(starts)]
    np.testing.assert_allclose(states[1], states[0], atol=1e-5)
    np.testing.assert_allclose(states[2], states[0], atol=1e-5)
    np.testing.assert_array_equal(first[valid], second[valid])
    assert np.isfinite(first).all()


def test_the_future_is_not_seen(params: Any) -> None:
    tokens, valid = batch()
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 48
    a, b = (forward(CONFIG, params, t, valid) for t in (tokens, changed))
    before = valid & (np.arange(10) < 6)
    np.testing.assert_array_equal(a[before], b[before])
    assert (np.abs(a[:, 6:] - b[:, 6:]).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("remat", [word for word in get_args(Remat) if word != "none"])
def test_remat_changes_nothing(params: Any, remat: str) -> None:
    tokens, valid = batch()
    plain, again = (loss_and_grad(dataclasses.replace(CONFIG, remat=r), params, tokens, valid) for r in ("none", remat))
    np.testing.assert_allclose(again[0], plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), again[1], plain[1])


def scans(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from scans(inner)


def test_remat_keeps_what_its_name_says(params: Any) -> None:
    """What the layers hand to the backward pass: their input, what attention gave, what products gave, or all."""
    tokens, valid = batch()
    kept = {}
    for remat in get_args(Remat):
        run = compiled_loss(dataclasses.replace(CONFIG, remat=remat)).__wrapped__
        forward = next(scans(jax.make_jaxpr(run)(params, tokens, valid).jaxpr))
        kept[remat] = sum(math.prod(x.aval.shape) for x in forward.outvars[1:])  # the first is the carry
    width = {name: tokens.size * TINY.num_layers * n for name, n in {"D": 16, "A": 4 * 4, "K": 2 * 4, "F": 24}.items()}
    attention = width["D"] + width["A"]
    products = attention + width["A"] + 2 * width["K"] + width["D"] + 2 * width["F"]  # none reads the last one's
    assert (kept["full"], kept["attention"], kept["dots"]) == (width["D"], attention, products)
    assert kept["none"] > products


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_is_near_float32(params: Any, param_dtype: str) -> None:
    tokens, valid = batch()
    config = dataclasses.replace(CONFIG, param_dtype=param_dtype, compute_dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(param_dtype), params)
    assert jax.tree.leaves(abstract_policy(config)[1])[0].dtype == param_dtype

    model = nnx.merge(abstract_policy(config)[0], half)
    hidden = jax.eval_shape(model, jnp.asarray(tokens), jnp.asarray(valid))
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, jax.ShapeDtypeStruct((4, 16), jnp.bfloat16)).dtype == jnp.float32

    want, got = forward(CONFIG, params, tokens, valid)[valid], forward(config, half, tokens, valid)[valid]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03
    loss, grad = loss_and_grad(config, half, tokens, valid)
    expected = loss_and_grad(CONFIG, params, tokens, valid)
    np.testing.assert_allclose(loss, expected[0], rtol=0.02)
    for x, y in zip(jax.tree.leaves(grad), jax.tree.leaves(expected[1]), strict=True):
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 0.1


def test_initial_parameters_and_their_shards() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params, sharded = (init_policy(dataclasses.replace(CONFIG, mesh=m), jax.random.key(3)) for m in (None, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, sharded)
    wanted = param_shardings(sharded, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), sharded, wanted)))
    assert sharded["blocks"]["gate"][...].addressable_shards[0].data.shape == (2, 8, 12)
    blocks = params["blocks"]
    for name, fan_in in (("q", 16), ("o", 16), ("gate", 16), ("down", 24)):
        assert np.std(np.asarray(blocks[name][...])) == pytest.approx(fan_in**-0.5, rel=0.1), name
    assert not np.asarray(blocks["q_bias"][...]).any()
    assert (np.asarray(params["final_norm"][...]) == 1).all()


def test_mesh_and_one_device_agree() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    plain = dataclasses.replace(CONFIG, shape=dataclasses.replace(TINY, tie_word_embeddings=False))
    meshed = dataclasses.replace(plain, mesh=mesh)
    params = make_params(plain)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    tokens, valid = batch()
    np.testing.assert_allclose(
        forward(meshed, sharded, tokens, valid)[valid], forward(plain, params, tokens, valid)[valid], atol=1e-5
    )
    (loss, grad), (loss_1, grad_1) = (
        loss_and_grad(c, p, tokens, valid) for c, p in ((meshed, sharded), (plain, params))
    )
    np.testing.assert_allclose(loss, loss_1, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad, grad_1)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, shape=dataclasses.replace(TINY, tie_word_embeddings=tied))
    tokens, valid = batch()
    _, grad = loss_and_grad(config, make_params(config), tokens, valid)
    names = set()
    for path, x in jax.tree_util.tree_leaves_with_path(grad):
        names.add(param_name(path))
        assert np.isfinite(x).all(), path
        layers = x if "blocks" in str(path[0]) else x[None]
        assert all(np.abs(layer).max() > 1e-6 for layer in layers), path
    assert names == PARAMS.keys() - ({"lm_head"} if tied else set())
