"""Grading where the rollouts are: every process decodes and grades its share, while the devices make the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

import jax
import numpy as np

from dynamo_jax.batch import Rollouts
from dynamo_jax.rollout.text import decode_rollouts
from dynamo_jax.sharding import own_share, total
from dynamo_jax.tasks.rewards import PULSE_SECONDS, Grader, Grading, Signs, added_reward, verdict_of
from dynamo_jax.tasks.tokenizer import Tokenizer


class Judge:
    """Grades one round of rollouts, piece by piece. Every process makes one and gives it the same pieces."""

    def __init__(self, grading: Grading, verifier: Grader, tokenizer: Tokenizer) -> None:
        self._grading, self._verifier, self._tokenizer = grading, verifier, tokenizer
        self._pieces: list[tuple[int, slice, list[str], Future[Sequence[float]]]] = []

    def add(self, piece: Rollouts, answers: Sequence[str]) -> None:
        """Take the next rollouts (host arrays) and the reference answer of each. Returns at once."""
        share = own_share(len(answers))
        texts = decode_rollouts(jax.tree.map(lambda x: x[share], piece), self._tokenizer)
        verdicts = self._grading.submit(list(zip(texts, answers[share], strict=True)))
        self._pieces.append((len(answers), share, texts, verdicts))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [R] each: the verdicts on all rollouts, of all processes, and what is added to them.

        Raises what grading raised.
        """
        rewards = []
        for size, share, texts, verdicts in self._pieces:
            reward_2R = np.zeros((2, size), np.float32)
            reward_2R[0, share] = self._waited_for(verdicts)
            reward_2R[1, share] = [added_reward(self._verifier, text) for text in texts]
            rewards.append(reward_2R)
        verdict_R, added_R = total(np.concatenate(rewards, axis=1))  # each entry is of one process, 0 on the others
        return verdict_R, added_R

    def _waited_for(self, verdicts: Future[Sequence[float]]) -> Sequence[float]:
        """Others may wait for this process: as long as answers come out of the verifier it says that it works."""
        signs = Signs(verdict_of(self._verifier))
        while True:
            try:
                return verdicts.result(timeout=PULSE_SECONDS)
            except NotYet:
                if verdicts.done():
                    return verdicts.result()  # it ended just now, or raised a TimeoutError of its own
                signs.look()
