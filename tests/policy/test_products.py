"""Products with weights that a mesh splits, and the table of the vocabulary: forward and backward as on one device."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.config import MeshConfig
from dynamo_jax.policy.params import PARAMS
from dynamo_jax.policy.products import Product, copies, lookup, lookup_gradient, product
from dynamo_jax.sharding import make_mesh, sharding, to_mesh

SIZES = {"b": 8, "q": 3, "d": 16, "a": 4, "h": 4, "H": 4, "f": 24}
PRODUCTS = {"q": "bqd,dah->bqah", "o": "bqaH,aHd->bqd", "gate": "bqd,df->bqf", "down": "bqf,fd->bqd"}
MESHES = [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(1, 4, 2), MeshConfig(8, 1, 1)]
V, D, G, S = 12, 16, 8, 5


def axes_of(name: str) -> tuple[str | None, ...]:
    return PARAMS[name].logical_axes[1:]


@cache
def given() -> dict[str, tuple[np.ndarray, ...]]:
    """Inputs, weight and the gradient of the outputs, of each product."""
    rng = np.random.default_rng(0)
    letters = {name: equation.replace("->", ",").split(",") for name, equation in PRODUCTS.items()}
    return {
        name: tuple(rng.normal(size=[SIZES[x] for x in word]).astype(np.float32) for word in words)
        for name, words in letters.items()
    }


def placed(mesh: Any, dtype: Any) -> dict[str, tuple[jax.Array, ...]]:
    """Rows over data and fsdp, weights as parameters lie, always float32."""
    found = {}
    for name, (x, weight, dy) in given().items():
        rows = sharding(mesh, "batch")
        where = (rows, sharding(mesh, *axes_of(name)), rows)
        found[name] = tuple(map(to_mesh, (x.astype(dtype), weight, dy.astype(dtype)), where))
    return found


def run(mesh: Any, arrays: Any) -> Any:
    """(outputs, gradients of inputs and weight) of each product, of one program."""

    def one(name: str, x: jax.Array, weight: jax.Array, dy: jax.Array) -> Any:
        plan = Product(PRODUCTS[name], axes_of(name), jax.lax.Precision.HIGHEST, mesh)
        y, backward = jax.vjp(partial(product, plan), x, weight)
        return y, *backward(dy)

    return jax.jit(lambda arrays: {name: one(name, *arrays[name]) for name in arrays})(arrays)


@cache
def on_one_device() -> Any:
    return jax.device_get(run(None, given()))


def test_one_device_is_einsum_and_its_gradient() -> None:
    for name, (x, weight, dy) in given().items():
        y, backward = jax.vjp(partial(jnp.einsum, PRODUCTS[name], precision="highest"), x, weight)
        for found, expected in zip(on_one_device()[name], (y, *backward(dy)), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_products_on_a_mesh(config: MeshConfig) -> None:
    mesh = make_mesh(config)
    arrays = placed(mesh, np.float32)
    for name, found in run(mesh, arrays).items():
        for x, expected in zip(found, on_one_device()[name], strict=True):
            np.testing.assert_allclose(x, expected, atol=1e-5)
        assert found[2].sharding.is_equivalent_to(arrays[name][1].sharding, found[2].ndim)


def test_weight_gradients_of_bfloat16_are_summed_in_float32() -> None:
    """Over the tokens of a device and over the devices: as exact as float32 is, of the same rounded numbers."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    arrays = placed(mesh, jnp.bfloat16)
    for name, (y, _, dw) in run(mesh, arrays).items():
        assert (y.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
        x, dy = (np.asarray(arrays[name][i], np.float64) for i in (0, 2))
        of_x, rest = PRODUCTS[name].split(",")
        of_w, of_y = rest.split("->")
        np.testing.assert_allclose(dw, np.einsum(f"{of_x},{of_y}->{of_w}", x, dy), atol=1e-5)


@pytest.mark.parametrize("config", [None, *MESHES[:3]], ids=str)
def test_table_of_the_vocabulary(config: MeshConfig | None) -> None:
    """Rows of the table; and gradients added to what a shard of rows has, split over tensor or not."""
    mesh = None if config is None else make_mesh(config)
    rng = np.random.default_rng(1)
    table, dx = rng.normal(size=(V, D)).astype(np.float32), rng.normal(size=(G, S, D)).astype(np.float32)
    tokens = rng.integers(0, V, (G, S)).astype(np.int32)
    arrays = table, tokens, dx
    if mesh is not None:
        rows = sharding(mesh, "batch")
        arrays = tuple(map(to_mesh, arrays, (sharding(mesh, *PARAMS["embedding"].logical_axes), rows, rows)))

    @jax.jit
    def run(table: jax.Array, tokens: jax.Array, dx: jax.Array) -> Any:
        apart = copies(table, mesh)
        return lookup(apart, tokens, mesh), lookup_gradient(apart, tokens, dx, mesh)

    x, sums = run(*arrays)
    np.testing.assert_array_equal(x, table[tokens])
    shards = config.batch_shards if config else 1
    assert sums.shape == (shards, V, D)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, dx)
    np.testing.assert_allclose(np.asarray(sums).sum(axis=0) - shards * table, expected, atol=1e-5)


def test_gradient_of_a_frequent_token_is_summed_in_float32() -> None:
    """4,096 times 1: in bfloat16 the sum would stop at 256."""
    tokens, sums = jnp.zeros((1, 4096), jnp.int32), jnp.zeros((1, V, D), jnp.float32)
    sums = jax.jit(partial(lookup_gradient, mesh=None))(sums, tokens, jnp.ones((1, 4096, D), jnp.bfloat16))
    np.testing.assert_array_equal(sums[0, 0], 4096.0)
    assert not np.any(sums[0, 1:])
