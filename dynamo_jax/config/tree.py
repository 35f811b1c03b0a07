"""The configuration tree: every setting, its type, its default and its unit."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, get_args

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dynamo_jax.config import choices
from dynamo_jax.config.home import AT_HOME, PathText

_strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
_REWARDS = "|".join((*get_args(choices.VerifierKind), *get_args(choices.RewardKind)))


@dataclass(frozen=True, config=_strict)
class ArithmeticConfig:
    """The built-in task: left-to-right chains modulo 10. See `tasks/arithmetic.py`."""

    train_prompts: PositiveInt = 2048
    heldout_prompts: PositiveInt = 256
    max_operations: Annotated[int, Field(ge=1, le=12)] = 6


@dataclass(frozen=True, config=_strict)
class RewardConfig:
    """Who judges a response to a `math` task, and what is added to the verdict. See `tasks/rewards.py`."""

    # Or module:function of your own, called with (output, gold).
    kind: Annotated[str, Field(pattern=rf"^({_REWARDS}|[\w.]+:\w+)$")] = "math"
    format_bonus: NonNegativeFloat = 0.0  # for one filled box after at most one closed <think>
    length_penalty: NonNegativeFloat = 0.0  # at length_limit characters and beyond
    length_free: NonNegativeInt = 8000  # characters that cost nothing
    length_limit: PositiveInt = 16000


@dataclass(frozen=True, config=_strict)
class ColumnsConfig:
    """Columns of the data files; dotted names reach into structs. null: the usual names (`tasks/columns.py`)."""

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None


@dataclass(frozen=True, config=_strict)
class TaskConfig:
    """What is learned. `math` reads `train` and `eval` (files, folders or globs) and needs a `tokenizer` folder."""

    kind: choices.TaskKind = "arithmetic"
    train: tuple[PathText, ...] = ()
    eval: tuple[PathText, ...] = ()
    columns: ColumnsConfig = ColumnsConfig()
    tokenizer: PathText | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)  # JSON values of its variables
    system_prompt: str | None = None  # null: whatever the tokenizer's template says by itself
    instruction: str = ""  # appended to the user's message
    max_prompt_tokens: PositiveInt = 16
    allow_overlap: bool = False  # no warning of problems that are in `train` and in `eval`
    reward: RewardConfig = RewardConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()


@dataclass(frozen=True, config=_strict)
class WarmupConfig:
    """Supervised warm-up on worked solutions, so that a random policy has something to reinforce."""

    steps: NonNegativeInt = 0
    batch: PositiveInt = 256
    learning_rate: PositiveFloat = 3e-3
    multiplication_rate: Probability = 0.05  # share of `*` among the operations of the worked solutions


@dataclass(frozen=True, config=_strict)
class VerifierConfig:
    workers: PositiveInt = 2
    timeout: PositiveFloat = 5.0  # seconds of CPU time an answer may take
    memory_mb: Annotated[int, Field(ge=128)] = 1024  # address space beyond a worker's own start-up size


@dataclass(frozen=True, config=_strict)
class ArchitectureConfig:
    """Shape of a policy that starts from random weights. Defaults: about 105k parameters."""

    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = None  # null: hidden_size / num_heads
    intermediate_size: PositiveInt = 192
    vocab_size: PositiveInt | None = None  # null: the tokenizer's size
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    qkv_bias: bool = True
    tie_word_embeddings: bool = True


@dataclass(frozen=True, config=_strict)
class PolicyConfig:
    """Either `load`, a folder with `config.json` and safetensors, or random weights of `architecture`."""

    load: PathText | None = None
    architecture: ArchitectureConfig | None = None
    param_dtype: choices.DType = "float32"  # bfloat16: the rounding of a float32 copy that the optimizer keeps
    compute_dtype: choices.DType = "float32"
    remat: bool = False  # recompute each layer's activations in the backward pass


@dataclass(frozen=True, config=_strict)
class MeshConfig:
    """Devices along each mesh axis. Rollouts are split over data * fsdp, parameters over fsdp and tensor."""

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1

    @property
    def batch_shards(self) -> int:
        return self.data * self.fsdp

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True, config=_strict)
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: groups of equal rewards are dropped, and other prompts drawn. See `rounds.py`."""

    enabled: bool = False
    max_refills: PositiveInt = 10  # rounds of P prompts after the first; what is still missing then stays empty


@dataclass(frozen=True, config=_strict)
class RolloutConfig:
    """A step samples `prompts` (P) * `per_prompt` (mean group size) = B rollouts of at most `max_tokens` (C) tokens."""

    prompts: PositiveInt = 64
    per_prompt: PositiveInt = 8
    max_tokens: PositiveInt = 8
    temperature: NonNegativeFloat = 1.0  # above 0: what is learned is the distribution drawn from
    top_k: NonNegativeInt = 0  # 0: off
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Probability = 0.0
    batch: PositiveInt | None = None  # rollouts decoded at once; null: all B
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()

    @property
    def budget(self) -> int:
        """B, rollouts a step."""
        return self.prompts * self.per_prompt


@dataclass(frozen=True, config=_strict)
class KnapsackConfig:
    value: choices.KnapsackValue = "info_gain"  # of a group with right and wrong answers: p (1 - p)^2, or 1


@dataclass(frozen=True, config=_strict)
class GVMConfig:
    """n_i in proportion to G_i / sqrt(p_i + alpha / p_i^(beta - 1))."""

    alpha: NonNegativeFloat = 1e-3
    beta: NonNegativeFloat = 2.0


@dataclass(frozen=True, config=_strict)
class ReleasedConfig:
    """The authors' released rule. See `allocation/released.py`. Its counts never fade: it needs a half_life of 1e9."""

    initial_budget: NonNegativeInt = 4  # rollouts that a prompt gets before its priority counts
    mastery: PositiveFloat = 0.85  # success rate from which a prompt has the floor as its priority
    floor: NonNegativeFloat = 0.01
    minimum_samples: Annotated[int, Field(ge=2)] = 4


@dataclass(frozen=True, config=_strict)
class VIPConfig:
    """A Gaussian process over prompt features predicts success rates. See `allocation/vip.py`."""

    features: Annotated[int, Field(ge=2)] = 64  # of a prompt
    fourier: PositiveInt = 256  # random features of the kernel
    length_scale: PositiveFloat = 1.0  # of the kernel; prompts without a common token are sqrt(2) apart
    amplitude: PositiveFloat = 2.0  # prior standard deviation of the latent value, in logits


@dataclass(frozen=True, config=_strict)
class ReinforceAdaConfig:
    """Prompts without enough right and wrong answers are sampled again. See `allocation/reinforce_ada.py`."""

    max_rounds: PositiveInt = 4


@dataclass(frozen=True, config=_strict)
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


@dataclass(frozen=True, config=_strict)
class OverlongConfig:
    """DAPO's soft length penalty on the reward: from 0 at `max_tokens - buffer` down to `-factor` at `max_tokens`."""

    enabled: bool = False
    buffer: PositiveInt = 4096  # tokens
    factor: PositiveFloat = 1.0


@dataclass(frozen=True, config=_strict)
class EntropyAdvantageConfig:
    """Each token's advantage grows by min(alpha * entropy, |advantage| / kappa)."""

    enabled: bool = False
    alpha: PositiveFloat = 0.4
    kappa: PositiveFloat = 2.0


@dataclass(frozen=True, config=_strict)
class ClipCovConfig:
    """Clip-Cov: random tokens, `fraction` of all, whose covariance is in (low, high) carry no gradient."""

    enabled: bool = False
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    low: float = 1.0
    high: float = 5.0


@dataclass(frozen=True, config=_strict)
class KLCovConfig:
    """KL-Cov: the `fraction` of tokens of largest covariance pay `coefficient` * |log ratio|."""

    enabled: bool = False
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-3
    coefficient: PositiveFloat = 1.0


@dataclass(frozen=True, config=_strict)
class ObjectiveConfig:
    """Whatever is not enabled costs nothing. See `objective/`."""

    advantage: choices.Advantage = "grpo"
    positive_weight: PositiveFloat = 0.1  # w_reinforce only: the advantage of a right rollout; a wrong one's is -1
    group_weight: choices.GroupWeight = "rollout"  # whether every rollout or every prompt weighs the same
    ratio: choices.Ratio = "token"  # sequence: GSPO
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


@dataclass(frozen=True, config=_strict)
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


@dataclass(frozen=True, config=_strict)
class OptimizerConfig:
    """AdamW with linear warm-up to a constant rate."""

    learning_rate: PositiveFloat = 5e-4
    warmup_steps: NonNegativeInt = 0  # in optimizer updates
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0  # of matrices and embeddings, not of norms and biases
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True, config=_strict)
class TrainerConfig:
    """`mini_batch` rollouts make one optimizer update; they are processed `micro_batch` at a time."""

    steps: PositiveInt = 150
    mini_batch: PositiveInt | None = None  # null: all B, one update a step
    micro_batch: PositiveInt | None = None  # null: the whole mini-batch
    compilation_cache: bool = True  # keep compiled programs in the run's folder, for its next start


@dataclass(frozen=True, config=_strict)
class EvalConfig:
    every: NonNegativeInt = 25  # steps; 0: only before the first and after the last step
    samples: PositiveInt = 8
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    temperature: NonNegativeFloat = 1.0  # 0: the most likely token, whatever top_p
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


@dataclass(frozen=True, config=_strict)
class CheckpointConfig:
    """Beside every `every`-th step, each step before its evaluation, and each that takes half of `notice_seconds`."""

    every: PositiveInt = 25  # steps
    keep: PositiveInt = 2  # the newest ones kept, beside the best
    patience: NonNegativeFloat = 600.0  # seconds that failing storage is tried again before the run ends
    notice_seconds: NonNegativeFloat = 30.0  # from SIGTERM to the end of the machine, where it is preempted


@dataclass(frozen=True, config=_strict)
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None  # null: Weights & Biases is not used
    rollouts_per_step: NonNegativeInt = 64  # samples saved under rollouts/
    rollouts_keep: PositiveInt | None = 100  # newest files kept there; null: all
    progress: bool = True


@dataclass(frozen=True, config=_strict)
class WatchdogConfig:
    """When the stacks of all threads are shown, and when a run that does not move is ended. See `hosts/watchdog.py`."""

    factor: Annotated[float, Field(gt=1.0)] = 10.0  # times the median of steps, evaluations or checkpoints
    floor_seconds: PositiveFloat = 1.0  # nothing shorter is suspicious
    end_seconds: PositiveFloat | None = 1800.0  # beyond that; null: never ended


@dataclass(frozen=True, config=_strict)
class Config:
    """The whole run. `resolved` writes it back as plain YAML types."""

    run_dir: Annotated[str, Field(min_length=1), AT_HOME]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # jax and grain take no larger one
    device: choices.Device = "auto"
    task: TaskConfig = TaskConfig()
    warmup: WarmupConfig = WarmupConfig()
    verifier: VerifierConfig = VerifierConfig()
    policy: PolicyConfig = PolicyConfig()
    mesh: MeshConfig = MeshConfig()
    rollout: RolloutConfig = RolloutConfig()
    allocation: AllocationConfig = AllocationConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    modulation: ModulationConfig = ModulationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def mini_batch(self) -> int:
        """Rollouts in one optimizer update."""
        return self.trainer.mini_batch or self.rollout.budget

    @property
    def micro_batch(self) -> int:
        """Rollouts in one forward and backward pass."""
        return self.trainer.micro_batch or self.mini_batch

    @property
    def rollout_batch(self) -> int:
        """Rollouts decoded at once."""
        return self.rollout.batch or self.rollout.budget
