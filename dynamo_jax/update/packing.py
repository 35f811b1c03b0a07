"""Packing on the host: the rollouts of a mini-batch into rows of S slots, several to a row.

All shapes are fixed: a mini-batch of M rollouts has M rows, enough if each rollout needs one of its own, in I
micro-batches of G rows. How many of the micro-batches hold anything changes from one to the next, and only those are
computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dynamo_jax.batch import PackedRows, Pool, TrainBatch
from dynamo_jax.kernels.attention_gpu import most_segments


class Shape(NamedTuple):
    """Micro-batches, rows of each, slots of a row."""

    micro_batches: int
    rows: int
    slots: int


class MiniBatch(NamedTuple):
    """Host arrays, or where they lie on the devices."""

    batch: TrainBatch
    live: int  # micro-batches that hold anything, at least 1: the first ones
    tokens: int  # of prompts and completions, in all of them


def fitted(lengths: Iterable[int], slots: int) -> list[list[int]]:
    """Which sequences share a row: first fit, the longest first; of equal ones in order. Empty ones are left out. With
    the padding at its end a row has no more segments than attention on a GPU takes.

    Raises `ValueError` for a sequence that is longer than a row.
    """
    lengths = np.asarray(list(lengths), int)
    order = np.argsort(-lengths, kind="stable")
    if len(lengths) and lengths[order[0]] > slots:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens does not fit into rows of {slots}")
    free = np.full(len(lengths), slots)
    rows: list[list[int]] = []
    for i in order[: np.count_nonzero(lengths)]:
        row = int(np.argmax(free >= lengths[i]))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        full = len(rows[row]) == most_segments(slots) - 1
        free[row] = 0 if full else free[row] - lengths[i]
    return rows


def rows_needed(lengths: Iterable[int], row_tokens: int) -> int:
    """How many rows `fitted` fills."""
    return len(fitted(lengths, row_tokens))


def pack(
    pool: Pool, advantage_R: np.ndarray, weight_R: np.ndarray, random_R: np.ndarray, rows_M: np.ndarray, shape: Shape
) -> MiniBatch:
    """The rollouts `rows_M` of a step, with their prompts. All is read through `prompt_of_R`.

    A rollout of -1 is none: length, advantage and weight are 0, and it takes no room.
    """
    real_M, rows_M = rows_M >= 0, np.maximum(rows_M, 0)
    slot_M, rollouts = pool.prompt_of_R[rows_M], pool.rollouts

    def real(x_R: np.ndarray) -> np.ndarray:
        return np.where(real_M, x_R[rows_M], 0).astype(x_R.dtype)

    M, L = len(rows_M), pool.prompts.tokens_PL.shape[1]
    length_M = real(np.asarray(rollouts.length_B, np.int32))
    prompt_length_M = np.where(real_M, pool.prompts.length_P[slot_M], 0).astype(np.int32)
    filled = fitted(prompt_length_M + length_M, shape.slots)
    live = max(1, -(-len(filled) // shape.rows))

    of = (shape.micro_batches, shape.rows, shape.slots)
    tokens, position = np.zeros(of, np.int32), np.zeros(of, np.int32)
    rollout, sampled_logp = np.full(of, M, np.int32), np.zeros(of, np.float32)
    for row, members in enumerate(filled):
        at = (row % live, row // live)  # every micro-batch gets full rows and the less full ones of the end
        first = 0
        for m in members:
            prompt, length = int(prompt_length_M[m]), int(length_M[m])
            middle, end = first + prompt, first + prompt + length
            tokens[(*at, slice(first, middle))] = pool.prompts.tokens_PL[slot_M[m], L - prompt :]
            tokens[(*at, slice(middle, end))] = rollouts.tokens_BC[rows_M[m], :length]
            sampled_logp[(*at, slice(middle - 1, end - 1))] = rollouts.logp_BC[rows_M[m], :length]
            rollout[(*at, slice(first, end))] = m
            position[(*at, slice(first, end))] = np.arange(prompt + length)
            first = end
    batch = TrainBatch(
        PackedRows(tokens, rollout, position, sampled_logp),  # type: ignore[arg-type]
        *(prompt_length_M, length_M, real(advantage_R), real(weight_R), real(random_R)),  # type: ignore[arg-type]
    )
    return MiniBatch(batch, live, int(prompt_length_M.sum() + length_M.sum()))
