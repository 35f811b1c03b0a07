"""The text of rollouts: what is graded, shown and saved."""

from __future__ import annotations

from dynamo_jax.batch import Rollouts
from dynamo_jax.tasks.tokenizer import Tokenizer


def decode_rollouts(rollouts: Rollouts, tokenizer: Tokenizer) -> list[str]:
    """The text of each rollout, without its end-of-sequence token and padding."""
    stop = set(tokenizer.stop_ids)
    texts = []
    for ids, length, ended in zip(rollouts.tokens_BC, rollouts.length_B, rollouts.ended_B, strict=True):
        end = int(length) - 1 if ended and int(ids[length - 1]) in stop else int(length)
        texts.append(tokenizer.decode([int(i) for i in ids[:end]]))
    return texts
