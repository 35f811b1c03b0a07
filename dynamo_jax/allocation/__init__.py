"""How a step's rollouts are shared among its prompts: success statistics, posterior variance, exact allocation."""

from dynamo_jax.allocation.allocate import allocate, rows_from_counts, sigma_for
from dynamo_jax.allocation.stats import PromptStats, discounted, init_stats, posterior_variance, record

__all__ = [
    "PromptStats",
    "allocate",
    "discounted",
    "init_stats",
    "posterior_variance",
    "record",
    "rows_from_counts",
    "sigma_for",
]
