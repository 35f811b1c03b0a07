"""The pytrees that flow through a training step, and the axis letters that name their dimensions.

Axes, used as suffixes of array names throughout the package:
  P  prompts in a step             B  rollouts in a step (the budget)      M  rollouts in a mini-batch
  N  prompts in the data set       L  prompt tokens, left-padded           C  completion tokens, right-padded
  T  tokens in a flat list         D  model width                          V  vocabulary
  K  key/value heads               H  head size                            S  sequence slots (L + C)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np


class PromptBatch(NamedTuple):
    """P prompts on the host. A slot p of this batch is what `prompt_of` refers to."""

    index_P: np.ndarray  # int32, row of the data set, the key of all per-prompt statistics
    tokens_PL: np.ndarray  # int32, left-padded
    length_P: np.ndarray  # int32, real tokens
    ids: tuple[str, ...]  # stable names, from the data
    texts: tuple[str, ...]
    answers: tuple[str, ...]


class Rollouts(NamedTuple):
    """B completions. `length_B` counts every sampled token, the end-of-sequence token included if there is one."""

    tokens_BC: jax.Array  # int32, padded after `length_B`
    length_B: jax.Array  # int32, 1 .. C
    ended_B: jax.Array  # bool: stopped by end-of-sequence; False means truncated at C
    logp_BC: jax.Array  # float32, nats, under the tempered, unfiltered policy; 0 on padding


class TokenStats(NamedTuple):
    """What the objective needs to know of each token's distribution. float32, nats."""

    logp: jax.Array
    entropy: jax.Array
    lambda_mean: jax.Array  # sum_a pi(a)^2 (log pi(a) + H); carries no gradient


class TrainBatch(NamedTuple):
    """M rollouts of one mini-batch, with all that their update reads. Row m stays together through permutations."""

    prompt_tokens_ML: jax.Array  # int32, left-padded
    prompt_length_M: jax.Array  # int32
    tokens_MC: jax.Array  # int32, right-padded
    length_M: jax.Array  # int32
    advantage_M: jax.Array  # float32, group-relative
    sampled_logp_MC: jax.Array  # float32, nats, as the sampler saw them


def train_batch(
    prompts: PromptBatch, prompt_of_B: np.ndarray, rollouts: Rollouts, advantage_B: np.ndarray, rows_M: np.ndarray
) -> TrainBatch:
    """Rows `rows_M` of a step's rollouts, with their prompts: host arrays. All is read through `prompt_of_B`."""
    slot_M = prompt_of_B[rows_M]
    return TrainBatch(
        prompts.tokens_PL[slot_M],
        prompts.length_P[slot_M],
        rollouts.tokens_BC[rows_M],
        rollouts.length_B[rows_M],
        advantage_B[rows_M],
        rollouts.logp_BC[rows_M],
    )
