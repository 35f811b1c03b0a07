"""Score and update at 1.5B with random weights: 16 rollouts of 4,096 tokens, then of a quarter of that, packed."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.config import ArchitectureConfig, Config, PolicyConfig, RolloutConfig, TrainerConfig
from dynamo_jax.policy import abstract_policy, init_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.sharding import make_mesh
from dynamo_jax.update.packing import pack
from dynamo_jax.update.programs import Programs
from gpu_parts.common import PEAK, QWEN_1_5B, TINY, emit, flops, gpu


def main(small: bool) -> None:
    emit(device=gpu(small))
    shape, L, C, micro = (QWEN_1_5B, 1024, 3072, 2) if not small else (TINY, 16, 48, 4)
    dtype = "bfloat16" if not small else "float32"
    config = Config(
        run_dir="unused",
        policy=PolicyConfig(architecture=ArchitectureConfig(**shape), compute_dtype=dtype, remat="full"),
        rollout=RolloutConfig(prompts=4, per_prompt=4, max_tokens=C),
        trainer=TrainerConfig(micro_batch=micro, row_tokens=L + C),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    decoder = decoder_config(config, shape["vocab_size"], mesh)
    graph, abstract = abstract_policy(decoder)
    programs = Programs(graph, abstract, config, mesh)
    state = programs.init(init_policy(decoder, jax.random.key(0)))
    for share in (1, 4):
        mini = programs.place(pack(*step(config, shape["vocab_size"], L, C // share, L // share), programs.shape))
        for round_ in range(3):
            began = time.perf_counter()
            old, _ = programs.score(state.params, mini)
            jax.block_until_ready(old)
            scored = time.perf_counter()
            state, metrics = programs.update(state, mini, old, first=True)
            jax.block_until_ready((state, metrics))
            updated = time.perf_counter()
            for name, seconds, passes in (("score", scored - began, 1), ("update", updated - scored, 3)):
                work = passes * flops(shape, mini.tokens, (L + C) // share)
                row: dict[str, Any] = {"program": name, "share_full": 1 / share, "round": round_, "tokens": mini.tokens}
                row |= {"live_micro_batches": mini.live, "seconds": seconds}
                row |= {"tokens_per_second": mini.tokens / seconds, "of_peak": work / seconds / PEAK}
                emit(**row, **({"compiled": True} if share == 1 and round_ == 0 else {}))
    loss = float(metrics["objective/loss"])
    stats = jax.devices()[0].memory_stats() or {}
    emit(loss=loss, peak_bytes=stats.get("peak_bytes_in_use"), **({} if np.isfinite(loss) else {"wrong": "the loss"}))


def step(config: Config, vocab: int, L: int, C: int, prompt: int) -> tuple[Any, ...]:
    """A step's rollouts, all with `prompt` and `C` tokens, and what `pack` is told of them."""
    rng, R, P = np.random.default_rng(0), config.rollout.budget, config.rollout.prompts
    ids = tuple(map(str, range(P)))
    prompts = PromptBatch(
        np.arange(P, dtype=np.int32),
        rng.integers(0, vocab, (P, L)).astype(np.int32),
        np.full(P, prompt, np.int32),
        ids,
        ids,
        ids,
    )
    full = config.rollout.max_tokens
    rollouts = Rollouts(
        rng.integers(0, vocab, (R, full)).astype(np.int32),  # type: ignore[arg-type]
        np.full(R, C, np.int32),  # type: ignore[arg-type]
        np.ones(R, bool),  # type: ignore[arg-type]
        np.full((R, full), -float(np.log(vocab)), np.float32),  # type: ignore[arg-type]
    )
    right = np.arange(R) % 2 == 0
    prompt_of_R = np.repeat(np.arange(P), R // P).astype(np.int32)
    zero = np.zeros(R, np.float32)
    pool = Pool(prompts, prompt_of_R, rollouts, right, right.astype(np.float32), zero, np.full(P, 0.5, np.float32))
    advantage = np.where(right, 1.0, -1.0).astype(np.float32)
    return pool, advantage, np.ones(R, np.float32), np.arange(R, dtype=np.uint32), np.arange(R)
