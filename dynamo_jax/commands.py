"""`dynamo-jax eval` and `dynamo-jax export`: what is done with a trained policy."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dynamo_jax.checkpoint import Checkpointer, resolve_checkpoint
from dynamo_jax.config import Config
from dynamo_jax.evaluate import evaluate, table
from dynamo_jax.metrics import setup_logging
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import load_hf, save_hf
from dynamo_jax.policy.model import DecoderConfig, abstract_policy
from dynamo_jax.rollout.build import make_samplers
from dynamo_jax.run_folder import write_atomic
from dynamo_jax.sharding import make_mesh, start_devices
from dynamo_jax.tasks.task import build_tokenizer, build_verifier, eval_prompts


def eval_command(
    config: Config, checkpoint: Path, benchmarks: Sequence[str], samples: int, ks: Sequence[int], json_file: Path | None
) -> None:
    """Print the table of Pass@k on `benchmarks` (default: the config's held-out prompts); `json_file` gets the numbers.

    Raises `ValueError` for a k above `samples`, an unreadable checkpoint, no benchmark or one with errors, or a
    `json_file` that cannot be written.
    """
    if max(ks) > samples:
        raise ValueError(f"--k {max(ks)} needs at least as many samples, but --samples is {samples}. Raise --samples.")
    if config.task.kind == "math" and not (benchmarks or config.task.eval):
        raise ValueError("there is nothing to evaluate on: name --benchmark FILE, or files in the config's task.eval.")
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):  # before hours of sampling
        raise ValueError(f"--json {json_file}: is a folder, or in none. Give a file name in a folder that exists.")
    start_devices(config.device, config.mesh)
    setup_logging(jax.process_index())
    mesh = make_mesh(config.mesh)
    tokenizer = build_tokenizer(config)
    prompt_sets = eval_prompts(config, tokenizer, benchmarks)
    decoder = decoder_config(config, tokenizer.size, mesh)
    graph, _ = abstract_policy(decoder)
    params = load_policy(checkpoint, decoder)
    _, sampler = make_samplers(graph, config, tokenizer, mesh)
    verifier = build_verifier(config)
    key = jax.random.key(config.seed)
    try:
        evaluations = [
            evaluate(
                sampler,
                params,
                prompts,
                samples,
                jax.random.fold_in(key, number),
                tokenizer,
                verifier,
                config.task.max_prompt_tokens,
            )
            for number, prompts in enumerate(prompt_sets)
        ]
    finally:
        verifier.close()
    if jax.process_index() == 0:
        sys.stdout.write(table(evaluations, ks) + "\n")
        if json_file:
            results = {name: value for e in evaluations for name, value in e.metrics(ks).items()}
            problems = {e.name: dict(zip(e.ids, e.correct.sum(axis=1).tolist(), strict=True)) for e in evaluations}
            report = {"checkpoint": str(checkpoint), "samples": samples, "metrics": results, "correct": problems}
            write_atomic(json_file, json.dumps(report, indent=1) + "\n")


def export_command(config: Config, checkpoint: Path, out: Path) -> None:
    """Write `out`, a folder with `config.json`, safetensors and the tokenizer, that `transformers` and vLLM load.

    Raises `ValueError` if the checkpoint cannot be read or `out` exists.
    """
    start_devices(config.device, config.mesh)
    mesh = make_mesh(config.mesh)
    decoder = decoder_config(config, build_tokenizer(config).size, mesh)
    save_hf(out, load_policy(checkpoint, decoder), decoder, tokenizer_folder=config.task.tokenizer)
    sys.stdout.write(f"{out}\n")


def load_policy(checkpoint: Path, decoder: DecoderConfig) -> Any:
    """Parameters on `decoder`'s mesh: of a run folder, a checkpoint, or a folder with `config.json` and safetensors."""
    if (checkpoint / "config.json").is_file():
        return load_hf(checkpoint, decoder)
    directory, step = resolve_checkpoint(checkpoint)
    _, abstract_params = abstract_policy(decoder)
    with Checkpointer(directory, keep=1, read_only=True) as checkpoints:
        return checkpoints.restore(step, {"train": {"params": abstract_params}}, partial=True)[0]["train"]["params"]
