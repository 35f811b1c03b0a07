"""From a run's config and its prompts to its allocation programs."""

from __future__ import annotations

from jax.sharding import Mesh

from dynamo_jax.allocation.programs import AllocationPrograms
from dynamo_jax.allocation.rules import RULES
from dynamo_jax.allocation.vip import prompt_features
from dynamo_jax.config import Config
from dynamo_jax.tasks.prompts import PromptSet


def make_allocation(config: Config, prompts: PromptSet, mesh: Mesh) -> AllocationPrograms:
    """Programs for `prompts`; their features are computed only for the rule that reads them."""
    features_NE = None
    if RULES[config.allocation.rule].features:
        features_NE = prompt_features([prompt.tokens for prompt in prompts.prompts], config.allocation.vip.features)
    return AllocationPrograms(
        config.allocation,
        len(prompts),
        config.rollout.budget,
        mesh,
        features_NE=features_NE,
        advantage=config.objective.advantage,
    )
