"""The policy update: the training state, the optimizer, and the jitted programs `score` and `update`."""

from dynamo_jax.update.optimizer import learning_rate_schedule, make_optimizer
from dynamo_jax.update.programs import (
    Programs,
    completion_mask,
    completion_stats,
    logp_drift,
    score_rollouts,
    update_policy,
)
from dynamo_jax.update.state import (
    MasterState,
    State,
    TrainState,
    apply_gradients,
    init_state,
    with_masters,
)

__all__ = [
    "MasterState",
    "Programs",
    "State",
    "TrainState",
    "apply_gradients",
    "completion_mask",
    "completion_stats",
    "init_state",
    "learning_rate_schedule",
    "logp_drift",
    "make_optimizer",
    "score_rollouts",
    "update_policy",
    "with_masters",
]
