"""One typed, frozen configuration tree, read from YAML with `a.b=c` overrides.

This package imports neither jax nor numpy: a mistake in a config is reported in a fraction of a second, before
anything is compiled. `load_config` is the only way in; every error is a `ConfigError` (a `ValueError`).
"""

from dynamo_jax.config.checks import architecture_problems
from dynamo_jax.config.home import at_home
from dynamo_jax.config.load import differences, dump_config, load_config, resolved
from dynamo_jax.config.methods import AllocationConfig, ModulationConfig, ObjectiveConfig, OptimizerConfig
from dynamo_jax.config.syntax import ConfigError
from dynamo_jax.config.tree import (
    ArchitectureConfig,
    ArithmeticConfig,
    CheckpointConfig,
    ColumnsConfig,
    Config,
    EvalConfig,
    LoggingConfig,
    MeshConfig,
    PolicyConfig,
    RolloutConfig,
    TaskConfig,
    TrainerConfig,
    VerifierConfig,
    WarmupConfig,
    WatchdogConfig,
)

__all__ = [
    "AllocationConfig",
    "ArchitectureConfig",
    "ArithmeticConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "Config",
    "ConfigError",
    "EvalConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModulationConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "TaskConfig",
    "TrainerConfig",
    "VerifierConfig",
    "WarmupConfig",
    "WatchdogConfig",
    "architecture_problems",
    "at_home",
    "differences",
    "dump_config",
    "load_config",
    "resolved",
]
