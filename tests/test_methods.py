"""Every recipe of `configs/methods`: the same update on eight devices and in quarter micro-batches, and a short run."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import TINY, Coin

from dynamo_jax import trainer as loop
from dynamo_jax.batch import TokenStats, TrainBatch
from dynamo_jax.config import Config, MeshConfig, load_config
from dynamo_jax.objective import group_advantage, group_weight
from dynamo_jax.policy import abstract_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.model import param_shardings
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.sharding import make_mesh, sharding, to_mesh
from dynamo_jax.tasks.task import build_task
from dynamo_jax.update import init_state, score_rollouts, update_policy

pytestmark = pytest.mark.usefixtures("compiled_once")

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs" / "methods").glob("*.yaml"))
OWN_METRICS = {  # what a method adds to `metrics.jsonl`
    "clip_cov": ["objective/clip_cov_fraction"],
    "dapo": ["reward/overlong_penalty", "rollout/rounds", "rollout/sampled", "rollout/empty_rows"],
    "dynamo": ["modulation/comp_mean", "modulation/stab_mean", "allocation/entropy"],
    "entropy_advantage": ["objective/entropy_advantage"],
    "entropy_loss": ["objective/entropy_bonus"],
    "fork_tokens": ["objective/fork_fraction", "objective/fork_threshold"],
    "kl_cov": ["objective/kl_cov_fraction", "objective/kl_abs"],
    "reinforce_ada": ["rollout/rounds", "rollout/sampled", "rollout/mixed_groups"],
}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """`a.b=c` for each value, which leaves the recipe's other keys of the same sections alone."""
    flat: list[str] = []
    for key, value in tree.items():
        flat += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={json.dumps(value)}"]
    return flat


# What the short runs and the small batch need of the recipes: sizes, and as many chosen tokens as there are tokens.
SMALL = [
    *leaves({name: section for name, section in TINY.items() if name not in ("run_dir", "allocation")}),
    "allocation.high=8", "trainer.steps=3", "objective.clip_cov.fraction=0.1", "objective.clip_cov.low=0.001",
    "objective.kl_cov.fraction=0.1",
]  # fmt: skip
OBJECTIVES = [
    "grpo", "dr_grpo", "rloo", "clip_higher", "entropy_loss", "fork_tokens", "entropy_advantage", "clip_cov", "kl_cov",
    "w_reinforce", "gspo", "dynamo",
]  # fmt: skip
COUNTS = (9, 2, 1, 3, 7, 2, 2, 6)  # unequal groups, 32 rollouts


def recipe(name: str, *overrides: str) -> Config:
    path = next(path for path in RECIPES if path.stem == name)
    return load_config(path, [*SMALL, *overrides])


def of_32(name: str, *overrides: str) -> Config:
    """The recipe with all of `small_batch` in one mini-batch: one of two of a step, as KL-Cov needs."""
    return recipe(name, "rollout.prompts=16", "trainer.mini_batch=32", *overrides)


@cache
def small_batch(seed: int = 0) -> tuple[TrainBatch, np.ndarray, np.ndarray]:
    """32 rollouts of 8 prompts, shuffled; lengths from none to all; some rewards shaped. And the prompt of each."""
    rng = np.random.default_rng(seed)
    M, L, C = sum(COUNTS), 8, 5
    prompt_of_M = rng.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS)).astype(np.int32)
    prompts_PL = rng.integers(2, 16, (len(COUNTS), L)).astype(np.int32)
    length_P = rng.integers(1, L + 1, len(COUNTS)).astype(np.int32)
    length_M = rng.integers(0, C + 1, M).astype(np.int32)
    reward_M = rng.integers(0, 2, M).astype(np.float32)
    unset = np.zeros(M, np.float32)
    return (
        TrainBatch(
            prompts_PL[prompt_of_M], length_P[prompt_of_M], rng.integers(2, 16, (M, C)).astype(np.int32), length_M,
            unset, unset, rng.integers(2**32, size=M, dtype=np.uint32), np.zeros((M, C), np.float32),
        ),
        prompt_of_M,
        reward_M,
    )  # fmt: skip


@cache
def stats_of(config: Config) -> tuple[Any, TokenStats, TokenStats]:
    """Parameters, and the statistics under another and under this policy."""
    batch = small_batch()[0]
    rng = np.random.default_rng(2)
    graph, abstract = abstract_policy(decoder_config(config, 16, None))
    params = jax.tree.map(lambda x: rng.normal(0.3, 0.4, x.shape).astype(x.dtype), abstract)
    now = jax.device_get(jax.jit(lambda p: score_rollouts(nnx.merge(graph, p), batch, config))(params))
    shift = rng.normal(0, 0.2, now.logp.shape).astype(np.float32)
    return params, TokenStats(now.logp + shift, now.entropy, now.lambda_mean), now


def updated(config: Config, mesh: MeshConfig | None = None) -> tuple[Any, dict[str, float]]:
    """Parameters after one plain gradient step at rate 1, and the metrics, on one device or on a mesh."""
    base = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, micro_batch=None))
    params, old, now = stats_of(dataclasses.replace(base, objective=GRPO.objective, modulation=GRPO.modulation))
    batch, prompt_of_M, reward_M = small_batch()
    o = config.objective
    advantage_M = group_advantage(reward_M, prompt_of_M, len(COUNTS), o.advantage, positive_weight=o.positive_weight)
    weight_M = group_weight(prompt_of_M, len(COUNTS), o.group_weight)
    batch = batch._replace(advantage_M=np.asarray(advantage_M), weight_M=np.asarray(weight_M))
    where = make_mesh(mesh) if mesh else None
    decoder = decoder_config(config, 16, where)
    optimizer = optax.sgd(1.0)
    if where is not None:
        params = to_mesh(params, param_shardings(params, where))
        batch, old, now = (to_mesh(x, sharding(where, "batch")) for x in (batch, old, now))
    run = partial(update_policy, abstract_policy(decoder)[0], optimizer=optimizer, config=config)
    state, metrics = jax.jit(run)(init_state(params, optimizer), batch, old, now)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


GRPO = of_32("grpo")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, ()) for name in OBJECTIVES),
        ("dynamo", ("objective.group_weight=prompt", "modulation.entropy_change=sequence_mean")),
        ("gspo", ("modulation.enabled=true", "objective.fork_fraction=0.4")),
    ],
    ids=str,
)
def test_eight_devices_and_quarter_micro_batches_update_the_same(name: str, overrides: tuple[str, ...]) -> None:
    config = of_32(name, *overrides)
    assert small_batch()[0].length_M.min() == 0
    expected, metrics = updated(config)
    before = stats_of(dataclasses.replace(config, objective=GRPO.objective, modulation=GRPO.modulation))[0]
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(before), strict=True)]
    assert max(moved) > 1e-3
    for other in (
        updated(config, MeshConfig(data=2, fsdp=2, tensor=2)),
        updated(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, micro_batch=8))),
    ):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), other[0], expected)
        assert other[1] == pytest.approx(metrics, abs=1e-5, rel=1e-5)


def test_extremes_of_micro_batches_are_those_of_the_released_code() -> None:
    """`modulation.scope: microbatch` is there to reproduce it: one micro-batch is as the whole, several are not."""
    whole = updated(of_32("dynamo"))[1]
    one = updated(of_32("dynamo", "modulation.scope=microbatch"))[1]
    four = updated(of_32("dynamo", "modulation.scope=microbatch", "trainer.micro_batch=8"))[1]
    assert one == pytest.approx(whole, abs=1e-6)
    assert abs(four["modulation/comp_mean"] - whole["modulation/comp_mean"]) > 1e-3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of two updates with a tiny policy; 20 steps at full size are in benchmarks/methods.py."""
    monkeypatch.setattr(loop, "build_task", lambda *given: dataclasses.replace(build_task(*given), verifier=Coin()))
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    loop.train(load_config(path, [*SMALL, f"run_dir={tmp_path / 'run'}"]))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(value is not None for line in lines for value in line.values())
    assert max(line["rollout/logp_drift"] for line in lines[1:]) < 1e-4
    assert sum(line["objective/skipped_updates"] for line in lines[1:]) == 0
    own = OWN_METRICS.get(path.stem, [])
    assert all(name in line for name in own for line in lines[1:])


def test_every_row_of_the_table_has_its_recipe() -> None:
    allocators = {"bernoulli", "neyman", "released", "knapsack", "gvm", "reinforce_ada", "vip"}
    assert {path.stem for path in RECIPES} == {*OBJECTIVES, *allocators, "dapo", "base"}
    for path in RECIPES:
        text = path.read_text()
        assert text.startswith(f"# dynamo-jax train configs/methods/{path.name}\n")
        config = load_config(path)
        assert config.run_dir == f"runs/{path.stem}"
        if path.stem in allocators:
            assert config.allocation.rule == path.stem
