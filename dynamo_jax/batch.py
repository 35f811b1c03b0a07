"""The pytrees that flow through a training step, and the axis letters that name their dimensions.

Axes, used as suffixes of array names throughout the package, each letter with one meaning:
  P  prompts in a step             N  prompts in the data set              E  features of a prompt
  B  rollouts in a step            M  rollouts in a mini-batch             R  rollouts that a step sampled
  L  prompt tokens, left-padded    C  completion tokens, right-padded      S  sequence slots (L + C)
  Q  query positions               T  tokens in a flat list                V  vocabulary
  Z  layers                        D  model width                          F  width of the MLP
  A  query heads                   K  key/value heads                      H  head size
  W  random Fourier features       U  rollouts above the lower bound of an allocation
B is the budget; R is B unless the method samples in rounds. A digit is a size (x_B1D), a small letter a part of its
axis: a block of tokens (z_tv), a piece of rollouts (rows_b).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    length_M: jax.Array  # int32; 0: nothing was sampled for this row
    advantage_M: jax.Array  # float32, group-relative
    weight_M: jax.Array  # float32, multiplies the row's loss
    random_M: jax.Array  # uint32, of (seed, step, rollout): random choices among the row's tokens derive from it
    sampled_logp_MC: jax.Array  # float32, nats, as the sampler saw them


class Pool(NamedTuple):
    """The R rollouts that a step sampled, in one or more rounds. Host arrays."""

    prompts: PromptBatch
    prompt_of_R: np.ndarray  # int32, slot in `prompts`
    rollouts: Rollouts
    right_R: np.ndarray  # bool, the verdict: what allocation goes by
    reward_R: np.ndarray  # float32: the verdict, or a graded reward
    penalty_R: np.ndarray  # float32, not positive: what over-long rollouts lose
    success_P: np.ndarray  # float32, success rate of each slot's prompt, as allocation expected it before the step

    @property
    def shaped_R(self) -> np.ndarray:
        """float32 [R]: the rewards that advantages are made of."""
        shaped_R: np.ndarray = self.reward_R + self.penalty_R
        return shaped_R


def train_batch(
    pool: Pool, advantage_R: np.ndarray, weight_R: np.ndarray, random_R: np.ndarray, rows_M: np.ndarray
) -> TrainBatch:
    """Rows `rows_M` of a step's rollouts, with their prompts: host arrays. All is read through `prompt_of_R`.

    A row of -1 is empty: length, advantage and weight 0.
    """
    real_M, rows_M = rows_M >= 0, np.maximum(rows_M, 0)
    slot_M = pool.prompt_of_R[rows_M]

    def real(x_R: Any) -> Any:
        return np.where(real_M, x_R[rows_M], 0).astype(x_R.dtype)

    return TrainBatch(
        pool.prompts.tokens_PL[slot_M],
        pool.prompts.length_P[slot_M],
        pool.rollouts.tokens_BC[rows_M],
        real(pool.rollouts.length_B),
        real(advantage_R),
        real(weight_R),
        real(random_R),
        pool.rollouts.logp_BC[rows_M],
    )


def micro_batches(tree: Any, size: int) -> Any:
    """[M, ...] -> [M / size, size, ...]. Strided, so that rows stay on their device: its shards are contiguous in M."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def whole(tree: Any) -> Any:
    """The inverse of `micro_batches`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
