"""The policy network, and its Hugging Face form."""

from dynamo_jax.policy.hf import load_hf, read_architecture, save_hf
from dynamo_jax.policy.model import (
    Decoder,
    DecoderConfig,
    KVCache,
    abstract_policy,
    init_policy,
    param_shardings,
)

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "abstract_policy",
    "init_policy",
    "load_hf",
    "param_shardings",
    "read_architecture",
    "save_hf",
]
