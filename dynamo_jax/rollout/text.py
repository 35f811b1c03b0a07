"""The text of rollouts: what is graded, shown and saved."""

from __future__ import annotations

import jax
import numpy as np

from dynamo_jax.batch import Rollouts
from dynamo_jax.tasks.tokenizer import Tokenizer


def decode_rollouts(rollouts: Rollouts, tokenizer: Tokenizer) -> list[str]:
    """The text of each rollout, without its end-of-sequence token and padding.

    A policy's vocabulary may have ids that the tokenizer has no token for. They are sampled like any other, so that
    `logp_BC` and the gradient are those of the distribution drawn from, and a policy that likes them is told: they show
    in the text as `tasks.tokenizer.UNKNOWN_ID`.
    """
    stop = set(tokenizer.stop_ids)
    texts = []
    for ids, length, ended in zip(rollouts.tokens_BC, rollouts.length_B, rollouts.ended_B, strict=True):
        end = int(length) - 1 if ended and int(ids[length - 1]) in stop else int(length)
        texts.append(tokenizer.decode([int(i) for i in ids[:end]]))
    return texts


def some_texts(rollouts: Rollouts, count: int, tokenizer: Tokenizer) -> tuple[np.ndarray, list[str]]:
    """Rows of `count` rollouts (host arrays), evenly spaced, or of all if there are fewer; and the text of each."""
    R = len(rollouts.length_B)
    rows = np.linspace(0, R - 1, min(count, R)).astype(int)
    return rows, decode_rollouts(jax.tree.map(lambda x: x[rows], rollouts), tokenizer)
