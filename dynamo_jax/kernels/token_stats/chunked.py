"""Token statistics in plain XLA: a scan over blocks of the vocabulary, [tokens, vocabulary] of one block at a time.

The forward pass keeps `sums.Sums`. The backward pass makes each block's logits again:

    dz = g_logp onehot - p (g_logp + g_H (u - B/A)),   p = e^(u - log A)
    d_hidden += dz head_block,   d_head_block = dz^T hidden

Each block of d_head is complete when it is written, in its final dtype; d_hidden is a float32 sum. Rows from
`live` on are skipped in whole tiles of tokens. The head is never padded: its last block may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynamo_jax.kernels.token_stats.reference import logits
from dynamo_jax.kernels.token_stats.sums import Softmax, Sums, empty, merge, sums_of


class Blocks(NamedTuple):
    """How many logits exist at a time."""

    tokens: int
    vocab: int


# On a CPU small blocks stay in its caches. On accelerators d_hidden, [T, D] float32, is read and written once for each
# block of the vocabulary, so blocks are large. With the wide tile d_head is not summed in float32 first. By the TPU
# compiler's estimates it saves 12% at D = 1536, where d_hidden stays in VMEM, and costs 5% at 3584. Narrow tiles are
# also what is skipped of tokens that do not count.
CPU_BLOCKS = Blocks(1024, 1024)
# Where tokens do not count, half a tile of them is computed on average: an eighth of all tokens is 6%. Tiles of 128
# take 13% longer than wide ones, smaller ones more.
CPU_MIN_TOKENS = 128
DEVICE_BLOCKS = Blocks(2048, 2048)
WIDE_BLOCKS = Blocks(8192, 2048)
WIDE_BLOCKS_MAX_D = 2048


def forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: Blocks | None,
) -> Sums:
    """The sums over the columns of `head_VD`. A target outside [0, V) is none of them.

    `live`: int32 scalar, rows from there on mean nothing; None: all rows are wanted. `blocks`: None for the platform's.
    """
    return _by_platform(partial(_forward, temperature=temperature), blocks, hidden_TD, head_VD, targets_T, live)


def backward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    softmax: Softmax,
    g_logp_T: jax.Array,
    g_entropy_T: jax.Array,
    temperature: float,
    blocks: Blocks | None,
) -> tuple[jax.Array, jax.Array]:
    """d_hidden (float32 or wider: over a sharded vocabulary it is yet to be summed) and d_head, as `head_VD`.

    The cotangents of rows from `live` on must be 0.
    """
    f = partial(_backward, temperature=temperature)
    return _by_platform(f, blocks, hidden_TD, head_VD, targets_T, live, softmax, g_logp_T, g_entropy_T)


def cpu_blocks_of_some(T: int) -> Blocks:
    """For T tokens of which only some count."""
    return CPU_BLOCKS._replace(tokens=min(max(T // 8, CPU_MIN_TOKENS), CPU_BLOCKS.tokens))


def _by_platform(f: Callable[..., Any], blocks: Blocks | None, *arrays: Any) -> Any:
    """The platform is known when a program is lowered, not when it is traced; it may not be this machine's."""
    hidden_TD, _, _, live, *_ = arrays
    cpu = CPU_BLOCKS if live is None else cpu_blocks_of_some(hidden_TD.shape[0])
    wide = live is None and hidden_TD.shape[1] <= WIDE_BLOCKS_MAX_D
    device = blocks or (WIDE_BLOCKS if wide else DEVICE_BLOCKS)
    return lax.platform_dependent(
        *arrays,
        cpu=partial(f, blocks=blocks or cpu, fast_bfloat16=False),
        default=partial(f, blocks=device, fast_bfloat16=True),
    )


def _forward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: Blocks,
    fast_bfloat16: bool,
) -> Sums:
    del fast_bfloat16  # products of bfloat16 are exact in float32
    T, dtype = hidden_TD.shape[0], jnp.result_type(hidden_TD, head_VD, jnp.float32)
    tile, tiles = _tiles(T, live, blocks.tokens)
    hidden_TD, targets_T = _pad_rows((hidden_TD, targets_T), tile)

    def one_tile(i: Any, sums_T: Sums) -> Sums:
        hidden_tD, targets_t = _rows((hidden_TD, targets_T), i * tile, tile)

        def one_block(s: Sums, first: Any, size: int) -> Sums:
            z_tv = logits(hidden_tD, lax.dynamic_slice_in_dim(head_VD, first, size), temperature)
            return merge(s, sums_of(z_tv, _is_target(targets_t, first, z_tv.shape)))

        sums_t = _over_vocabulary(one_block, empty((tile,), dtype), head_VD.shape[0], blocks.vocab)
        return jax.tree.map(lambda x, y: _put_rows(x, y, i * tile), sums_T, sums_t)

    sums_T = _repeat(tiles, one_tile, empty(targets_T.shape, dtype))
    return jax.tree.map(lambda x: x[:T], sums_T)


def _backward(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    softmax: Softmax,
    g_logp_T: jax.Array,
    g_entropy_T: jax.Array,
    temperature: float,
    blocks: Blocks,
    fast_bfloat16: bool,
) -> tuple[jax.Array, jax.Array]:
    T, D = hidden_TD.shape
    dtype = softmax.top.dtype
    # A matrix unit made for bfloat16 takes dz rounded to it. A CPU multiplies float32 no slower: there dz stays exact.
    dz_dtype = hidden_TD.dtype if fast_bfloat16 else dtype
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
    tile, tiles = _tiles(T, live, blocks.tokens)
    rows = _pad_rows((hidden_TD, targets_T, softmax, g_logp_T, g_entropy_T), tile)

    def one_block(carry: tuple[jax.Array, jax.Array], first: Any, size: int) -> tuple[jax.Array, jax.Array]:
        d_hidden_TD, d_head_VD = carry
        head_vD = lax.dynamic_slice_in_dim(head_VD, first, size)

        def one_tile(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_hidden_TD, d_head_vD = sums
            hidden_tD, targets_t, s, g_logp_t, g_entropy_t = _rows(rows, i * tile, tile)
            u_tv = logits(hidden_tD, head_vD, temperature) - s.top[:, None]
            p_tv = jnp.exp(u_tv - s.log_sum[:, None])
            g_tv = g_logp_t[:, None] + g_entropy_t[:, None] * (u_tv - s.mean_u[:, None])
            dz_tv = jnp.where(_is_target(targets_t, first, u_tv.shape), g_logp_t[:, None], 0.0) - p_tv * g_tv
            dz_tv = _over(dz_tv, temperature).astype(dz_dtype)
            d_hidden_tD = dot("tv,vd->td", dz_tv, head_vD.astype(dz_dtype))
            d_hidden_tD += _rows(d_hidden_TD, i * tile, tile)
            d_head_vD += dot("tv,td->vd", dz_tv, hidden_tD.astype(dz_dtype))
            return _put_rows(d_hidden_TD, d_hidden_tD, i * tile), d_head_vD

        d_hidden_TD, d_head_vD = _repeat(tiles, one_tile, (d_hidden_TD, jnp.zeros((size, D), dtype)))
        d_head_vD = d_head_vD.astype(head_VD.dtype)
        return d_hidden_TD, lax.dynamic_update_slice_in_dim(d_head_VD, d_head_vD, first, 0)

    # Every block of d_head is written: filling it first would take as long as reading the head.
    none = (jnp.zeros(rows[0].shape, dtype), lax.empty(head_VD.shape, head_VD.dtype))
    d_hidden_TD, d_head_VD = _over_vocabulary(one_block, none, head_VD.shape[0], blocks.vocab)
    return d_hidden_TD[:T], d_head_VD


def _over_vocabulary(one_block: Callable[..., Any], carry: Any, V: int, block: int) -> Any:
    """carry = one_block(carry, first, size) over blocks of the vocabulary. The last one, shorter, is a call apart."""
    block = min(block, V)
    carry = _repeat(V // block, lambda j, carry: one_block(carry, j * block, block), carry)
    return one_block(carry, V - V % block, V % block) if V % block else carry


def _repeat(times: int | jax.Array, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """A `fori_loop`, but no loop for what runs once: its results need not be carried, so they fuse."""
    return body(0, carry) if isinstance(times, int) and times == 1 else lax.fori_loop(0, times, body, carry)


def _tiles(T: int, live: jax.Array | None, block: int) -> tuple[int, int | jax.Array]:
    """Rows of a tile, and how many tiles to compute. Tiles of equal size, so that few rows are padding."""
    tiles = max(1, -(-T // block))
    tile = max(1, -(-T // tiles))
    return tile, tiles if live is None else lax.div(live + (tile - 1), jnp.int32(tile))


def _pad_rows(tree: Any, tile: int) -> Any:
    """Zeros after the last row, up to a multiple of `tile`."""

    def pad(x: jax.Array) -> jax.Array:
        tail = -x.shape[0] % tile
        return jnp.pad(x, [(0, tail)] + [(0, 0)] * (x.ndim - 1)) if tail else x

    return jax.tree.map(pad, tree)


def _rows(tree: Any, first: Any, size: int) -> Any:
    """Rows first .. first + size. All rows are no slice, which keeps tokens that XLA spread over devices in place."""
    return jax.tree.map(lambda x: x if x.shape[0] == size else lax.dynamic_slice_in_dim(x, first, size), tree)


def _put_rows(x: jax.Array, rows: jax.Array, first: Any) -> jax.Array:
    """The inverse of `_rows`."""
    return rows if x.shape == rows.shape else lax.dynamic_update_slice_in_dim(x, rows, first, 0)


def _over(x: jax.Array, temperature: float) -> jax.Array:
    return x if temperature == 1.0 else x / temperature


def _is_target(targets_t: jax.Array, first: Any, shape: tuple[int, ...]) -> jax.Array:
    """Which columns of the block that starts at `first` are targets. A comparison, not a gather, fuses."""
    return lax.broadcasted_iota(targets_t.dtype, shape, 1) == (targets_t - first)[:, None]
