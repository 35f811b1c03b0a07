"""Attention for training, prefill and decoding: one door, so that a faster backend has one place to go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dynamo_jax.kernels import attention_gpu, attention_tpu

# Queries whose scores are held at once: 96 MiB a row for 12 heads, 4096 keys, float32. All 4096 queries take 768 MiB.
BLOCK = 512
# On a CPU queries come in four parts, each with the keys up to its end: at S = 160 in 0.81 of the time.
CPU_PARTS = 4
CPU_MIN_SLOTS = 64


class Seen(NamedTuple):
    """Which keys a query sees: those in slots up to its own, of its own segment."""

    slot_Q: jax.Array  # int32, the slot of each query
    query_BQ: jax.Array  # int32, its segment
    key_BS: jax.Array  # int32, the segment of the key in each slot


def attention(
    q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, slot_Q: jax.Array, valid_BS: jax.Array
) -> jax.Array:
    """Causal grouped-query attention over the slots that hold real tokens.

    softmax(q k^T / sqrt(H)) v, where the query in slot s sees the keys in slots 0 .. s that are valid. A query heads
    share K key/value heads (A a multiple of K). Softmax in float32. A query that sees no key (padding) gets a finite
    value that means nothing.

    Args:
        q_BQAH: queries; k_BSKH, v_BSKH: keys and values of all S slots.
        slot_Q: int32, the slot of each query.
        valid_BS: bool, slots with real tokens.

    Returns: [B, Q, A, H] in the dtype of `q_BQAH`.
    """
    ones_BQ = jnp.ones(q_BQAH.shape[:2], jnp.int32)
    return _in_blocks(q_BQAH, k_BSKH, v_BSKH, Seen(slot_Q, ones_BQ, valid_BS.astype(jnp.int32)))


def segment_attention(
    q_GSAH: jax.Array,
    k_GSKH: jax.Array,
    v_GSKH: jax.Array,
    segment_GS: jax.Array,
    *,
    mesh: Mesh | None = None,
    row_axes: Sequence[str] = ("data", "fsdp"),
    head_axis: str = "tensor",
) -> jax.Array:
    """Causal grouped-query attention within the segments of packed rows, as `attention` otherwise.

    On TPUs bfloat16 goes through jax's splash attention, forward and backward, where the head size and S are multiples
    of 128; on Hopper and later GPUs through cuDNN; all else is plain XLA, a block of queries at a time. cuDNN takes a
    row's segments to be runs of equal numbers, at most `attention_gpu.most_segments(S)` of them.

    Args:
        q_GSAH: queries; k_GSKH, v_GSKH: keys and values.
        segment_GS: int32, tokens of one row and equal number see each other.
        mesh: of the devices that the program is for, rows split over `row_axes`, heads over `head_axis`. Without it XLA
            places the arrays, which suits one device.

    Returns: [G, S, A, H] in the dtype of `q_GSAH`.
    """
    kernel = None if mesh is None else _kernel_of(mesh.devices.flat[0], q_GSAH)
    if kernel is not None:
        rows = PartitionSpec(tuple(row_axes))
        whole = PartitionSpec(tuple(row_axes), None, head_axis)
        return jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(whole, whole, whole, rows),
            out_specs=whole,
            check_vma=False,
        )(q_GSAH, k_GSKH, v_GSKH, segment_GS)
    S = q_GSAH.shape[1]
    # Gradients of keys are added up over the parts, in the dtype of the keys.
    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu" and q_GSAH.dtype == jnp.float32
    if on_cpu and CPU_MIN_SLOTS <= S <= BLOCK:
        return _in_parts(q_GSAH, k_GSKH, v_GSKH, segment_GS)
    return _in_blocks(q_GSAH, k_GSKH, v_GSKH, Seen(jnp.arange(S), segment_GS, segment_GS))


def _kernel_of(device: jax.Device, q_GSAH: jax.Array) -> Callable[..., jax.Array] | None:
    """What attends to rows and heads of one device; None: it has no kernel for such queries."""
    if device.platform == "tpu" and attention_tpu.takes(q_GSAH):
        return attention_tpu.segment_attention
    if device.platform == "gpu" and attention_gpu.takes(q_GSAH, device):
        return attention_gpu.segment_attention
    return None


def _in_parts(q_GSAH: jax.Array, k_GSKH: jax.Array, v_GSKH: jax.Array, segment_GS: jax.Array) -> jax.Array:
    """`_plain`, a part of the queries at a time: keys behind its end are in the future of all of them."""
    S, parts = q_GSAH.shape[1], []
    size = -(-S // CPU_PARTS)
    for first in range(0, S, size):
        end = min(first + size, S)
        seen = Seen(jnp.arange(first, end), segment_GS[:, first:end], segment_GS[:, :end])
        parts.append(_plain(q_GSAH[:, first:end], k_GSKH[:, :end], v_GSKH[:, :end], seen))
    return jnp.concatenate(parts, axis=1)


def _in_blocks(q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen: Seen) -> jax.Array:
    return (_plain if q_BQAH.shape[1] <= BLOCK else _blockwise)(q_BQAH, k_BSKH, v_BSKH, seen)


def _plain(q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen: Seen) -> jax.Array:
    causal_QS = jnp.arange(k_BSKH.shape[1])[None, :] <= seen.slot_Q[:, None]
    mask_B1QS = causal_QS[None, None] & (seen.query_BQ[:, None, :, None] == seen.key_BS[:, None, None, :])
    # A TPU multiplies float32 matrices in bfloat16 unless told otherwise. bfloat16 needs no telling.
    exact = jax.default_matmul_precision("highest") if q_BQAH.dtype == jnp.float32 else nullcontext()
    with exact:
        return jax.nn.dot_product_attention(q_BQAH, k_BSKH, v_BSKH, mask=mask_B1QS)


def _blockwise(q_BQAH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen: Seen) -> jax.Array:
    """`_plain`, `BLOCK` queries at a time; the backward pass computes a block's scores again."""
    B, Q, A, H = q_BQAH.shape
    blocks = -(-Q // BLOCK)

    def split(x: jax.Array, axis: int) -> jax.Array:
        """The queries' axis in blocks, which come first."""
        room = [(0, blocks * BLOCK - Q if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], blocks, BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, room).reshape(shape), axis, 0)

    # float32 outside of the loop, so that the gradients of the blocks are summed in float32; inside as they came.
    wide = tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k_BSKH, v_BSKH))

    @jax.checkpoint
    def one(block: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
        q, slot, query = block
        return _plain(q, k.astype(k_BSKH.dtype), v.astype(v_BSKH.dtype), Seen(slot, query, seen.key_BS))

    in_blocks = (split(q_BQAH, 1), split(seen.slot_Q, 0), split(seen.query_BQ, 1))
    out: jax.Array = jax.lax.map(lambda block: one(block, *wide), in_blocks)
    return out.swapaxes(0, 1).reshape(B, -1, A, H)[:, :Q]
