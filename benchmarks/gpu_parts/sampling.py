"""Tokens a second of the sampler, a model of 0.5B with random weights, all rollouts to their limit."""

from __future__ import annotations

import time

import jax
import numpy as np

from dynamo_jax.batch import PromptBatch
from dynamo_jax.config import ArchitectureConfig, Config, PolicyConfig
from dynamo_jax.policy import abstract_policy, init_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.rollout.sampler import Sampler, SamplerConfig
from dynamo_jax.sharding import make_mesh
from gpu_parts.common import QWEN_0_5B, TINY, emit, gpu


def main(small: bool) -> None:
    emit(device=gpu(small))
    shape, P, B, L, C = (QWEN_0_5B, 16, 128, 128, 256) if not small else (TINY, 2, 8, 8, 8)
    dtype = "bfloat16" if not small else "float32"
    policy = PolicyConfig(architecture=ArchitectureConfig(**shape), param_dtype=dtype, compute_dtype=dtype)
    config = Config(run_dir="unused", policy=policy)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    decoder = decoder_config(config, shape["vocab_size"], mesh)
    params = init_policy(decoder, jax.random.key(0))
    sampler = Sampler(abstract_policy(decoder)[0], SamplerConfig(C, B, P, (), 0), mesh)
    rng, ids = np.random.default_rng(0), tuple(map(str, range(P)))
    tokens = rng.integers(0, shape["vocab_size"], (P, L)).astype(np.int32)
    prompts = PromptBatch(np.arange(P, dtype=np.int32), tokens, np.full(P, L, np.int32), ids, ids, ids)
    prompt_of_B = np.repeat(np.arange(P), B // P).astype(np.int32)
    for round_ in range(3):
        began = time.perf_counter()
        rollouts = sampler.sample(params, prompts, prompt_of_B, jax.random.key(round_))
        seconds, made = time.perf_counter() - began, int(np.sum(rollouts.length_B))
        row = {"rollouts": B, "prompt_tokens": L, "tokens": made, "round": round_, "seconds": seconds}
        emit(**row, tokens_per_second=made / seconds, **({"compiled": True} if round_ == 0 else {}))
