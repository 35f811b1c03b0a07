"""Stochastic rounding: between the two neighbours, right on average, and the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.config import MeshConfig
from dynamo_jax.sharding import make_mesh, sharding
from dynamo_jax.update.rounding import round_tree, stochastic_round

KEY = jax.random.key(0)


def test_to_a_neighbour_and_right_on_average() -> None:
    """Of numbers of every size and sign, 40,000 times each: the mean is within 5 standard errors."""
    values = np.array([1.0, 1.003, -1.003, 3e-5, -7e8, 1.2345e-12, 0.0, 65280.5, 1.999], np.float32)
    drawn = stochastic_round(jnp.broadcast_to(values, (40_000, len(values))), KEY)
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn, np.float64)
    towards_0 = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    away = ((values.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    exact = values == towards_0
    assert (np.where(exact, drawn == towards_0, (drawn == towards_0) | (drawn == away))).all()
    error = np.abs(away - towards_0) / 2 / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - values) <= np.where(exact, 0, 5 * error)).all()
    assert all(len(np.unique(column)) == 2 for column in drawn.T[~exact])


def test_what_is_not_finite_stays() -> None:
    """The carry would make other numbers of a NaN's bits: those of 0x7fffffff give -0."""
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    found = np.asarray(stochastic_round(jnp.concatenate([jnp.asarray(nan), jnp.array([np.inf, -np.inf])]), KEY))
    assert np.isnan(found[:3].astype(np.float32)).all()
    np.testing.assert_array_equal(found[3:].astype(np.float32), [np.inf, -np.inf])


def test_the_bits_depend_on_name_and_count_alone() -> None:
    x = jnp.full((8, 64), 1.003, jnp.float32)
    tree = {"embedding": x, "lm_head": x}
    one, again = (round_tree(tree, "params", jnp.int32(3)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    others = (one["lm_head"], round_tree(tree, "nu", 3)["embedding"], round_tree(tree, "params", 4)["embedding"])
    assert all(np.any(one["embedding"] != other) for other in others)

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    split = sharding(mesh, "vocab", "embed")
    run = jax.jit(lambda t: round_tree(t, "params", jnp.int32(3)), in_shardings=split, out_shardings=split)
    jax.tree.map(np.testing.assert_array_equal, run(tree), one)
    text = run.lower(tree).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
