"""How long prompts and responses are taken to be, where a plan says what a step costs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from dynamo_jax.config import Config

SIGMA = 0.8  # of the logarithm of a response's length
RECENT = 10  # newest steps of a run whose lengths count

_NORMAL = NormalDist()
_HOW = "Give --lengths prompt=150,response=900 (means, in tokens), or --lengths RUN_FOLDER."


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Every prompt has `prompt` tokens. Responses are lognormal, cut at `limit`, with mean `response` after the cut.

    With `response` = `limit` all are that long. `source` says where the means are from.
    """

    prompt: float
    response: float
    limit: int
    source: str

    @property
    def median(self) -> float:
        """exp(mu) of the lognormal distribution before the cut: with X lognormal and s = SIGMA,

        E[min(X, c)] = exp(mu + s^2 / 2) Phi((ln c - mu - s^2) / s) + c (1 - Phi((ln c - mu) / s)),

        which grows with mu from 0 to c.
        """
        low, high = -60.0, math.log(self.limit) + 12 * SIGMA
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_of_cut(middle, self.limit) < self.response else (low, middle)
        return math.exp(low)

    def responses(self, count: int) -> np.ndarray:
        """int32 [count]: the quantiles (i + 1/2) / count, the shortest first. At least 1 token each."""
        if self.response >= self.limit:
            return np.full(count, self.limit, np.int32)
        quantiles = np.array([_NORMAL.inv_cdf((i + 0.5) / count) for i in range(count)])
        return np.clip(np.rint(self.median * np.exp(SIGMA * quantiles)), 1, self.limit).astype(np.int32)

    def totals(self, count: int) -> np.ndarray:
        """int32 [count]: tokens of prompt and response of as many rollouts, in no order of length."""
        return np.random.default_rng(0).permutation(self.responses(count) + np.int32(round(self.prompt)))

    def longest(self, count: int) -> float:
        """The expected length of the longest of `count` responses: the sum over x >= 0 of 1 - F(x)^count."""
        if self.response >= self.limit:
            return float(self.limit)
        median = self.median
        shorter = [_NORMAL.cdf(math.log(x / median) / SIGMA) for x in range(1, self.limit)]
        return 1 + float(np.sum(1 - np.array(shorter) ** count))

    def __str__(self) -> str:
        if self.response >= self.limit:
            spread = "all of this length"
        else:
            spread = f"lognormal with sigma {SIGMA}, cut at {self.limit}"
        response = f"responses of {self.response:g} on the average ({spread})"
        return f"prompts of {self.prompt:g} tokens, {response}: {self.source}"


def _mean_of_cut(mu: float, limit: int) -> float:
    z = (math.log(limit) - mu) / SIGMA
    return math.exp(mu + SIGMA**2 / 2) * _NORMAL.cdf(z - SIGMA) + limit * (1 - _NORMAL.cdf(z))


def read_lengths(text: str | None, config: Config) -> Lengths:
    """What `--lengths` says: `prompt=150,response=900`, a run folder, or None for the longest that the recipe allows.

    Raises `ValueError` naming the option, the value and the remedy.
    """
    limits = {"prompt": config.task.max_prompt_tokens, "response": config.rollout.max_tokens}
    if text is None:
        return Lengths(
            limits["prompt"], limits["response"], limits["response"], "the recipe's limits, as --lengths is not given"
        )
    if Path(text).is_dir():
        means, source = _of_run(Path(text)), f"the run {text}"
    elif "=" in text:
        means, source = _of_text(text), f"--lengths {text}"
    else:
        raise ValueError(f"--lengths {text}: is neither a folder nor means. {_HOW}")
    for name, limit in limits.items():
        key = {"prompt": "task.max_prompt_tokens", "response": "rollout.max_tokens"}[name]
        if means[name] > limit:
            raise ValueError(
                f"--lengths: {name} = {means[name]:g} ({source}) is above the recipe's limit {key} = {limit}. Give a "
                f"mean of at most {limit}, or raise {key}."
            )
    return Lengths(means["prompt"], means["response"], limits["response"], source)


def _of_text(text: str) -> dict[str, float]:
    means: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("prompt", "response") or name in means:
            raise ValueError(f"--lengths {text}: {part!r} is not one of prompt=MEAN and response=MEAN. {_HOW}")
        try:
            means[name] = float(value)
        except ValueError:
            means[name] = math.nan
        if not 1 <= means[name] < math.inf:
            raise ValueError(f"--lengths {text}: {name} = {value!r} is not a number of tokens of at least 1. {_HOW}")
    if missing := {"prompt", "response"} - means.keys():
        raise ValueError(f"--lengths {text}: the mean of {missing.pop()} is missing. {_HOW}")
    return means


def _of_run(folder: Path) -> dict[str, float]:
    """Means over the newest steps of a run."""
    path = folder / "metrics.jsonl"
    names = {"prompt": "rollout/prompt_length_mean", "response": "rollout/length_mean"}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--lengths {folder}: {path} cannot be read: {reason}. Is it a run's folder? {_HOW}") from None
    except ValueError as error:
        raise ValueError(f"--lengths {folder}: a line of {path} is no JSON: {error}. {_HOW}") from None
    rows = [line for line in lines if isinstance(line, dict)]
    means = {}
    for key, name in names.items():
        found = [row[name] for row in rows if isinstance(row.get(name), int | float)][-RECENT:]
        if not found:
            raise ValueError(f"--lengths {folder}: no step in {path} has {name}. {_HOW}")
        means[key] = float(np.mean(found))
    return means
