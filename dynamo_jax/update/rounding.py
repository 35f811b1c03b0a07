"""Stochastic rounding: what is added to a bfloat16 number in steps too small for it adds up all the same."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.policy.params import param_name


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16: one of the two neighbours of x, the nearer one more often, so that the expectation is x.

    Args:
        x: float32, any shape. What is not finite stays as it is.
        key: typed random key; each element has its own bits, whatever the mesh.
    """
    # bfloat16 is the upper half of float32: 16 random bits carry into it as often as the lower half says.
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), upper, x).astype(jnp.bfloat16)


def round_tree(tree: Any, what: str, count: jax.Array) -> Any:
    """A float32 tree of parameters, or of moments of them, in bfloat16 by `stochastic_round`.

    Args:
        what: the tree's name. With `count` and the parameter's name it makes the random key: the same run rounds alike.
        count: int32 scalar, which update it is.
    """

    def rounded(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = zlib.crc32(f"{what} {param_name(path)}".encode())
        return stochastic_round(x, jax.random.fold_in(jax.random.key(name), count))

    return jax.tree.map_with_path(rounded, tree)
