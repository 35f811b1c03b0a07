"""A trained policy out of its run: onto a mesh, or with `dynamo-jax export` into a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dynamo_jax.config import Config
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import load_hf, save_hf
from dynamo_jax.policy.model import DecoderConfig, abstract_policy
from dynamo_jax.run.checkpoint import Checkpointer, resolve_checkpoint
from dynamo_jax.run.contents import params_of, with_params_alone
from dynamo_jax.sharding import make_mesh, start_devices


def export_command(config: Config, checkpoint: Path, out: Path, tokenizer_size: int) -> None:
    """Write `out`, a folder with `config.json`, safetensors and the tokenizer, that `transformers` and vLLM load.

    Raises `ValueError` if the checkpoint cannot be read or `out` exists.
    """
    start_devices(config.device, config.mesh)
    decoder = decoder_config(config, tokenizer_size, make_mesh(config.mesh))
    save_hf(out, load_policy(checkpoint, decoder), decoder, tokenizer_folder=config.task.tokenizer)
    sys.stdout.write(f"{out}\n")


def load_policy(checkpoint: Path, decoder: DecoderConfig) -> Any:
    """Parameters on `decoder`'s mesh: of a run folder, a checkpoint, or a folder with `config.json` and safetensors."""
    if (checkpoint / "config.json").is_file():
        return load_hf(checkpoint, decoder)
    directory, step = resolve_checkpoint(checkpoint)
    _, abstract_params = abstract_policy(decoder)
    with Checkpointer(directory, keep=1, read_only=True) as checkpoints:
        return params_of(checkpoints.restore(step, with_params_alone(abstract_params), partial=True)[0])
