"""Products with weights that a mesh splits: gathered in the compute dtype right before use, gradients scattered back.

A weight is split over `fsdp` along the axis that most products sum over. Left alone the compiler multiplies the parts
and adds up as many arrays of [tokens, outputs] in HBM, which takes ten times as long as the product itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dynamo_jax.sharding import RULES, sharding

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """Everything static. `mesh` None: one device, or arrays that the compiler places by itself."""

    equation: str  # inputs and weight -> outputs, as of `einsum`
    axes: Axes  # logical axis of each dimension of the weight
    precision: jax.lax.Precision | None = None
    mesh: Mesh | None = None

    @property
    def letters(self) -> tuple[str, str, str]:
        """Of the inputs, the weight and the outputs."""
        inputs, outputs = self.equation.split("->")
        x, w = inputs.split(",")
        return x, w, outputs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(plan: Product, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(equation, x, weight) in the dtype of x.

    The weight is rounded to the dtype of x and gathered over `fsdp`, in the backward pass once more. Its gradient is
    summed in float32, over the devices too, and left split as the weight is.
    """
    return jnp.einsum(
        plan.equation, x, gathered(weight.astype(x.dtype), plan.axes, plan.mesh), precision=plan.precision
    )


def _forward(plan: Product, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(plan, x, weight), (x, weight)


def _backward(plan: Product, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, weight), (of_x, of_w, of_y) = kept, plan.letters
    whole = gathered(weight.astype(x.dtype), plan.axes, plan.mesh)
    dx = jnp.einsum(f"{of_y},{of_w}->{of_x}", dy, whole, precision=plan.precision)
    return dx, _weight_gradient(plan, x, dy).astype(weight.dtype)


def _weight_gradient(plan: Product, x: jax.Array, dy: jax.Array) -> jax.Array:
    """float32, or wider; split as the weight is.

    Each device multiplies its own tokens, all at once, and the sums over devices are scattered. Left alone the compiler
    splits the product into one for each part, of a width that the matrix unit is bad at.
    """
    of_x, of_w, of_y = plan.letters

    def local(x: jax.Array, dy: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        dw = jnp.einsum(f"{of_x},{of_y}->{of_w}", x, dy, precision=plan.precision, preferred_element_type=wide)
        if plan.mesh is None:
            return dw
        if plan.mesh.shape["fsdp"] > 1:
            split = plan.axes.index("embed")
            dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=split, tiled=True)
        return jax.lax.psum(dw, "data") if plan.mesh.shape["data"] > 1 else dw

    if plan.mesh is None:
        return local(x, dy)
    where = {letter: RULES[axis] for letter, axis in zip(of_w, plan.axes, strict=True)}
    # Rows come first. Of a weight's axes an activation is split along those of heads and of the MLP, as the weight is.
    activation = {**where, of_x[0]: RULES["batch"], of_w[plan.axes.index("embed")]: None}
    specs = [
        PartitionSpec(*(axes.get(letter) for letter in letters))
        for letters, axes in ((of_x, activation), (of_y, activation), (of_w, where))
    ]
    return jax.shard_map(local, mesh=plan.mesh, in_specs=(specs[0], specs[1]), out_specs=specs[2], check_vma=False)(
        x, dy
    )


product.defvjp(_forward, _backward)


def gathered(weight: jax.Array, axes: Axes, mesh: Mesh | None) -> jax.Array:
    """The weight whole over `fsdp`, still split over `tensor`."""
    if mesh is None:
        return weight
    kept = tuple(None if axis == "embed" else axis for axis in axes)
    return jax.lax.with_sharding_constraint(weight, sharding(mesh, *kept))


def copies(table_VD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[X, V, D]: the table of the vocabulary, gathered, a copy for each of the X shards of rows.

    Each device holds one copy, as it would anyway. The gradients of the copies are not added up over devices, so that
    this can be done once an update and not once a micro-batch.
    """
    if mesh is None:
        return table_VD[None]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    table_VD = gathered(table_VD, ("vocab", "embed"), mesh)
    table_XVD = jnp.broadcast_to(table_VD[None], (shards, *table_VD.shape))
    return jax.lax.with_sharding_constraint(table_XVD, sharding(mesh, "batch", "vocab"))


def lookup(table_XVD: jax.Array, tokens_GS: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[G, S, D]: each token's row of the copy that belongs to its row's shard. Gradients are summed in float32."""
    if mesh is None:
        return _rows(table_XVD[0], tokens_GS)
    vocab: Any = RULES["vocab"] if mesh.shape["tensor"] > 1 else None

    def local(table_1VD: jax.Array, tokens_GS: jax.Array) -> jax.Array:
        table_VD = table_1VD[0]
        if vocab is None:
            return _rows(table_VD, tokens_GS)
        tokens_GS = tokens_GS - jax.lax.axis_index(vocab) * table_VD.shape[0]
        here_GS = (tokens_GS >= 0) & (tokens_GS < table_VD.shape[0])
        x_GSD = _rows(table_VD, jnp.where(here_GS, tokens_GS, 0)) * here_GS[..., None].astype(table_VD.dtype)
        return jax.lax.psum(x_GSD, vocab)

    rows = PartitionSpec(RULES["batch"])
    specs = (PartitionSpec(RULES["batch"], vocab), rows)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(table_XVD, tokens_GS)


@jax.custom_vjp
def _rows(table_VD: jax.Array, tokens_GS: jax.Array) -> jax.Array:
    return table_VD[tokens_GS]


def _rows_forward(table_VD: jax.Array, tokens_GS: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table_VD[tokens_GS], (table_VD, tokens_GS)


def _rows_backward(kept: tuple[jax.Array, jax.Array], dx_GSD: jax.Array) -> tuple[jax.Array, None]:
    # A frequent token has thousands of rows: their sum in bfloat16 would stop growing.
    table_VD, tokens_GS = kept
    wide = jnp.promote_types(table_VD.dtype, jnp.float32)
    sums_VD = jnp.zeros(table_VD.shape, wide).at[tokens_GS].add(dx_GSD.astype(wide))
    return sums_VD.astype(table_VD.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
