"""Every recipe of `configs/methods`: the same update however it is packed and split, and a short run."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from packed_rows import Flat, of_rollouts, packed, programs_of
from packed_rows import updated as update_of
from small_runs import TINY, Coin

from dynamo_jax import trainer as loop
from dynamo_jax.batch import TokenStats
from dynamo_jax.config import Config, MeshConfig, load_config
from dynamo_jax.objective import group_advantage, group_weight
from dynamo_jax.policy import abstract_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.tasks.task import build_task
from dynamo_jax.update import MiniBatch
from dynamo_jax.update.programs import shape_of

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
NONE = (5, 20)  # of them, as dynamic sampling may leave some
L, C = 8, 9


def recipe(name: str, *overrides: str) -> Config:
    path = next(path for path in RECIPES if path.stem == name)
    return load_config(path, [*SMALL, *overrides])


def of_32(name: str, *overrides: str) -> Config:
    """The recipe with all of `small_batch` in one mini-batch: one of two of a step, as KL-Cov needs."""
    sizes = ("rollout.prompts=16", "trainer.mini_batch=32", f"task.max_prompt_tokens={L}", f"rollout.max_tokens={C}")
    return recipe(name, *sizes, *overrides)


GRPO = of_32("grpo")


@cache
def small_batch() -> tuple[Flat, np.ndarray, np.ndarray]:
    """32 rollouts of 8 prompts, shuffled; lengths from none to all. And the prompt and the reward of each."""
    rng = np.random.default_rng(0)
    M = sum(COUNTS)
    prompt_of_M = rng.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS)).astype(np.int32)
    prompts_PL = rng.integers(2, 16, (len(COUNTS), L)).astype(np.int32)
    length_P = rng.integers(1, L + 1, len(COUNTS)).astype(np.int32)
    length_M = rng.integers(0, C + 1, M).astype(np.int32)
    reward_M = rng.integers(0, 2, M).astype(np.float32)
    unset = np.zeros(M, np.float32)
    tokens_MC, random_M = rng.integers(2, 16, (M, C)).astype(np.int32), rng.integers(2**32, size=M, dtype=np.uint32)
    flat = Flat(
        prompts_PL[prompt_of_M], length_P[prompt_of_M], tokens_MC, length_M, unset, unset, random_M,
        np.zeros((M, C), np.float32),
    )  # fmt: skip
    return flat, prompt_of_M, reward_M


def rollouts_of(config: Config, *, alone: bool = False) -> MiniBatch:
    """`small_batch` with the method's advantages and weights in the rows of the config; two rollouts are none."""
    flat, prompt_of_M, reward_M = small_batch()
    o = config.objective
    advantage_M = group_advantage(reward_M, prompt_of_M, len(COUNTS), o.advantage, positive_weight=o.positive_weight)
    weight_M = group_weight(prompt_of_M, len(COUNTS), o.group_weight)
    flat = flat._replace(advantage_M=np.asarray(advantage_M), weight_M=np.asarray(weight_M))
    return packed(flat, shape_of(config), alone=alone, rows_M=np.where(np.isin(np.arange(32), NONE), -1, np.arange(32)))


@cache
def start() -> tuple[Any, TokenStats]:
    """Parameters, and the statistics [M, C] under another policy, far enough for some tokens to be clipped."""
    rng = np.random.default_rng(2)
    abstract = abstract_policy(decoder_config(GRPO, 16, None))[1]
    params = jax.tree.map(lambda x: rng.normal(0.3, 0.4, x.shape).astype(x.dtype), abstract)
    p, mini = programs_of(GRPO, 16, plain=True), rollouts_of(GRPO, alone=True)
    now = TokenStats(*(of_rollouts(mini, x, C) for x in p.score(params, p.place(mini))[0]))
    return params, now._replace(logp=now.logp + rng.normal(0, 0.2, now.logp.shape).astype(np.float32))


def updated(config: Config, mesh: MeshConfig | None = None, *, alone: bool = False) -> tuple[Any, dict[str, float]]:
    """Parameters after one plain gradient step at rate 1, and the metrics, on one device or on a mesh."""
    return update_of(
        programs_of(config, 16, mesh, plain=True), start()[0], rollouts_of(config, alone=alone), start()[1]
    )


VARIANTS = {  # each differs from one device, one micro-batch, a rollout a row and no remat in all of these
    "rows of two, quarters, 2x2x2, full remat": (
        ("trainer.row_tokens=40", "trainer.micro_batch=8", "policy.remat=full"), MeshConfig(data=2, fsdp=2, tensor=2)
    ),
    "rows, 1x8x1, attention kept": (("policy.remat=attention",), MeshConfig(fsdp=8)),
    "rows, quarters, 1x4x2, products kept": (
        ("trainer.micro_batch=8", "policy.remat=dots"), MeshConfig(fsdp=4, tensor=2)
    ),
}  # fmt: skip
CASES = [
    *((name, ()) for name in (*OBJECTIVES, "dapo")),
    ("dynamo", ("objective.group_weight=prompt", "modulation.entropy_change=sequence_mean")),
    ("gspo", ("modulation.enabled=true", "objective.fork_fraction=0.4")),
    ("grpo", ("objective.correction={kind: mask, low: 0.1}",)),  # some tokens count 0
]


def variants(number: int, name: str) -> list[str]:
    """All of them for the paper's method, and one each for the others, in turns: each compiles four programs."""
    return list(VARIANTS) if name == "dynamo" else [list(VARIANTS)[number % len(VARIANTS)]]


@pytest.mark.parametrize(
    ("name", "overrides", "variants"),
    [(name, overrides, variants(number, name)) for number, (name, overrides) in enumerate(CASES)],
    ids=str,
)
def test_packing_meshes_micro_batches_and_remat_update_the_same(
    name: str, overrides: tuple[str, ...], variants: list[str]
) -> None:
    expected, metrics = updated(of_32(name, *overrides), alone=True)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(start()[0]), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3
    for variant in variants:
        settings, mesh = VARIANTS[variant]
        found, found_metrics = updated(of_32(name, *overrides, *settings), mesh)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, err_msg=variant), found, expected)
        assert found_metrics == pytest.approx(metrics, abs=1e-5, rel=1e-5), variant


def test_the_objectives_are_those_of_all_recipes() -> None:
    """The others differ in what is sampled, not in the update."""
    compared = [recipe(name) for name, _ in CASES]
    for path in RECIPES:
        config = recipe(path.stem)
        assert any((config.objective, config.modulation) == (c.objective, c.modulation) for c in compared), path.stem


def test_the_batch_of_these_comparisons_has_what_could_go_wrong() -> None:
    """Unequal groups, none and empty rollouts, more than half of a row for one response, and rows for several."""
    flat, mini = small_batch()[0], rollouts_of(of_32("dynamo", "trainer.micro_batch=8"))
    real = np.setdiff1d(np.arange(32), NONE)
    assert flat.length_M[real].min() == 0
    assert 2 * flat.length_M[real].max() > mini.batch.rows.tokens.shape[-1] == L + C
    assert (mini.batch.prompt_length_M[list(NONE)] == 0).all()
    rows = mini.batch.rows.rollout.reshape(-1, L + C)
    assert max(len(set(row[row < 32].tolist())) for row in rows) > 1
    assert 1 < mini.live < 4


def test_extremes_of_micro_batches_are_those_of_the_released_code() -> None:
    """`modulation.scope: microbatch` is there to reproduce it: one micro-batch is as the whole, several are not."""
    whole = updated(of_32("dynamo"), alone=True)[1]
    one = updated(of_32("dynamo", "modulation.scope=microbatch"), alone=True)[1]
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
