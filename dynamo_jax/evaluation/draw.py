"""Samples of a benchmark, drawn and graded piece by piece: what `eval` saves, and what training counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamo_jax.batch import Rollouts
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.rollout.sampler import Sampler
from dynamo_jax.rollout.text import decode_rollouts
from dynamo_jax.sharding import own_share, total
from dynamo_jax.tasks.grading.extract import extract, reopened
from dynamo_jax.tasks.prompts import PromptSet, pad_prompts
from dynamo_jax.tasks.rewards import Grading
from dynamo_jax.tasks.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Consecutive samples with their verdicts, host arrays, the same on every process but for `texts`."""

    rollouts: Rollouts
    texts: list[str]  # of the share that this process graded
    correct_B: np.ndarray  # bool
    answered_B: np.ndarray  # bool: an answer could be extracted


def content_key(key: jax.Array, prompts: PromptSet) -> jax.Array:
    """The key for the samples of `prompts`: it depends on their content, not on their name or on sets beside them."""
    return jax.random.fold_in(key, int(prompts.fingerprint[:8], 16))


def answered(prompts: PromptSet, texts: Sequence[str]) -> list[bool]:
    """For each response to one of `prompts` whether it gives an answer, right or wrong."""
    opened = prompts.opens_thinking
    return [extract(reopened(text) if opened else text) is not None for text in texts]


def graded_pieces(
    sampler: Sampler,
    params: Any,
    prompts: PromptSet,
    samples: int,
    key: jax.Array,
    tokenizer: Tokenizer,
    grading: Grading,
    max_prompt_tokens: int,
    *,
    done: int = 0,
    each_piece: Callable[[], None] | None = None,
) -> Iterator[Piece]:
    """`samples` samples of each problem after the first `done`, in order, graded while the device makes the next ones.

    Sample s of problem i has the index i * samples + s (see `generate`): it is the same wherever a run goes on, and
    whatever the batch. No more than three pieces are held at once. Each process grades its share of a piece; all of
    them must take all pieces. `each_piece` is called when a piece has been sampled; what it raises ends the evaluation.
    """
    batch = pad_prompts(prompts.prompts[done:], max_prompt_tokens, tokenizer.pad_id)
    prompt_of_B = np.repeat(np.arange(len(batch.ids)), samples)
    waiting: deque[tuple[Rollouts, slice, list[str], Future[Sequence[float]]]] = deque()
    start = 0
    for rollouts in sampler.pieces(params, batch, prompt_of_B, key, first=done * samples):
        if each_piece is not None:
            each_piece()
        size = len(rollouts.length_B)
        share = own_share(size)
        texts = decode_rollouts(jax.tree.map(lambda x, rows=share: x[rows], rollouts), tokenizer)
        golds = [batch.answers[p] for p in prompt_of_B[start : start + size][share]]
        waiting.append((rollouts, share, texts, grading.submit(list(zip(texts, golds, strict=True)))))
        start += size
        if len(waiting) > 1:
            yield _judged(prompts, *waiting.popleft())
    while waiting:
        yield _judged(prompts, *waiting.popleft())


def _judged(
    prompts: PromptSet, rollouts: Rollouts, share: slice, texts: list[str], verdicts: Future[Sequence[float]]
) -> Piece:
    judged_2B = np.zeros((2, len(rollouts.length_B)), np.int32)
    with PROGRESS.doing("grade the evaluation", patient=True):  # one process may have all the answers that take long
        judged_2B[0, share] = np.asarray(verdicts.result()) > 0.5
        judged_2B[1, share] = answered(prompts, texts)
    correct_B, answered_B = total(judged_2B).astype(bool)  # each entry is of one process, 0 on the others
    return Piece(rollouts, texts, correct_B, answered_B)
