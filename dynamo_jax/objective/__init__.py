"""How a step learns from its rollouts: advantages, what is made of them token by token, and the policy loss."""

from dynamo_jax.objective.advantage import group_advantage, group_weight
from dynamo_jax.objective.correction import Correction, importance_weight, mismatch_metrics
from dynamo_jax.objective.kl import kl_estimate, kl_metrics
from dynamo_jax.objective.modulation import entropy_change, modulate
from dynamo_jax.objective.policy_loss import Denominators, TokenTerms, denominators, policy_loss, rollout_scale
from dynamo_jax.objective.ratio import Clip, log_ratio
from dynamo_jax.objective.selection import (
    clip_cov_tokens,
    covariance,
    fork_tokens,
    kl_cov_tokens,
    largest,
    token_priority,
)
from dynamo_jax.objective.shaping import configured_penalty, entropy_advantage, overlong_penalty

__all__ = [
    "Clip",
    "Correction",
    "Denominators",
    "TokenTerms",
    "clip_cov_tokens",
    "configured_penalty",
    "covariance",
    "denominators",
    "entropy_advantage",
    "entropy_change",
    "fork_tokens",
    "group_advantage",
    "group_weight",
    "importance_weight",
    "kl_cov_tokens",
    "kl_estimate",
    "kl_metrics",
    "largest",
    "log_ratio",
    "mismatch_metrics",
    "modulate",
    "overlong_penalty",
    "policy_loss",
    "rollout_scale",
    "token_priority",
]
