"""The settings of the method: how many rollouts a prompt gets, what is made of them, and how the policy moves."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dynamo_jax.config import choices
from dynamo_jax.config.kinds import ALIASED, STRICT, NonNegativeFloat, Probability


@dataclass(frozen=True, config=STRICT)
class KnapsackConfig:
    value: choices.KnapsackValue = "info_gain"  # of a group with right and wrong answers: p (1 - p)^2, or 1


@dataclass(frozen=True, config=STRICT)
class GVMConfig:
    """n_i in proportion to G_i / sqrt(p_i + alpha / p_i^(beta - 1))."""

    alpha: NonNegativeFloat = 1e-3
    beta: NonNegativeFloat = 2.0


@dataclass(frozen=True, config=STRICT)
class ReleasedConfig:
    """The authors' released rule. See `allocation/released.py`. Its counts never fade: it needs a half_life of 1e9."""

    initial_budget: NonNegativeInt = 4  # rollouts that a prompt gets before its priority counts
    mastery: PositiveFloat = 0.85  # success rate from which a prompt has the floor as its priority
    floor: NonNegativeFloat = 0.01
    minimum_samples: Annotated[int, Field(ge=2)] = 4


@dataclass(frozen=True, config=STRICT)
class VIPConfig:
    """A Gaussian process over prompt features predicts success rates. See `allocation/vip.py`."""

    features: Annotated[int, Field(ge=2)] = 64  # of a prompt
    fourier: PositiveInt = 256  # random features of the kernel
    length_scale: PositiveFloat = 1.0  # of the kernel; prompts without a common token are sqrt(2) apart
    amplitude: PositiveFloat = 2.0  # prior standard deviation of the latent value, in logits


@dataclass(frozen=True, config=STRICT)
class ReinforceAdaConfig:
    """Prompts without enough right and wrong answers are sampled again. See `allocation/reinforce_ada.py`."""

    max_rounds: PositiveInt = 4


@dataclass(frozen=True, config=STRICT)
class AllocationConfig:
    """How B rollouts are shared among P prompts, n_i in [low, high]. See `allocation/`."""

    rule: choices.Rule = "bernoulli"
    low: PositiveInt = 2
    high: Annotated[int, Field(ge=1, le=100_000)] = 24
    prior: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)  # Beta prior of a prompt's success rate
    half_life: PositiveFloat = 100.0  # steps after which an old success or failure counts half
    released: ReleasedConfig = ReleasedConfig()
    knapsack: KnapsackConfig = KnapsackConfig()
    gvm: GVMConfig = GVMConfig()
    reinforce_ada: ReinforceAdaConfig = ReinforceAdaConfig()
    vip: VIPConfig = VIPConfig()


@dataclass(frozen=True, config=STRICT)
class OverlongConfig:
    """DAPO's soft length penalty on the reward: from 0 at `max_tokens - buffer` down to `-factor` at `max_tokens`."""

    enabled: bool = False
    buffer: PositiveInt = 4096  # tokens
    factor: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class EntropyAdvantageConfig:
    """Each token's advantage grows by min(alpha * entropy, |advantage| / kappa)."""

    enabled: bool = False
    alpha: PositiveFloat = 0.4
    kappa: PositiveFloat = 2.0


@dataclass(frozen=True, config=STRICT)
class ClipCovConfig:
    """Clip-Cov: random tokens, `fraction` of all, whose covariance is in (low, high) carry no gradient."""

    enabled: bool = False
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    low: float = 1.0
    high: float = 5.0


@dataclass(frozen=True, config=STRICT)
class KLCovConfig:
    """KL-Cov: the `fraction` of tokens of largest covariance pay `coefficient` * |log ratio|."""

    enabled: bool = False
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-3
    coefficient: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class CorrectionConfig:
    """Importance weights where sampler and trainer disagree on probabilities. See `objective/correction.py`."""

    kind: choices.CorrectionKind = "none"
    level: choices.CorrectionLevel = "token"
    low: NonNegativeFloat = 0.5  # mask only: a weight below counts 0
    high: PositiveFloat = 2.0  # a weight above counts as much (truncate) or 0 (mask)


@dataclass(frozen=True, config=ALIASED)
class KLConfig:
    """What the policy pays for leaving the one before training. See `objective/kl.py`."""

    coefficient: NonNegativeFloat = 0.0  # 0: off, and there is no reference
    estimator: choices.KLEstimator = "k2"
    in_: Annotated[choices.KLPlace, Field(alias="in")] = "loss"
    host_memory: bool = False  # the reference waits in the host's memory, and is on the devices for its pass only


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """Whatever is not enabled costs nothing. See `objective/`."""

    advantage: choices.Advantage = "grpo"
    positive_weight: PositiveFloat = 0.1  # w_reinforce only: the advantage of a right rollout; a wrong one's is -1
    group_weight: choices.GroupWeight = "rollout"  # whether every rollout or every prompt weighs the same
    ratio: choices.Ratio = "token"  # sequence: GSPO
    old_logp: choices.OldLogp = "score"  # who says how likely a rollout was: a pass before the updates, or its sampler
    correction: CorrectionConfig = CorrectionConfig()
    clip_low: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.2  # null, together with clip_high: no clip
    clip_high: NonNegativeFloat | None = 0.2
    clip_ratio_c: Annotated[float, Field(gt=1.0)] | None = 10.0  # dual clip; null: off
    aggregation: choices.Aggregation = "token-mean"
    entropy_coefficient: NonNegativeFloat = 0.0  # of the entropy bonus in the loss
    fork_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = (
        None  # share of tokens, by entropy, that are trained
    )
    overlong: OverlongConfig = OverlongConfig()
    entropy_advantage: EntropyAdvantageConfig = EntropyAdvantageConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    kl_cov: KLCovConfig = KLCovConfig()
    kl: KLConfig = KLConfig()


@dataclass(frozen=True, config=STRICT)
class ModulationConfig:
    """DynaMO's two factors on token advantages. See `objective/modulation.py`."""

    enabled: bool = True
    compensation: bool = True
    stabilisation: bool = True
    alpha: NonNegativeFloat = 0.2
    lambda_min: Probability = 0.6
    gamma: PositiveFloat = 50.0
    tau: Probability = 0.9
    # The second of each only to reproduce results of the released code: extremes that depend on how the batch is
    # packed, and the mean over the sequence in place of the expectation over the vocabulary.
    scope: choices.Scope = "minibatch"
    entropy_change: choices.Baseline = "exact"


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant or a falling rate. See `update/optimizer.py`."""

    learning_rate: PositiveFloat = 5e-4
    warmup_steps: NonNegativeInt = 0  # in optimizer updates
    schedule: choices.Schedule = "constant"  # after the warm-up
    floor: Probability = 0.0  # share of the rate that linear and cosine end at
    decay_steps: PositiveInt | None = None  # updates, warm-up included, after which they are there; null: the run's
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0  # of matrices and embeddings, not of norms and biases
    max_grad_norm: PositiveFloat = 1.0
    moments: choices.DType = "float32"  # bfloat16: rounded stochastically; 4 bytes a parameter less
    rounding: choices.Rounding = "masters"  # of bfloat16 parameters; stochastic: no float32 copy, 4 bytes less
