"""The pytrees that flow through a training step, and the axis letters that name their dimensions.

Axes, used as suffixes of array names throughout the package, each letter with one meaning:
  P  prompts in a step             N  prompts in the data set              E  features of a prompt
  B  rollouts in a step            M  rollouts in a mini-batch             R  rollouts that a step sampled
  L  prompt tokens, left-padded    C  completion tokens, right-padded      S  slots of a row, of a sequence
  Q  query positions               T  tokens in a flat list                V  vocabulary
  Z  layers                        D  model width                          F  width of the MLP
  A  query heads                   K  key/value heads                      H  head size
  W  random Fourier features       U  rollouts above the lower bound of an allocation
  I  micro-batches                 G  rows of a micro-batch                X  shards of rows
B is the budget; R is B unless the method samples in rounds. A digit is a size (x_B1D), a small letter a part of its
axis: a block of tokens (z_tv), a piece of rollouts (rows_b).
"""

from __future__ import annotations

from typing import NamedTuple

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


class PackedRows(NamedTuple):
    """Rows of S slots that hold several rollouts each: prompt and completion of one after those of another.

    Arrays of one shape, [G, S] of a micro-batch or [I, G, S] of a mini-batch. What is known or asked of a
    token is kept in the slot before its own, whose hidden state predicts it.
    """

    tokens: jax.Array  # int32
    rollout: jax.Array  # int32, 0 .. M - 1; M: padding
    position: jax.Array  # int32, the token's place in prompt and completion, from 0
    sampled_logp: jax.Array  # float32, nats, of the token that the slot predicts, as the sampler saw it
    reference_logp: jax.Array | None = None  # the same under the reference policy, where the loss has a KL to it


class TrainBatch(NamedTuple):
    """M rollouts of one mini-batch, with all that their update reads."""

    rows: PackedRows  # [I, G, S]
    prompt_length_M: jax.Array  # int32
    length_M: jax.Array  # int32; 0: nothing was sampled, or nothing is trained
    advantage_M: jax.Array  # float32, group-relative
    weight_M: jax.Array  # float32, multiplies the rollout's loss
    random_M: jax.Array  # uint32, of (seed, step, rollout): random choices among its tokens derive from it


class Tokens(NamedTuple):
    """What the objective knows of each token that is predicted. Arrays of one shape, such as [I, G, S] or [M, C]."""

    mask: jax.Array  # float32: 1 on sampled tokens, the end-of-sequence token included
    step: jax.Array  # int32, the token's place in its completion, from 0
    rollout: jax.Array  # int32, 0 .. M - 1; M: of none
    advantage: jax.Array  # float32, its rollout's
    weight: jax.Array  # float32, its rollout's
    random: jax.Array  # uint32, its rollout's
    sampled_logp: jax.Array  # float32, nats
    reference_logp: jax.Array | None = None  # float32, nats


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


def tokens_of(batch: TrainBatch, rows: PackedRows) -> Tokens:
    """What each slot of these rows of the mini-batch predicts."""

    def look_up(x_M: jax.Array) -> jax.Array:
        return jnp.append(x_M, jnp.zeros((), x_M.dtype))[rows.rollout]

    step = rows.position + 1 - look_up(batch.prompt_length_M)
    mask = (step >= 0) & (step < look_up(batch.length_M))
    return Tokens(
        mask.astype(jnp.float32),
        step,
        rows.rollout,
        look_up(batch.advantage_M),
        look_up(batch.weight_M),
        look_up(batch.random_M),
        rows.sampled_logp,
        rows.reference_logp,
    )
