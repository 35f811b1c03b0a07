"""One policy update on a CPU: ours against the train step of Tunix' GRPO, in time and memory.

    pip install google-tunix                       # in a virtual environment of its own
    python benchmarks/update_against_tunix.py --tunix-python PATH/bin/python [--rounds 3] [--micro-batch 4]

The work: a decoder of Qwen2's shape (4 layers, D 256, F 768, 4 query and 2 key heads, V 4096, tied embeddings) in
float32; 64 rollouts of 32 prompt and 128 response tokens, or of a quarter as many with responses from half to one and a
half times that; forward pass, clipped loss, backward pass, AdamW. Both start from the same weights and must report one
loss and gradient norm, else this ends with status 1. Neither scores the rollouts again: Tunix with one update a batch
takes the log-probs of its own forward pass as the old ones, we take the sampler's. Ours packs rollouts into rows of 160
tokens, four rows a micro-batch; Tunix pads each rollout to 160 and takes all at once, which is how it comes.

Each runs in a process of its own, by turns, compiled and run once before it is timed: 8 minutes on two idle cores.
Prints medians over all updates of all rounds, and the ratios. On a machine with other work wall time says little; CPU
seconds of the process (all threads) say more. Memory is the highest resident size of the process, jax and compilation
included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Z, D, F, A, K, H, V = 4, 256, 768, 4, 2, 64, 4096
M, L, C, PROMPTS = 64, 32, 128, 8
PAD = 0
THETA, EPS = 10000.0, 1e-6
RATE, DECAY, MAX_NORM, CLIP = 1e-6, 0.01, 1.0, 0.2
UPDATES = 4  # timed in each process
TOLERANCE = 2e-3  # of loss and gradient norm, relative
SHARES = {"full rows": 1.0, "rows a quarter full": 0.25}


class Work(NamedTuple):
    """What both are given. Host arrays."""

    prompts_ML: np.ndarray  # int32, left-padded
    prompt_length_M: np.ndarray  # int32
    completions_MC: np.ndarray  # int32, right-padded
    length_M: np.ndarray  # int32
    advantage_M: np.ndarray  # float32


def work(share: float) -> Work:
    rng = np.random.default_rng(0)
    prompt_length_M = np.full(M, round(L * share), np.int32)
    length_M = np.full(M, C, np.int32)
    if share < 1:
        length_M = np.round(C * share * rng.permutation(np.linspace(0.5, 1.5, M))).astype(np.int32)
    prompts_ML = np.repeat(rng.integers(1, V, (PROMPTS, L)), M // PROMPTS, axis=0).astype(np.int32)
    prompts_ML[np.arange(L) < L - prompt_length_M[:, None]] = PAD
    completions_MC = rng.integers(1, V, (M, C)).astype(np.int32)
    completions_MC[np.arange(C) >= length_M[:, None]] = PAD
    return Work(prompts_ML, prompt_length_M, completions_MC, length_M, rng.normal(size=M).astype(np.float32))


def weights() -> dict[str, np.ndarray]:
    """By the names of `dynamo_jax.policy.params`: layers stacked."""
    rng = np.random.default_rng(1)
    fan_in = {"embedding": D, "q": D, "k": D, "v": D, "o": A * H, "gate": D, "up": D, "down": F}
    shapes = {
        "embedding": (V, D), "q": (Z, D, A, H), "k": (Z, D, K, H), "v": (Z, D, K, H), "o": (Z, A, H, D),
        "gate": (Z, D, F), "up": (Z, D, F), "down": (Z, F, D),
    }  # fmt: skip
    made = {name: rng.normal(size=shape) * fan_in[name] ** -0.5 for name, shape in shapes.items()}
    made |= {name: 0.1 * rng.normal(size=(Z, n, H)) for name, n in (("q_bias", A), ("k_bias", K), ("v_bias", K))}
    made |= {"attention_norm": np.ones((Z, D)), "mlp_norm": np.ones((Z, D)), "final_norm": np.ones(D)}
    return {name: x.astype(np.float32) for name, x in made.items()}


def timed(update: Callable[[], tuple[Any, Any]], **versions: str) -> dict[str, Any]:
    """Loss and gradient norm of the first update; seconds of those after it."""
    loss, norm = (float(x) for x in update())
    wall, cpu = [], []
    for _ in range(UPDATES):
        began, began_cpu = time.perf_counter(), time.process_time()
        update()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB to GB
    return {"loss": loss, "grad_norm": norm, "wall": wall, "cpu": cpu, "peak_gb": peak, "versions": versions}


def prepared(share: float, micro_batch: int, remat: str) -> tuple[Any, Any, Any]:
    """Our programs, their state and the mini-batch."""
    sys.path.insert(0, str(ROOT))
    import jax

    from dynamo_jax.batch import Pool, PromptBatch, Rollouts
    from dynamo_jax.config import load_config
    from dynamo_jax.policy import abstract_policy
    from dynamo_jax.policy.build import decoder_config
    from dynamo_jax.policy.params import param_name
    from dynamo_jax.sharding import make_mesh
    from dynamo_jax.update import Programs, pack

    shape = {
        "hidden_size": D, "num_layers": Z, "num_heads": A, "num_kv_heads": K, "intermediate_size": F, "vocab_size": V,
        "rope_theta": THETA, "rms_norm_eps": EPS, "tie_word_embeddings": True,
    }  # fmt: skip
    settings = {
        "run_dir": "unused", "task.max_prompt_tokens": L, "rollout.prompts": PROMPTS,
        "rollout.per_prompt": M // PROMPTS, "rollout.max_tokens": C, "policy.remat": remat,
        "trainer.micro_batch": micro_batch, "trainer.row_tokens": L + C,
        "objective.old_logp": "sampler", "objective.aggregation": "token-mean", "objective.clip_low": CLIP,
        "objective.clip_high": CLIP, "objective.clip_ratio_c": "null", "modulation.enabled": "false",
        "optimizer.learning_rate": RATE, "optimizer.weight_decay": DECAY, "optimizer.max_grad_norm": MAX_NORM,
        **{f"policy.architecture.{key}": value for key, value in shape.items()},
    }  # fmt: skip
    config = load_config(
        ROOT / "configs" / "arithmetic_cpu.yaml", [f"{key}={value}" for key, value in settings.items()]
    )
    mesh = make_mesh(config.mesh)
    graph, abstract = abstract_policy(decoder_config(config, V, mesh))
    programs = Programs(graph, abstract, config, mesh)
    given, task = weights(), work(share)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(given[param_name(path)], x.sharding), abstract
    )
    every, none = np.arange(M), np.zeros((M, C), np.float32)
    texts = ("",) * M
    prompts = PromptBatch(every, task.prompts_ML, task.prompt_length_M, texts, texts, texts)
    rollouts = Rollouts(task.completions_MC, task.length_M, np.ones(M, bool), none)  # type: ignore[arg-type]
    pool = Pool(prompts, every, rollouts, np.zeros(M, bool), np.zeros(M), np.zeros(M), np.zeros(M))
    ones, numbers = np.ones(M, np.float32), np.arange(M, dtype=np.uint32)
    mini = programs.place(pack(pool, task.advantage_M, ones, numbers, every, programs.shape))
    # What a sampler would have said of its tokens.
    stats, _ = programs.score(params, mini)
    rows = mini.batch.rows._replace(sampled_logp=stats.logp)
    mini = mini._replace(batch=mini.batch._replace(rows=rows))
    return programs, programs.init(params), mini


def ours(share: float, micro_batch: int, remat: str) -> dict[str, Any]:
    programs, state, mini = prepared(share, micro_batch, remat)
    import jax

    def update() -> tuple[Any, Any]:
        nonlocal state
        state, metrics = programs.update(state, mini, None, first=True)
        jax.block_until_ready((state, metrics))
        return metrics["objective/loss"], metrics["objective/grad_norm"]

    return timed(update, jax=jax.__version__)


def tunix(share: float) -> dict[str, Any]:
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen2.model import ModelConfig, Qwen2
    from tunix.rl import function_registry
    from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
    from tunix.rl.trainer import Trainer
    from tunix.sft.peft_trainer import TrainingConfig

    shape = ModelConfig(
        num_layers=Z, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=A, head_dim=H, num_kv_heads=K,
        rope_theta=int(THETA), norm_eps=EPS, use_tied_embedding=True,
    )  # fmt: skip
    model, given = Qwen2(shape, rngs=nnx.Rngs(0)), weights()
    model.embedder.input_embedding.value = jnp.asarray(given["embedding"])
    model.final_norm.w.value = jnp.asarray(given["final_norm"])
    for z, layer in enumerate(model.layers):
        for name, param in {
            "attention_norm": layer.input_layernorm.w, "mlp_norm": layer.post_attention_layernorm.w,
            "q": layer.attn.q_proj.w, "k": layer.attn.k_proj.w, "v": layer.attn.v_proj.w, "o": layer.attn.o_proj.w,
            "q_bias": layer.attn.q_bias, "k_bias": layer.attn.k_bias, "v_bias": layer.attn.v_bias,
            "gate": layer.mlp.gate_proj.kernel, "up": layer.mlp.up_proj.kernel, "down": layer.mlp.down_proj.kernel,
        }.items():  # fmt: skip
            param.value = jnp.asarray(given[name][z].reshape(param.value.shape))

    # As `GRPOLearner` sets up its trainer, whose temperature comes from the rollout's settings.
    algorithm: Any = GRPOConfig(num_generations=M // PROMPTS, beta=0.0, epsilon=CLIP, loss_agg_mode="token-mean")
    algorithm.temperature = 1.0
    loss = function_registry.get_policy_loss_fn(algorithm.policy_loss_fn)
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(RATE, weight_decay=DECAY))
    trainer = Trainer(model, optimizer, TrainingConfig(eval_every_n_steps=1), custom_checkpoint_metadata_fn=dict)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=PAD, eos_id=V
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    task = work(share)
    example = TrainExample(
        prompt_ids=jnp.asarray(task.prompts_ML),
        prompt_mask=jnp.asarray(task.prompts_ML != PAD),
        completion_ids=jnp.asarray(task.completions_MC),
        completion_mask=jnp.asarray(task.completions_MC != PAD),
        ref_per_token_logps=None,
        advantages=jnp.asarray(task.advantage_M),
        old_per_token_logps=None,
    )
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def update() -> tuple[Any, Any]:
        loss, _, norm = step(example)
        jax.block_until_ready((loss, norm, nnx.state(trainer.model), nnx.state(trainer.optimizer)))
        return loss, norm

    return timed(update, jax=jax.__version__, tunix=version("google-tunix"))


def child(python: str, arguments: list[str]) -> dict[str, Any]:
    command = [python, str(Path(__file__).resolve()), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(name: str, share: float, arguments: argparse.Namespace) -> bool:
    """Print both and their ratios. Whether they did the same work."""
    own = ["--micro-batch", str(arguments.micro_batch), "--remat", arguments.remat]
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "tunix": []}
    for _ in range(arguments.rounds):
        runs["ours"].append(child(sys.executable, ["--child", "ours", "--share", str(share), *own]))
        runs["tunix"].append(child(arguments.tunix_python, ["--child", "tunix", "--share", str(share)]))

    def median(who: str, key: str) -> float:
        return statistics.median(x for run in runs[who] for x in (run[key] if key != "peak_gb" else [run[key]]))

    print(f"{name}, {arguments.rounds} rounds: ours {runs['ours'][0]['versions']}, {runs['tunix'][0]['versions']}")
    for key, unit in (("cpu", "CPU seconds"), ("wall", "seconds"), ("peak_gb", "GB resident")):
        a, b = median("ours", key), median("tunix", key)
        print(f"  {unit:12s} ours {a:6.2f}  Tunix {b:6.2f}  ratio {a / b:.2f}")
    first = {who: (found[0]["loss"], found[0]["grad_norm"]) for who, found in runs.items()}
    print(f"  loss and gradient norm: ours {first['ours']}, Tunix {first['tunix']}", flush=True)
    return bool(np.allclose(first["ours"], first["tunix"], rtol=TOLERANCE))


def main() -> int:
    parser = argparse.ArgumentParser(description="One policy update: ours against Tunix' train step.")
    parser.add_argument("--tunix-python", help="the interpreter of the environment that has google-tunix")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows that we process at a time")
    parser.add_argument("--remat", default="dots", help="our policy.remat")
    parser.add_argument("--child", choices=("ours", "tunix"), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run = (
            ours(arguments.share, arguments.micro_batch, arguments.remat)
            if arguments.child == "ours"
            else tunix(arguments.share)
        )
        print(json.dumps(run))
        return 0
    if not arguments.tunix_python:
        parser.error("--tunix-python is needed")
    return int(sum(not compared(name, share, arguments) for name, share in SHARES.items()) > 0)


if __name__ == "__main__":
    sys.exit(main())
