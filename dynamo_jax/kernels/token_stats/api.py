"""The one public door to the token-statistics kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynamo_jax.batch import TokenStats
from dynamo_jax.kernels.token_stats import chunked
from dynamo_jax.kernels.token_stats.reference import reference_token_stats
from dynamo_jax.kernels.token_stats.vjp import Inputs, Plan, fused_token_stats

IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas", "pallas_tpu", "pallas_gpu")


def token_stats(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    impl: str = "auto",
    *,
    mask: jax.Array | None = None,
    mesh: Mesh | None = None,
    token_axes: Sequence[str] = ("data", "fsdp"),
    vocab_axis: str | None = "tensor",
    blocks: tuple[int, int] | None = None,
) -> TokenStats:
    """What the objective needs of pi = softmax(hidden @ head.T / temperature), for each token:

        logp         log pi(target)
        entropy      H = -sum_a pi(a) log pi(a)
        lambda_mean  sum_a pi(a)^2 (log pi(a) + H), the expectation in Eq. 29 of arXiv 2602.19208

    Gradients flow through logp and entropy to hidden and head; lambda_mean carries none.

    Args:
        hidden: float [T, D], final hidden states.
        head: float [V, D], the output embedding; or [X, V, D], a copy of it for each of the X shards that `token_axes`
            split the tokens into (1 without them), whose gradients are then left apart, not summed over shards.
        targets: int [T], each in [0, V); not checked, values may be traced.
        temperature: the policy's sampling temperature, a Python float > 0.
        impl: `reference` (plain, keeps [T, V]), `chunked` (XLA, a block of [T, V] at a time), `pallas` (forward pass in
            the kernel for the device; on a GPU only bfloat16 on Hopper has one, the rest is `chunked`) or `auto`
            (`pallas` for bfloat16 on TPUs, else `chunked`). `pallas_tpu` names a kernel; elsewhere than on a TPU it is
            interpreted, slowly. `pallas_gpu` names one that takes bfloat16 and runs on Hopper only.
        mask: bool or number [T], the tokens that count (not 0). Others get zeros and give no gradient; whole tiles of
            them cost nothing. Nor do, in the backward pass, tokens that get no gradient back. None: all count.
        mesh: run on this mesh, tokens split over `token_axes` and the vocabulary over `vocab_axis` (None: not split);
            each device needs an equal share. Without it XLA places the arrays, which suits one device.
        blocks: (tokens, vocabulary) of the logits that exist at a time; None: the platform's best.

    Returns:
        TokenStats, each float32 [T], nats (float64 for float64 inputs). Gradients have the dtypes of the inputs.

    Raises ValueError for another impl, shapes that do not fit, targets that are not integers, temperature <= 0, blocks
    below 1 or that a kernel cannot have, or a mesh whose axes do not divide T and V.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"token_stats: impl = {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}.")
    if hidden.ndim != 2 or head.ndim not in (2, 3) or hidden.shape[1] != head.shape[-1]:
        raise ValueError(
            f"token_stats: hidden has shape {hidden.shape} and head {head.shape}; give [T, D] and [V, D] with one D "
            "(flatten batch axes first, and transpose a [D, V] head)."
        )
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"token_stats: targets are {targets.dtype}{targets.shape} for hidden {hidden.shape}; "
            f"give integers of shape ({hidden.shape[0]},)."
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"token_stats: mask has shape {mask.shape} for targets {targets.shape}; give one a token.")
    if temperature <= 0:
        raise ValueError(
            f"token_stats: temperature = {temperature}; it must be above 0 (1.0 leaves logits as they are)."
        )
    if blocks is not None and (len(blocks) != 2 or min(blocks) < 1):
        raise ValueError(f"token_stats: blocks = {blocks}; give (tokens, vocabulary), each at least 1, or None.")
    mask = None if mask is None else mask != 0
    axes = _mesh_axes(mesh, token_axes, vocab_axis, hidden.shape[0], head.shape[-2])
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes[0])
    if head.ndim == 3 and len(head) != shards:
        raise ValueError(f"token_stats: head has {len(head)} copies for {shards} shards of tokens; give one for each.")
    if impl == "reference" or hidden.shape[0] == 0:
        stats = reference_token_stats(hidden, head[0] if head.ndim == 3 else head, targets, temperature)
        return stats if mask is None else TokenStats(*(jnp.where(mask, x, 0.0) for x in stats))
    sizes = None if blocks is None else chunked.Blocks(*blocks)
    # XLA cannot split the kernel over devices: without a mesh there must be one, and none are known ahead of time.
    # float32 takes the matrix unit six passes, beside which the kernel saves nothing.
    alone = jax.default_backend() == "tpu" and jax.device_count() == 1
    if impl == "auto" and ((mesh is None and not alone) or hidden.dtype != jnp.bfloat16):
        impl = "chunked"
    return fused_token_stats(Plan(impl, temperature, sizes, mesh, *axes), Inputs(hidden, head, targets, mask))


def _mesh_axes(
    mesh: Mesh | None, token_axes: Sequence[str], vocab_axis: str | None, T: int, V: int
) -> tuple[tuple[str, ...], str | None]:
    """The axes that split something. Raises ValueError if they are not the mesh's or do not divide T and V."""
    if mesh is None:
        return (), None
    for axis in (*token_axes, *([] if vocab_axis is None else [vocab_axis])):
        if axis not in mesh.shape:
            raise ValueError(f"token_stats: the mesh has axes {tuple(mesh.shape)}, but not {axis!r}.")
    tokens = tuple(axis for axis in token_axes if mesh.shape[axis] > 1)
    vocab = vocab_axis if vocab_axis is not None and mesh.shape[vocab_axis] > 1 else None
    for name, size, over in (("T", T, tokens), ("V", V, () if vocab is None else (vocab,))):
        devices = math.prod(mesh.shape[axis] for axis in over)
        if size % devices:
            raise ValueError(
                f"token_stats: {name} = {size} does not divide over the {devices} devices of {', '.join(over)}; "
                "pad it, or choose other axes."
            )
    return tokens, vocab
