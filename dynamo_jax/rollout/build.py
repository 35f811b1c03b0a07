"""From a run's config to its samplers."""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.config import Config
from dynamo_jax.policy.model import Decoder
from dynamo_jax.rollout.sampler import Sampler, SamplerConfig, window_size

log = logging.getLogger("dynamo_jax")


class SpecialTokens(Protocol):
    """All that sampling asks of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...


def make_samplers(
    graph: nnx.GraphDef[Decoder], config: Config, tokenizer: SpecialTokens, mesh: Mesh
) -> tuple[Sampler, Sampler]:
    """The sampler of training rollouts and the one of evaluation: one and the same if their settings agree."""
    r, e = config.rollout, config.eval
    if e.temperature == 0 and e.samples > 1:
        log.warning(
            "eval.temperature = 0: the %d samples of a problem will be one response, repeated. One is enough.",
            e.samples,
        )
    training = SamplerConfig(
        max_tokens=r.max_tokens,
        batch=config.rollout_batch,
        window=window_size(config.rollout_batch, r.prompts, config.allocation.low, config.mesh.batch_shards),
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
    )
    evaluation = dataclasses.replace(training, temperature=e.temperature, top_p=e.top_p, top_k=0, min_p=0.0)
    sampler = Sampler(graph, training, mesh)
    return sampler, sampler if evaluation == training else Sampler(graph, evaluation, mesh)
