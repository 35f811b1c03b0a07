"""Evaluation: Pass@1, unbiased Pass@k, and how sure they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from dynamo_jax.config import Config
from dynamo_jax.evaluation.draw import graded_pieces
from dynamo_jax.rollout.sampler import Sampler
from dynamo_jax.tasks.prompts import PromptSet
from dynamo_jax.tasks.rewards import Grader, Grading, verdict_of
from dynamo_jax.tasks.tokenizer import Tokenizer

RESAMPLES = 1000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from c right ones of n.

    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1), as a product, which neither overflows nor cancels.
    Raises `ValueError` unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}: draw more samples")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The graded samples of one benchmark: `samples` for each problem, rows in the order of its problems.

    Problems that were too long to be sampled (`dropped`) count as never right: a score must not be better for what it
    leaves out. `allow_dropped` leaves them out, as scores of other problems than the benchmark's.
    """

    name: str
    ids: tuple[str, ...]
    samples: int
    correct: np.ndarray  # bool [problems, samples]
    length: np.ndarray  # int32 [problems, samples], tokens
    truncated: np.ndarray  # bool [problems, samples]
    no_answer: np.ndarray | None = None  # bool [problems, samples]: nothing could be extracted; None: not looked at
    dropped: tuple[str, ...] = ()  # ids
    allow_dropped: bool = False

    @property
    def right_counts(self) -> dict[str, int]:
        """How many samples of each problem that counts are right."""
        counted = dict(zip(self.ids, self.correct.sum(axis=1).tolist(), strict=True))
        return counted if self.allow_dropped else counted | dict.fromkeys(self.dropped, 0)

    def pass_at(self, k: int) -> tuple[float, float, float]:
        """Pass@k and its 95% interval: the mean over problems, resampled 1000 times with a fixed seed (bootstrap)."""
        scores = np.array([pass_at_k(self.samples, count, k) for count in self.right_counts.values()])
        draws = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
        low, high = np.quantile(scores[draws].mean(axis=1), [0.025, 0.975])
        return float(scores.mean()), float(low), float(high)

    def metrics(self, ks: Sequence[int]) -> dict[str, float]:
        """`eval/<name>/pass@k` with `_low` and `_high`, `dropped`: how many problems were too long to be sampled.

        And of the samples the mean length in tokens, the fractions that were truncated and that had no answer.
        """
        out: dict[str, float] = {}
        for k in ks:
            value, low, high = self.pass_at(k)
            out |= {f"pass@{k}": value, f"pass@{k}_low": low, f"pass@{k}_high": high}
        out |= {"length_mean": float(self.length.mean()), "truncated_fraction": float(self.truncated.mean())}
        if self.no_answer is not None:
            out["no_answer_fraction"] = float(self.no_answer.mean())
        out["dropped"] = float(len(self.dropped))
        return {f"eval/{self.name}/{key}": value for key, value in out.items()}


def evaluate(
    sampler: Sampler,
    params: Any,
    prompts: PromptSet,
    samples: int,
    key: jax.Array,
    tokenizer: Tokenizer,
    verifier: Grader,
    max_prompt_tokens: int,
    *,
    each_piece: Callable[[], None] | None = None,
) -> Evaluation:
    """Sample every problem `samples` times and grade. The same parameters and key give the same evaluation.

    Of the samples only lengths and verdicts are kept. `each_piece` is called after each piece of them and may raise.
    """
    with closing(Grading(verdict_of(verifier))) as grading:
        pieces = graded_pieces(
            sampler, params, prompts, samples, key, tokenizer, grading, max_prompt_tokens, each_piece=each_piece
        )  # fmt: skip
        kept = [(p.correct_B, p.answered_B, p.rollouts.length_B, p.rollouts.ended_B) for p in pieces]
    shape = (len(prompts), samples)
    correct, answered, length, ended = (np.concatenate(x).reshape(shape) for x in zip(*kept, strict=True))
    ids = tuple(prompt.id for prompt in prompts.prompts)
    return Evaluation(prompts.name, ids, samples, correct, length, ~ended, ~answered, prompts.dropped_ids)


def evaluate_each(
    sampler: Sampler,
    params: Any,
    sets: Sequence[PromptSet],
    config: Config,
    key: jax.Array,
    tokenizer: Tokenizer,
    verifier: Grader,
    *,
    each_piece: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The metrics of every set, as `eval` and `task` of the settings say; otherwise as `evaluate`."""
    metrics: dict[str, float] = {}
    for number, prompts in enumerate(sets):
        evaluation = evaluate(
            sampler,
            params,
            prompts,
            config.eval.samples,
            jax.random.fold_in(key, number),
            tokenizer,
            verifier,
            config.task.max_prompt_tokens,
            each_piece=each_piece,
        )
        metrics |= evaluation.metrics(config.eval.k)
    return metrics


def right(verifier: Grader, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """bool [len(pairs)]: which are right, whatever is added to the reward for form and length."""
    return np.array(verdict_of(verifier).grade_batch(pairs), np.float64) > 0.5


def table(evaluations: Sequence[Evaluation], ks: Sequence[int]) -> str:
    """A Markdown table, in percent: a row for each benchmark and their mean last.

    The problems are those that count; a last column has the dropped ones, if there are any.
    """
    head = ["benchmark", "problems", "samples", *(f"Pass@{k}" for k in ks), "mean tokens", "truncated", "no answer"]
    some_dropped = any(e.dropped for e in evaluations)
    head += ["dropped"] * some_dropped
    rows = []
    for e in evaluations:
        scores = ["{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in e.pass_at(k))) for k in ks]
        sizes = [str(len(e.right_counts)), str(e.samples)]
        rows.append([e.name, *sizes, *scores, f"{e.length.mean():.0f}", f"{100 * e.truncated.mean():.1f}%"])
        rows[-1].append("" if e.no_answer is None else f"{100 * e.no_answer.mean():.1f}%")
        rows[-1] += [str(len(e.dropped))] * some_dropped
    if len(evaluations) > 1:
        means = [f"{100 * np.mean([e.pass_at(k)[0] for e in evaluations]):.1f}" for k in ks]
        rows.append(["mean", "", "", *means, *[""] * (len(head) - 3 - len(ks))])
    return _markdown(head, rows)


def wide_table(evaluations: Sequence[Evaluation], ks: Sequence[int]) -> str:
    """The paper's layout, in percent: a column for each benchmark and their mean last, a row for each k."""
    head = ["", *(e.name for e in evaluations), "mean"]
    rows = []
    for k in ks:
        scores = [100 * e.pass_at(k)[0] for e in evaluations]
        name = f"Avg@{evaluations[0].samples}" if k == 1 else f"Pass@{k}"
        rows.append([name, *(f"{score:.1f}" for score in [*scores, float(np.mean(scores))])])
    return _markdown(head, rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])
