"""How a step's rollouts are shared among its prompts: success statistics, and the rules that read them."""

from dynamo_jax.allocation.allocate import allocate, largest_steps, rows_from_counts, sigma_for
from dynamo_jax.allocation.gvm import gradient_size, gvm_sigma
from dynamo_jax.allocation.knapsack import knapsack
from dynamo_jax.allocation.reinforce_ada import balanced_choice, satisfied
from dynamo_jax.allocation.released import released_allocate, released_priority
from dynamo_jax.allocation.rule import Allocation, Known, Rule, Terms
from dynamo_jax.allocation.rules import RULES
from dynamo_jax.allocation.stats import (
    PromptStats,
    discounted,
    init_stats,
    posterior_mean,
    posterior_variance,
    record,
)
from dynamo_jax.allocation.vip import GaussianProcess, prompt_features, vip

__all__ = [
    "RULES",
    "Allocation",
    "GaussianProcess",
    "Known",
    "PromptStats",
    "Rule",
    "Terms",
    "allocate",
    "balanced_choice",
    "discounted",
    "gradient_size",
    "gvm_sigma",
    "init_stats",
    "knapsack",
    "largest_steps",
    "posterior_mean",
    "posterior_variance",
    "prompt_features",
    "record",
    "released_allocate",
    "released_priority",
    "rows_from_counts",
    "satisfied",
    "sigma_for",
    "vip",
]
