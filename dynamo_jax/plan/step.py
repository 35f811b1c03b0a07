"""What a training step costs: how often it calls each program, and what that adds up to.

`PROGRAMS` is the one place that knows how the trainer calls its programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from dynamo_jax.config import ArchitectureConfig, Config
from dynamo_jax.objective.terms import reads_now
from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.policy.params import axis_sizes, params_of
from dynamo_jax.update.packing import rows_needed

# Turns of a bisection over the bit patterns of positive float32 numbers, which are below 2^31. The constants of its
# conditions are widths of the interval, not counts.
BISECTION = 31.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of `config` has to do with rollouts of these lengths."""

    config: Config
    lengths: Lengths

    @property
    def mini_batches(self) -> int:
        return self.config.rollout.budget // self.config.mini_batch

    @functools.cached_property
    def live(self) -> list[int]:
        """Micro-batches of each mini-batch that hold anything, its rollouts packed as the trainer packs them."""
        totals_BM = self.lengths.totals(self.config.rollout.budget).reshape(self.mini_batches, -1)
        rows = [rows_needed(total_M, self.config.row_tokens) for total_M in totals_BM]
        return [max(1, math.ceil(row / self.config.micro_batch)) for row in rows]

    @property
    def alone(self) -> bool:
        """Whether a mini-batch is one micro-batch, whose update is one program (`update/programs.py`)."""
        return self.config.micro_batch == self.config.mini_batch

    @property
    def scores_first(self) -> bool:
        """Whether each mini-batch is scored before the first update (as `Programs.scores_first`)."""
        one_update = self.mini_batches == 1
        return self.config.objective.old_logp == "score" and not (self.alone and one_update)

    @property
    def scores(self) -> int:
        """Calls of `score`: of every mini-batch before the first update, where old log-probs are its; and of each but
        the first before its own update, where that needs statistics and does not make them itself."""
        first = sum(self.live) if self.scores_first else 0
        again = self.live[1:] if self.scores_first else self.live
        return first + (sum(again) if reads_now(self.config) and not self.alone else 0)

    @property
    def padding(self) -> float:
        """The share of the slots of live micro-batches that hold no token."""
        slots = self.config.micro_batch * self.config.row_tokens * sum(self.live)
        return 1 - self.tokens / slots

    @property
    def pieces(self) -> int:
        """Times that the sampler is called: each call decodes until the longest of its rollouts ends."""
        return math.ceil(self.config.rollout.budget / self.config.rollout_batch)

    @property
    def decoded(self) -> float:
        """Turns of the decode loop, expected: the first token is drawn before it."""
        return self.lengths.longest(self.config.rollout_batch) - 1

    @property
    def tokens(self) -> float:
        """Of prompts and responses, in all rollouts of the step."""
        return float(self.lengths.totals(self.config.rollout.budget).sum())


@dataclasses.dataclass(frozen=True)
class Use:
    """How a step uses a program."""

    phase: str  # allocate, sample, score, update
    calls: Callable[[Work], float]
    ends: Callable[[Work], Mapping[str, float]] = lambda _: {}  # turns of loops by function (`program_cost`)


PROGRAMS: dict[str, Use] = {
    "allocate": Use("allocate", lambda w: 1, lambda w: {"allocate": BISECTION, "largest_steps": BISECTION}),
    "sample": Use("sample", lambda w: w.pieces, lambda w: {"generate": w.decoded}),
    "sample (eval)": Use("sample", lambda w: 0),
    "score": Use("score", lambda w: w.scores),
    "score (reference)": Use("score", lambda w: sum(w.live) if w.config.objective.kl.coefficient else 0),
    "terms": Use("update", lambda w: w.mini_batches),
    "update": Use("update", lambda w: w.mini_batches if w.alone else sum(w.live)),
    "update (apply)": Use("update", lambda w: w.mini_batches),
    "record": Use("allocate", lambda w: 1),
}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Seconds of a step on the devices, and what they buy. `low` and `high`: see `Cost`."""

    seconds: float
    low: float
    high: float
    phases: dict[str, float]  # seconds of each phase
    tokens: float  # of prompts and responses
    padding: float  # the share of the packed slots without one
    model_flops: float  # of the update, as `train_flops` counts them
    devices: int
    chip: Chip

    @property
    def chips(self) -> float:
        return self.devices / self.chip.devices

    @property
    def tokens_per_chip(self) -> float:
        """A second: tokens of prompts and responses that go through the whole step."""
        return self.tokens / self.seconds / self.chips

    @property
    def update_mfu(self) -> float:
        return self._utilisation(self.model_flops, self.phases["update"])

    @property
    def mfu(self) -> float:
        """Of score and update together: scoring's useful work is one forward pass, a third of the update's."""
        return self._utilisation(self.model_flops * 4 / 3, self.phases["score"] + self.phases["update"])

    def _utilisation(self, flops: float, seconds: float) -> float:
        return flops / (seconds * self.chip.flops * self.devices)

    def dollars(self, price: float) -> float:
        """Of one step, at `price` a chip-hour."""
        return price * self.chips * self.seconds / 3600


def multiplied_parameters(shape: ArchitectureConfig) -> int:
    """N: parameters that every token is multiplied with. An embedding that is not also the head is only looked up."""
    sizes = axis_sizes(shape)
    looked_up = set() if shape.tie_word_embeddings else {"embedding"}
    return sum(math.prod(param.shape(sizes)) for name, param in params_of(shape).items() if name not in looked_up)


def train_flops(shape: ArchitectureConfig, work: Work) -> float:
    """Model FLOPs of an update on every rollout of the step once: the sum over rollouts of n tokens of

        6 N n + 6 Z A H n^2

    2 N a token forward and 4 N backward (arXiv 2001.08361), and of attention, whose two products are 2 n^2 H each for
    each of A heads and Z layers, three times that, halved as it is causal. What is computed twice does not count, nor
    does padding.
    """
    sizes = axis_sizes(shape)
    n = work.lengths.totals(work.config.rollout.budget).astype(float)
    attention = 6 * sizes["Z"] * sizes["A"] * sizes["H"]
    return float(6 * multiplied_parameters(shape) * n.sum() + attention * (n**2).sum())
