"""The configuration tree: every setting, its type, its default and its unit."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dynamo_jax.config import choices
from dynamo_jax.config.home import AT_HOME, PathText
from dynamo_jax.config.kinds import STRICT, NonNegativeFloat, Probability
from dynamo_jax.config.methods import AllocationConfig, ModulationConfig, ObjectiveConfig, OptimizerConfig

ROW_TILE, UNTILED = 128, 512  # slots: of the attention kernels; up to which rows do as well without them
_REWARDS = "|".join((*get_args(choices.VerifierKind), *get_args(choices.RewardKind)))


@dataclass(frozen=True, config=STRICT)
class ArithmeticConfig:
    """The built-in task: left-to-right chains modulo 10. See `tasks/arithmetic.py`."""

    train_prompts: PositiveInt = 2048
    heldout_prompts: PositiveInt = 256
    max_operations: Annotated[int, Field(ge=1, le=12)] = 6


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    """Who judges a response to a `math` task, and what is added to the verdict. See `tasks/rewards.py`."""

    # Or module:function of your own, called with (output, gold).
    kind: Annotated[str, Field(pattern=rf"^({_REWARDS}|[\w.]+:\w+)$")] = "math"
    format_bonus: NonNegativeFloat = 0.0  # for one filled box after at most one closed <think>
    length_penalty: NonNegativeFloat = 0.0  # at length_limit characters and beyond
    length_free: NonNegativeInt = 8000  # characters that cost nothing
    length_limit: PositiveInt = 16000


@dataclass(frozen=True, config=STRICT)
class ColumnsConfig:
    """Columns of the data files; dotted names reach into structs. null: the usual names (`tasks/columns.py`)."""

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class WarmupConfig:
    """Supervised warm-up on worked solutions, so that a random policy has something to reinforce."""

    steps: NonNegativeInt = 0
    batch: PositiveInt = 256
    learning_rate: PositiveFloat = 3e-3
    multiplication_rate: Probability = 0.05  # share of `*` among the operations of the worked solutions


@dataclass(frozen=True, config=STRICT)
class VerifierConfig:
    workers: PositiveInt = 2
    timeout: PositiveFloat = 5.0  # seconds of CPU time an answer may take
    memory_mb: Annotated[int, Field(ge=128)] = 1024  # address space beyond a worker's own start-up size


@dataclass(frozen=True, config=STRICT)
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


def _remat_of(value: Any) -> Any:
    """The words that true and false stand for: older recipes and runs have them."""
    return ("full" if value else "none") if isinstance(value, bool) else value


@dataclass(frozen=True, config=STRICT)
class PolicyConfig:
    """Either `load`, a folder with `config.json` and safetensors, or random weights of `architecture`."""

    load: PathText | None = None
    architecture: ArchitectureConfig | None = None
    param_dtype: choices.DType = "float32"  # bfloat16: the rounding of a float32 copy that the optimizer keeps
    compute_dtype: choices.DType = "float32"
    # What the backward pass computes again of each layer: nothing; all but attention; all but products and attention;
    # all. The more, the less memory it takes. true: full, false: none.
    remat: Annotated[choices.Remat, BeforeValidator(_remat_of)] = "none"


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: groups of equal rewards are dropped, and other prompts drawn. See `rounds.py`."""

    enabled: bool = False
    max_refills: PositiveInt = 10  # rounds of P prompts after the first; what is still missing then stays empty


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class TrainerConfig:
    """`mini_batch` rollouts make one optimizer update. They are packed into rows, processed `micro_batch` at a time."""

    steps: PositiveInt = 150
    mini_batch: PositiveInt | None = None  # null: all B, one update a step
    micro_batch: PositiveInt | None = None  # rows; null: as many as there are rollouts in the mini-batch
    row_tokens: PositiveInt | None = None  # of a row; null: the longest prompt and completion, in whole tiles
    compilation_cache: bool = True  # keep compiled programs in the run's folder, for its next start


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    every: NonNegativeInt = 25  # steps; 0: only before the first and after the last step
    samples: PositiveInt = 8
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    temperature: NonNegativeFloat = 1.0  # 0: the most likely token, whatever top_p
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """Beside every `every`-th step, each step before its evaluation, and each that takes half of `notice_seconds`."""

    every: PositiveInt = 25  # steps
    keep: PositiveInt = 2  # the newest ones kept, beside the best
    patience: NonNegativeFloat = 600.0  # seconds that failing storage is tried again before the run ends
    notice_seconds: NonNegativeFloat = 30.0  # from SIGTERM to the end of the machine, where it is preempted


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None  # null: Weights & Biases is not used
    rollouts_per_step: NonNegativeInt = 64  # samples saved under rollouts/
    rollouts_keep: PositiveInt | None = 100  # newest files kept there; null: all
    progress: bool = True


@dataclass(frozen=True, config=STRICT)
class WatchdogConfig:
    """When the stacks of all threads are shown, and when a run that does not move is ended. See `hosts/watchdog.py`."""

    factor: Annotated[float, Field(gt=1.0)] = 10.0  # times the median of steps, evaluations or checkpoints
    floor_seconds: PositiveFloat = 1.0  # nothing shorter is suspicious
    end_seconds: PositiveFloat | None = 1800.0  # beyond that; null: never ended


@dataclass(frozen=True, config=STRICT)
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
        """Rows in one forward and backward pass."""
        return self.trainer.micro_batch or self.mini_batch

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.trainer.steps * (self.rollout.budget // self.mini_batch)

    @property
    def row_tokens(self) -> int:
        """S, slots of a row: by default the longest rollout's, rounded up to the kernels' tiles where that matters."""
        longest = self.task.max_prompt_tokens + self.rollout.max_tokens
        return self.trainer.row_tokens or (longest if longest <= UNTILED else -(-longest // ROW_TILE) * ROW_TILE)

    @property
    def rollout_batch(self) -> int:
        """Rollouts decoded at once."""
        return self.rollout.batch or self.rollout.budget
