"""The table of rules. A new one is a file with its function, an entry here and in `config.choices`, and a recipe."""

from __future__ import annotations

from functools import partial

from dynamo_jax.allocation.allocate import variance_rule
from dynamo_jax.allocation.gvm import gradient_size, gvm_rule
from dynamo_jax.allocation.knapsack import knapsack_rule
from dynamo_jax.allocation.reinforce_ada import first_round
from dynamo_jax.allocation.released import released_rule
from dynamo_jax.allocation.rule import Rule
from dynamo_jax.allocation.vip import vip_rule

RULES: dict[str, Rule] = {
    "uniform": Rule(partial(variance_rule, "uniform")),
    "bernoulli": Rule(partial(variance_rule, "bernoulli")),
    "neyman": Rule(partial(variance_rule, "neyman")),
    "released": Rule(released_rule, on_host=True),
    "knapsack": Rule(knapsack_rule),
    "gvm": Rule(gvm_rule, gradient_size=gradient_size),
    "reinforce_ada": Rule(first_round),
    "vip": Rule(vip_rule, features=True),
}
