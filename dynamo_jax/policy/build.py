"""From a run's config to the decoder's: its shape, from `config.json` or from the config, checked against the mesh."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dynamo_jax.config import Config, ConfigError, architecture_problems
from dynamo_jax.policy.hf import read_architecture
from dynamo_jax.policy.model import DecoderConfig


def decoder_config(config: Config, tokenizer_size: int, mesh: Mesh | None) -> DecoderConfig:
    """What `Decoder` needs to know. A vocabulary left open becomes the tokenizer's.

    Raises `ConfigError` if the vocabulary is too small for the tokenizer or the mesh does not divide the shape.
    """
    p = config.policy
    source = "policy.architecture" if p.load is None else f"{p.load}/config.json"
    shape = p.architecture if p.load is None else read_architecture(p.load)
    if shape is None:
        raise ConfigError("policy.load and policy.architecture are both missing: give one of them")
    vocab_size = shape.vocab_size or tokenizer_size
    if vocab_size < tokenizer_size:
        raise ConfigError(
            f"{source}: vocab_size = {vocab_size} is smaller than the tokenizer, which has ids up to "
            f"{tokenizer_size - 1}. Use the tokenizer that belongs to the policy, or a larger vocab_size."
        )
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    for key, value, why, remedy in architecture_problems(shape, config.mesh):
        raise ConfigError(f"{source}: {key} = {value}: {why}. {remedy}")
    return DecoderConfig(shape, p.param_dtype, p.compute_dtype, p.remat, mesh)
