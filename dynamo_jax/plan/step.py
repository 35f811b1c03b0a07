"""What a training step costs: how often it calls each program, and what that adds up to.

`PROGRAMS` is the one place that knows how the trainer calls its programs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from dynamo_jax.config import ArchitectureConfig, Config
from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.policy.params import axis_sizes, params_of

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
    # Each mini-batch before the first update, and again before its own, but for the first one's.
    "score": Use("score", lambda w: 2 * w.mini_batches - 1),
    "update": Use("update", lambda w: w.mini_batches),
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
