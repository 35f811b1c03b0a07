"""The rounds in which a step samples, and which of its rollouts are trained on. On the host.

Most methods sample once and train on everything. Two sample again, up to a limit:

    dynamic sampling  (DAPO, arXiv 2503.14476): groups whose rewards are all equal teach nothing; they are dropped, and
                      other prompts are drawn until the kept groups fill the batch.
    reinforce_ada     (arXiv 2510.04996): prompts without enough right and wrong answers are sampled again; then each
                      prompt keeps `rollout.per_prompt` of its rollouts, half right and half wrong where there are such.

Advantages are those of the whole group, dropped rollouts included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain

import jax
import numpy as np

from dynamo_jax.allocation.reinforce_ada import balanced_choice, satisfied
from dynamo_jax.batch import Pool, PromptBatch
from dynamo_jax.config import Config
from dynamo_jax.objective import overlong_penalty
from dynamo_jax.rollout.sampler import join
from dynamo_jax.rollout.text import decode_rollouts
from dynamo_jax.tasks.tokenizer import Tokenizer

EMPTY = -1  # a row of the training batch without a rollout


def slots(config: Config) -> int:
    """Prompt slots that the pool of one step can have."""
    return config.rollout.prompts * (config.max_rounds if config.rollout.dynamic_sampling.enabled else 1)


def unfinished(config: Config, rounds: Sequence[Pool]) -> bool:
    """Whether the step should sample once more."""
    if len(rounds) >= config.max_rounds:
        return False
    pool = merged(rounds)
    if config.rollout.dynamic_sampling.enabled:
        return bool(np.sum(_counts(pool)[_mixed(pool)]) < config.rollout.budget)
    return bool(np.any(unsatisfied(config, rounds)))


def unsatisfied(config: Config, rounds: Sequence[Pool]) -> np.ndarray:
    """bool [P]: the prompts that `reinforce_ada` samples again."""
    pool = merged(rounds)
    right_P = _right(pool)
    return ~satisfied(right_P, _counts(pool) - right_P, config.rollout.per_prompt)


def merged(rounds: Sequence[Pool]) -> Pool:
    """All rounds as one pool. A round of the same prompts as the first one shares its slots, any other adds its own."""
    if len(rounds) == 1:
        return rounds[0]
    batches: list[PromptBatch] = []
    for one in rounds:
        if not any(one.prompts is batch for batch in batches):
            batches.append(one.prompts)
    first = {id(batch): sum(len(before.ids) for before in batches[:i]) for i, batch in enumerate(batches)}
    *arrays, ids, texts, answers = zip(*batches, strict=True)
    index, tokens, lengths = (np.concatenate(x) for x in arrays)
    return Pool(
        PromptBatch(index, tokens, lengths, *(tuple(chain(*names)) for names in (ids, texts, answers))),
        np.concatenate([one.prompt_of_R + first[id(one.prompts)] for one in rounds]),
        join([one.rollouts for one in rounds]),
        np.concatenate([one.right_R for one in rounds]),
        np.concatenate([one.reward_R for one in rounds]),
    )


def trained_rows(config: Config, pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """int [B]: the rows of the pool that are trained on, those of a group together; EMPTY where there are too few."""
    B = config.rollout.budget
    if config.rollout.dynamic_sampling.enabled:
        kept: list[np.ndarray] = []
        room = B
        for p in np.flatnonzero(_mixed(pool)):
            rows = np.flatnonzero(pool.prompt_of_R == p)
            if len(rows) <= room:  # groups stay whole; a smaller one may still fit
                kept.append(rows)
                room -= len(rows)
        return np.concatenate([*kept, np.full(room, EMPTY)])
    if config.allocation.rule == "reinforce_ada":
        return balanced_choice(pool.right_R, pool.prompt_of_R, len(pool.prompts.ids), config.rollout.per_prompt, rng)
    return np.arange(B)


def shaped_rewards(config: Config, pool: Pool) -> np.ndarray:
    """float32 [R]: the rewards that advantages are made of, plus DAPO's (negative) penalty on over-long ones."""
    return pool.reward_R + _overlong(config, pool)


def padded_pool(config: Config, reward_R: np.ndarray, prompt_of_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Filled up to what the rounds of a step can hold at most, so that one compiled program serves any number of them.

    The filling belongs to the prompt slot after the last one, which group statistics leave out.
    """
    room = (0, config.rollout.budget * config.max_rounds - len(reward_R))
    return np.pad(reward_R, room), np.pad(prompt_of_R, room, constant_values=slots(config)).astype(np.int32)


def record_arrays(config: Config, one: Pool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """index [P], prompt_of, verdict and gradient size [B] of one round, filled up to B, to be recorded."""
    room = (0, config.rollout.budget - len(one.right_R))
    right_R, size_R = one.right_R.astype(np.float32), np.zeros(len(one.right_R), np.float32)
    if config.allocation.rule == "gvm":  # |d log pi / d logits| of a token is between 1 - pi and sqrt(2) times that
        size_R = np.sqrt(np.sum(np.square(1.0 - np.exp(one.rollouts.logp_BC)), axis=1))  # padding has log-prob 0
    prompt_of_B = np.pad(one.prompt_of_R, room, constant_values=config.rollout.prompts).astype(np.int32)
    return one.prompts.index_P, prompt_of_B, np.pad(right_R, room), np.pad(size_R, room)


def shaping_metrics(config: Config, pool: Pool) -> dict[str, float]:
    """The mean of what over-long rollouts lose, where they lose anything."""
    if not config.objective.overlong.enabled:
        return {}
    return {"reward/overlong_penalty": float(_overlong(config, pool).mean())}


def round_metrics(config: Config, rounds: Sequence[Pool], pool: Pool, rows_B: np.ndarray) -> dict[str, float]:
    """What sampling in rounds cost and found; nothing for methods that sample once."""
    if config.max_rounds == 1:
        return {}
    return {
        "rollout/rounds": len(rounds),
        "rollout/sampled": len(pool.reward_R),
        "rollout/mixed_groups": int(_mixed(pool).sum()),
        "rollout/empty_rows": int((rows_B == EMPTY).sum()),
    }


def sample_lines(step: int, pool: Pool, count: int, tokenizer: Tokenizer) -> str:
    """JSON lines of `count` rollouts of the step, evenly spaced, each with its prompt and reward."""
    R = len(pool.reward_R)
    chosen = np.linspace(0, R - 1, min(count, R)).astype(int)
    texts = decode_rollouts(jax.tree.map(lambda x: x[chosen], pool.rollouts), tokenizer)
    lines = []
    for r, text in zip(chosen, texts, strict=True):
        p = int(pool.prompt_of_R[r])
        row = {
            "step": step,
            "rollout": int(r),
            "prompt_id": pool.prompts.ids[p],
            "prompt": pool.prompts.texts[p],
            "text": text,
            "answer": pool.prompts.answers[p],
            "right": bool(pool.right_R[r]),
            "reward": float(pool.reward_R[r]),
            "length": int(pool.rollouts.length_B[r]),
            "ended": bool(pool.rollouts.ended_B[r]),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def _overlong(config: Config, pool: Pool) -> np.ndarray:
    """float32 [R], not positive."""
    o = config.objective.overlong
    if not o.enabled:
        return np.zeros_like(pool.reward_R)
    return np.asarray(
        overlong_penalty(pool.rollouts.length_B, config.rollout.max_tokens, o.buffer, o.factor), np.float32
    )


def _counts(pool: Pool) -> np.ndarray:
    """Rollouts of each slot."""
    return np.bincount(pool.prompt_of_R, minlength=len(pool.prompts.ids))


def _right(pool: Pool) -> np.ndarray:
    return np.bincount(pool.prompt_of_R, weights=pool.right_R, minlength=len(pool.prompts.ids)).astype(int)


def _mixed(pool: Pool) -> np.ndarray:
    """bool [slots]: groups with right and wrong answers."""
    right = _right(pool)
    return (right > 0) & (right < _counts(pool))
