"""The search for the cheapest way to run a recipe: what is tried, in which order, what is shown. Nothing compiles."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from dynamo_jax.config import load_config
from dynamo_jax.plan import search as module
from dynamo_jax.plan.chips import CHIPS, GIB
from dynamo_jax.plan.compiled import ProgramPlan
from dynamo_jax.plan.cost import Cost
from dynamo_jax.plan.estimate import ProgramEstimate
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.plan.search import best_lines, candidates, search
from dynamo_jax.plan.step import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
CHIP = CHIPS["TPU v5 lite"]
LENGTHS = Lengths(10, 5, 8, "")
# Four query heads and two of keys and values: tensor is 1 or 2.
SHAPE = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}


@pytest.fixture(scope="module")
def config():
    return load_config(
        ROOT / "configs" / "arithmetic_cpu.yaml",
        ["warmup.steps=0", "rollout.prompts=8", "rollout.per_prompt=4", "trainer.mini_batch=16",
         f"policy.architecture={json.dumps(SHAPE)}"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def every(config):
    return list(candidates(config, jax.devices(), CHIP, LENGTHS))


def test_every_mesh_that_divides_the_policy_with_every_micro_batch(every):
    """Of 8 devices: data and fsdp share 8 or 4; 16 rollouts make micro-batches of 1, 2 (and 4) rows a shard."""
    meshes = {dataclasses.astuple(one.config.mesh) for one in every}
    assert meshes == {(8 // t // f, f, t) for t in (1, 2) for f in (1, 2, 4, 8) if t * f <= 8}
    for mesh, size in (((8, 1, 1), 8), ((2, 2, 2), 4)):
        of_mesh = [one.config for one in every if dataclasses.astuple(one.config.mesh) == mesh]
        rows = {16 // size: [1, 2], 4: [1, 2, 4]}[16 // size]
        assert [(c.micro_batch, c.policy.remat) for c in of_mesh] == [
            (size * n, remat) for n in rows for remat in ("full", "attention", "dots", "none")
        ]
    assert every[0].overrides == "mesh.data=8 mesh.fsdp=1 mesh.tensor=1 trainer.micro_batch=8 policy.remat=full"


def test_what_is_known_before_compiling(every):
    """More sharding and more rematerialisation need less; larger micro-batches more."""
    of = {(dataclasses.astuple(c.config.mesh), c.config.micro_batch, c.config.policy.remat): c for c in every}
    assert of[(1, 8, 1), 8, "full"].bytes < of[(8, 1, 1), 8, "full"].bytes
    assert of[(1, 8, 1), 8, "full"].bytes < of[(1, 8, 1), 8, "attention"].bytes < of[(1, 8, 1), 8, "none"].bytes
    assert of[(1, 8, 1), 8, "full"].bytes < of[(1, 8, 1), 16, "full"].bytes
    small, large = of[(1, 8, 1), 8, "attention"], of[(1, 8, 1), 16, "dots"]
    assert large.needs_more_than(small)
    assert not small.needs_more_than(large)
    assert not of[(2, 4, 1), 16, "dots"].needs_more_than(small)  # another mesh


def stand_in(monkeypatch, fits, seconds):
    """Compiling, replaced: `fits` and `seconds` say what of a config's update. Returns what was compiled."""
    compiled = []

    def estimate(job, config, chip, lengths):
        compiled.append((job.name, config))
        peak = GIB if job.name != "update" or fits(config) else 99 * GIB
        plan = ProgramPlan(job.name, 0, 1.0, arguments=peak, outputs=0, temporaries=0, text="")
        cost = Cost(seconds=seconds(config) if job.name == "update" else 1.0)
        return ProgramEstimate(plan, PROGRAMS[job.name].phase, 1, cost, cost)

    monkeypatch.setattr(module, "estimate", estimate)
    return compiled


def test_the_best_three_that_fit_are_shown(monkeypatch, capsys, config):
    order = {"full": 1.0, "attention": 2.0, "dots": 3.0, "none": 4.0}
    compiled = stand_in(monkeypatch, lambda c: c.policy.remat != "none", lambda c: order[c.policy.remat])
    found = search(config, jax.devices(), CHIP, LENGTHS)
    said = capsys.readouterr().out
    assert [one.rank for one in found] == sorted(one.rank for one in found)
    assert len(found) == 3
    tried = [line for line in said.splitlines() if "policy.remat=" in line]
    assert len(tried) == 10
    assert all(("update does not fit" in line) == ("remat=none" in line) for line in tried)
    assert best_lines(found).startswith(f"The best that fit:\n1. {found[0].candidate.overrides}\n   ")
    assert {one.candidate.config.policy.remat for one in found} <= {"full", "attention", "dots"}
    # A mesh's sampler is compiled once, whatever else differs.
    samplers = [c.mesh for name, c in compiled if name == "sample"]
    assert len(samplers) == len(set(samplers))


def test_what_needs_more_than_what_failed_is_not_tried(monkeypatch, capsys, config):
    compiled = stand_in(monkeypatch, lambda _: False, lambda _: 1.0)
    assert search(config, jax.devices(), CHIP, LENGTHS) == []
    capsys.readouterr()
    assert {name for name, _ in compiled} == {"update"}  # nothing else of what does not fit
    seen = []
    for _, c in compiled:
        one = module.Candidate(c, 0, 0)
        assert not any(one.needs_more_than(other) for other in seen)
        seen.append(one)
    assert best_lines([]).startswith("Nothing that was tried fits. Take a larger slice")


def test_a_chip_without_room_compiles_nothing(monkeypatch, capsys, config):
    compiled = stand_in(monkeypatch, lambda _: True, lambda _: 1.0)
    assert search(config, jax.devices(), dataclasses.replace(CHIP, hbm=1000.0), LENGTHS) == []
    assert compiled == []
    assert "0 of which may fit" in capsys.readouterr().out
