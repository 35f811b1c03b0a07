"""How a step learns from its rollouts: group-relative advantages, their modulation, the clipped policy loss."""

from dynamo_jax.objective.advantage import group_advantage
from dynamo_jax.objective.modulation import entropy_change, modulate
from dynamo_jax.objective.policy_loss import Normalizer, normalizer, policy_loss

__all__ = [
    "Normalizer",
    "entropy_change",
    "group_advantage",
    "modulate",
    "normalizer",
    "policy_loss",
]
