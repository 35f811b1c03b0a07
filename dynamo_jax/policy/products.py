"""Products with weights that a mesh splits: gathered in the compute dtype right before use, gradients scattered back.

A weight is split over `fsdp` along the axis that most products sum over. Left alone the compiler multiplies the parts
and adds up as many arrays of [tokens, outputs] in HBM, which takes ten times as long as the product itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial

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
    split = plan.axes.index("embed")
    # The split axis first, so that each device's part is a run of whole rows.
    order = of_w[split] + of_w.replace(of_w[split], "")

    def local(x: jax.Array, dy: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        multiply = partial(jnp.einsum, f"{of_x},{of_y}->{order}", precision=plan.precision, preferred_element_type=wide)
        # XLA on CPUs has no product of bfloat16 with a float32 result where it has folded a transposition into it.
        dw = jax.lax.platform_dependent(
            x, dy, cpu=lambda x, dy: multiply(x.astype(wide), dy.astype(wide)), default=multiply
        )
        if plan.mesh is not None:
            dw = scattered(dw.reshape(len(dw), -1), plan.mesh).reshape(-1, *dw.shape[1:])
        return jnp.moveaxis(dw, 0, split)

    if plan.mesh is None:
        return local(x, dy)
    where = {letter: RULES[axis] for letter, axis in zip(of_w, plan.axes, strict=True)}
    # Rows come first. Of a weight's axes an activation is split along those of heads and of the MLP, as the weight is.
    activation = {**where, of_x[0]: RULES["batch"], of_w[split]: None}
    specs = [
        PartitionSpec(*(axes.get(letter) for letter in letters))
        for letters, axes in ((of_x, activation), (of_y, activation), (of_w, where))
    ]
    return jax.shard_map(local, mesh=plan.mesh, in_specs=(specs[0], specs[1]), out_specs=specs[2], check_vma=False)(
        x, dy
    )


product.defvjp(_forward, _backward)


def scattered(x: jax.Array, mesh: Mesh, axis: int = 0) -> jax.Array:
    """The sum over all shards of rows, of which each device keeps its `fsdp` part of `axis`. Inside a `shard_map`.

    In phases of at most four devices: across more than one dimension of a slice's links the compiler of TPUs knows no
    reduce-scatter, and would have every device receive the whole sum.
    """
    size = mesh.shape["fsdp"]
    stride = size
    for factor in _factors(size):
        stride //= factor
        # Devices that are `stride` apart, in each run of stride * factor: so that parts come to lie in order.
        runs = range(0, size, stride * factor)
        groups = [[run + i + stride * j for j in range(factor)] for run in runs for i in range(stride)]
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return jax.lax.psum(x, "data") if mesh.shape["data"] > 1 else x


def _factors(size: int) -> list[int]:
    """Fours as far as they go, then primes."""
    for factor in (4, *range(2, size + 1)):
        if size % factor == 0:
            return [factor, *_factors(size // factor)]
    return []


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
        return jnp.asarray(table_VD)[None]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    table_VD = gathered(table_VD, ("vocab", "embed"), mesh)
    table_XVD = jnp.broadcast_to(table_VD[None], (shards, *table_VD.shape))
    return jax.lax.with_sharding_constraint(table_XVD, sharding(mesh, "batch", "vocab"))


def lookup(table_XVD: jax.Array, tokens_GS: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[G, S, D]: each token's row of the copy that belongs to its row's shard."""

    def local(table_1VD: jax.Array, tokens_GS: jax.Array) -> jax.Array:
        place_GS = _own(tokens_GS, table_1VD.shape[1], mesh)
        x_GSD = table_1VD[0].at[place_GS].get(mode="fill", fill_value=0)
        return jax.lax.psum(x_GSD, "tensor") if _splits_vocabulary(mesh) else x_GSD

    if mesh is None:
        return local(table_XVD, tokens_GS)
    apart, rows = sharding(mesh, "batch", "vocab").spec, sharding(mesh, "batch").spec
    return jax.shard_map(local, mesh=mesh, in_specs=(apart, rows), out_specs=rows, check_vma=False)(
        table_XVD, tokens_GS
    )


def lookup_gradient(sums_XVD: jax.Array, tokens_GS: jax.Array, dx_GSD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`sums_XVD`, float32, and the gradient of `lookup` for its table, each shard's in its own copy.

    A frequent token has thousands of rows, whose sum in bfloat16 would stop growing.
    """

    def local(sums_1VD: jax.Array, tokens_GS: jax.Array, dx_GSD: jax.Array) -> jax.Array:
        place_GS = _own(tokens_GS, sums_1VD.shape[1], mesh)
        return sums_1VD.at[0, place_GS].add(dx_GSD.astype(sums_1VD.dtype), mode="drop")

    if mesh is None:
        return local(sums_XVD, tokens_GS, dx_GSD)
    apart, rows = sharding(mesh, "batch", "vocab").spec, sharding(mesh, "batch").spec
    f = jax.shard_map(local, mesh=mesh, in_specs=(apart, rows, rows), out_specs=apart, check_vma=False)
    return f(sums_XVD, tokens_GS, dx_GSD)


def _own(tokens_GS: jax.Array, size: int, mesh: Mesh | None) -> jax.Array:
    """Each token's row in the part of the vocabulary that a device holds; one behind its end if it is not there."""
    if not _splits_vocabulary(mesh):
        return tokens_GS
    place_GS = tokens_GS - jax.lax.axis_index("tensor") * size
    return jnp.where((place_GS >= 0) & (place_GS < size), place_GS, size)


def _splits_vocabulary(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.shape["tensor"] > 1
