"""The policy update: packing into rows, the training state, the optimizer, and the jitted programs."""

from dynamo_jax.update.optimizer import learning_rate_schedule, make_optimizer
from dynamo_jax.update.packing import MiniBatch, pack
from dynamo_jax.update.programs import Programs
from dynamo_jax.update.reference import make_reference
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
    "MiniBatch",
    "Programs",
    "State",
    "TrainState",
    "apply_gradients",
    "init_state",
    "learning_rate_schedule",
    "make_optimizer",
    "make_reference",
    "pack",
    "with_masters",
]
