"""`dynamo-jax plan`: the programs that it compiles are the trainer's, and what it says of those that do not fit."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dynamo_jax.cli import main
from dynamo_jax.config import load_config
from dynamo_jax.plan import GIB, ProgramPlan, compile_job, jobs, plan_command, run_jobs
from dynamo_jax.run.stopping import Ending
from dynamo_jax.sharding import make_mesh
from dynamo_jax.tasks.task import build_task
from dynamo_jax.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "configs" / "arithmetic_cpu.yaml"
SMALL = [
    "warmup.steps=0", "rollout.prompts=8", "rollout.per_prompt=4", "rollout.batch=16", "trainer.mini_batch=16",
    "trainer.micro_batch=8", "task.arithmetic.heldout_prompts=4", "eval.samples=2", "eval.k=[1]",
    "logging.rollouts_per_step=0", "mesh.fsdp=2",
]  # fmt: skip

UPDATE = ["score", "terms", "update", "update (apply)"]
MATH = ["task.kind=math", "task.train=[no/data.parquet]", "task.tokenizer=no/tokenizer"]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is missing: pip install dynamo_jax[tpu]"
)


def small_config(tmp_path, *overrides):
    return load_config(ARITHMETIC, [*SMALL, f"run_dir={tmp_path / 'run'}", *overrides])


def test_planned_programs_are_those_that_the_trainer_runs(tmp_path):
    """A step and an evaluation after the plan trace nothing again: function, shapes and dtypes were the same."""
    config = small_config(tmp_path, "eval.temperature=0.5")
    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, build_task(config), mesh, Ending())
    trainer.keeper = None  # which would save a reference policy; this run has none
    trainer._start()
    programs = (trainer.programs, trainer.allocation, trainer.sampler, trainer.eval_sampler)
    found = jobs(config, mesh, *programs)
    assert [job.name for job in found] == ["allocate", "sample", "sample (eval)", *UPDATE, "record"]
    for job in found:
        job.function.lower(*job.arguments)
    trainer.step(1)
    trainer._evaluate()
    assert trainer.programs.traces == dict.fromkeys(UPDATE, 1)
    assert trainer.allocation.traces == {"allocate": 1, "record": 1}
    assert (trainer.sampler.traces, trainer.eval_sampler.traces) == (1, 1)


def test_memory_of_a_device_is_reported(tmp_path):
    """On CPU devices, whose compiler reports it too: the arguments are the shards, the moments are kept meanwhile."""
    config = small_config(tmp_path)
    found = {job.name: job for job in run_jobs(config, make_mesh(config.mesh))}
    assert "sample (eval)" not in found  # its settings are the training sampler's
    score = compile_job(found["score"])
    state = found["update (apply)"].arguments[0]
    params, moments = (
        sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    assert params <= score.arguments < params + moments
    assert score.resident >= moments
    assert score.peak == score.arguments + score.outputs + score.temporaries + score.resident
    assert score.verdict(hbm=None) == score.verdict(hbm=GIB) == "fits"


def test_masters_of_a_bfloat16_policy_stay_on_the_device_while_it_samples_and_scores(tmp_path):
    config = small_config(tmp_path, "policy.param_dtype=bfloat16")
    found = {job.name: job for job in run_jobs(config, make_mesh(config.mesh))}
    state = found["update (apply)"].arguments[0]
    assert {x.dtype.name for x in jax.tree.leaves(state.masters)} == {"float32"}
    for name in ("sample", "score"):
        kept = {id(x) for x in jax.tree.leaves(found[name].resident)}
        assert all(id(x) in kept for x in jax.tree.leaves((state.masters, state.opt_state)))
        assert not any(id(x) in kept for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("host_memory", [False, True])
def test_a_reference_stays_on_the_device_or_comes_for_its_pass(tmp_path, host_memory):
    overrides = ["objective.kl.coefficient=0.1", f"objective.kl.host_memory={str(host_memory).lower()}"]
    config = small_config(tmp_path, *overrides)
    found = {job.name: job for job in run_jobs(config, make_mesh(config.mesh))}
    its_pass = found.pop("score (reference)")
    reference = jax.tree.leaves(its_pass.arguments[0])
    assert {x.dtype.name for x in reference} == {"bfloat16"}
    kept = {id(x) for x in jax.tree.leaves(its_pass.resident)}
    assert all(id(x) in kept for x in jax.tree.leaves(found["update (apply)"].arguments[0]))  # the policy's state
    for job in found.values():
        kept = {id(x) for x in jax.tree.leaves(job.resident)}
        assert [id(x) in kept for x in reference] == [not host_memory] * len(reference), job.name
    assert found["score"].arguments[1].rows.reference_logp.shape == found["score"].arguments[1].rows.tokens.shape


@pytest.mark.parametrize("load", [False, True])
def test_a_known_vocabulary_needs_no_tokenizer_weights_or_data(tmp_path, load):
    sizes = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "vocab_size": 96}
    if load:
        names = {"num_heads": "num_attention_heads"}
        text = {names.get(key, key): value for key, value in sizes.items()}
        text |= {"model_type": "qwen2", "num_hidden_layers": 2, "num_key_value_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps(text))
        policy = ["policy.architecture=null", f"policy.load={tmp_path}"]
    else:
        policy = [f"policy.architecture={json.dumps(sizes)}"]
    config = small_config(tmp_path, *MATH, *policy)
    found = run_jobs(config, make_mesh(config.mesh))
    assert [job.name for job in found] == ["allocate", "sample", *UPDATE, "record"]
    embedding = next(job for job in found if job.name == "score").arguments[0]["embedding"]
    assert embedding.get_value().shape == (96, 32)


def test_an_unknown_vocabulary_needs_the_tokenizer(tmp_path):
    config = small_config(tmp_path, *MATH)
    with pytest.raises(ValueError, match="no/tokenizer"):
        run_jobs(config, make_mesh(config.mesh))


def test_without_libtpu_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install dynamo_jax\[tpu\]"):
        plan_command(small_config(tmp_path), "v5e:2x2")


def test_verdict_names_the_remedy():
    plan = ProgramPlan("update", GIB, 1.0, arguments=GIB, outputs=0, temporaries=2 * GIB)
    assert plan.peak == 4 * GIB
    assert plan.verdict(4 * GIB) == "fits"
    assert "beside the 1.000 GiB" in plan.verdict(3.5 * GIB)
    assert "policy.remat=full" in plan.verdict(3.5 * GIB)
    failed = ProgramPlan("sample", 0, 1.0, error="Ran out of memory.")
    assert failed.peak is None
    assert failed.verdict(None).startswith("does not fit: Ran out of memory. Remedy: lower rollout.batch")


def test_the_recipes_of_the_paper_are_its_published_script():
    for name in ("1.5b", "7b"):
        path = ROOT / "configs" / f"qwen2.5_math_{name}.yaml"
        c = load_config(path)
        assert (c.rollout.prompts, c.rollout.budget, c.mini_batch) == (512, 512 * 16, 32 * 16)
        assert (c.allocation.low, c.allocation.high) == (8, 24)
        assert c.task.max_prompt_tokens + c.rollout.max_tokens == 4096  # the model's positions
        head = path.read_text().partition("run_dir")[0]
        assert head.startswith(f"# dynamo-jax train configs/{path.name}\n")
        assert "NOT YET RUN" in head


def run(*arguments):
    """In a process of its own: libtpu takes a lock, and jax here runs on eight CPU devices already."""
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600, check=False
    )


def independent_sum(text, clock):
    """Seconds: estimated cycles by another reading of the text, loops times the constant of their conditions."""
    bodies = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            bodies[name := "ENTRY" if head[1] else head[2]] = []
        elif line.startswith("  "):
            bodies[name].append(line)

    def cycles(name):
        total = 0
        for line in bodies[name]:
            if loop := re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                inner = re.findall(r"calls=%([\w.\-]+)", "".join(bodies[loop[1]]))
                condition = "".join(line for name in (loop[1], *inner) for line in bodies[name])
                limits = re.findall(r" constant\((\d+)\)", condition)
                total += max(map(int, limits), default=1) * cycles(loop[2])
            elif branches := re.search(r"branch_computations=\{%([^}]*)\}", line):
                total += max(cycles(branch) for branch in branches[1].split(", %"))
            else:
                total += sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', line)))
        return total

    return cycles("ENTRY") / clock


@needs_libtpu
def test_plan_of_a_slice(tmp_path):
    """The whole command. What it says of time agrees with another sum over the texts that it leaves."""
    words = [str(ARITHMETIC), "mesh.fsdp=2", "mesh.tensor=2", "trainer.micro_batch=128", "--topology", "v5e:2x2"]
    words += ["--price", "1.2", "--lengths", "prompt=10,response=5"]
    words += ["--json", str(tmp_path / "p.json"), "--hlo", str(tmp_path / "hlo")]
    done = run("-m", "dynamo_jax", "plan", *words)
    assert done.returncode == 0, done.stderr
    title, _, *rows = done.stdout.splitlines()
    assert title.startswith("v5e:2x2: 4 x TPU v5 lite, 15.75 GiB")
    names = ["allocate", "sample", *UPDATE, "record"]
    assert [row[:14].rstrip() for row in rows[: len(names)]] == names
    assert all(row.endswith("  fits") for row in rows[: len(names)])
    assert "prompts of 10 tokens, responses of 5 on the average (lognormal with sigma 0.8, cut at 8)" in done.stdout
    assert "of 4 chips at $1.2 a chip-hour" in done.stdout

    said = json.loads((tmp_path / "p.json").read_text())
    step, programs = said["step"], said["programs"]
    assert [one["name"] for one in programs] == names
    for one in programs:
        text = Path(one["hlo"]).read_text()
        assert independent_sum(text, 1.5e9) + one["kernel_seconds"] == pytest.approx(one["seconds"], rel=1e-6)
        assert text.startswith(f"// {one['name']}: {one['seconds']:.9f} s a call")
        assert one["seconds_low"] <= one["seconds_high"]
        assert len(one["costliest"]) == 5
    by_name = {one["name"]: one for one in programs}
    assert by_name["update"]["calls"] == by_name["score"]["calls"] >= 1
    for phase, used in (("score", UPDATE[:1]), ("update", UPDATE[1:])):
        assert step[f"{phase}_seconds"] == pytest.approx(sum(by_name[n]["calls"] * by_name[n]["seconds"] for n in used))
    lines = [entry["where"] for entry in by_name["score"]["costliest"]]
    assert any(re.match(r"(policy|kernels)/\w+(/\w+)?\.py:\d+ \w+", line) for line in lines)
    assert step["sample_seconds"] < by_name["sample"]["seconds"]  # the longest of its responses ends before the limit
    assert step["allocate_seconds"] < by_name["allocate"]["seconds"]
    parts = ("sample", "score", "update", "allocate")
    assert step["seconds"] == pytest.approx(sum(step[f"{part}_seconds"] for part in parts))
    assert step["update_mfu"] == pytest.approx(step["model_flops"] / (step["update_seconds"] * 4 * 197e12))
    assert step["dollars"] == pytest.approx(1.2 * 4 * step["seconds"] / 3600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "prompt=9"], "--lengths prompt=9: the mean of response is missing"),
        (["--lengths", "prompt=9,response=9"], "limit rollout.max_tokens = 8"),
        (["--json", "no/such/p.json"], "--json no/such/p.json: is a folder, or in none. Give a file name"),
        (["--json", "."], "--json .: is a folder"),
        (["--search", "--hlo", "no"], "--search compiles many plans and keeps none: leave --hlo out"),
        (["--hlo", "README.md"], "--hlo README.md: is no folder and cannot be made: File exists. Give another"),
    ],
)
def test_bad_options_are_one_line_before_anything_compiles(monkeypatch, capsys, words, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("dynamo_jax.plan.command.topology_devices", lambda _: pytest.fail("went on"))
    assert main(["plan", str(ARITHMETIC), "--topology", "v5e:2x2", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("price", ["much", "-1", "nan", "inf"])
def test_a_price_is_a_number(capsys, price):
    with pytest.raises(SystemExit) as error:
        main(["plan", "c.yaml", "--topology", "v5e:2x2", "--price", price])
    assert error.value.code == 2
    assert f"argument --price: {price!r} is not a price in dollars, such as 1.2" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "override", "message"),
    [
        ("v5e:2x2", "mesh.fsdp=8", "needs 8 devices, but there are 4 (TPU v5 lite)"),
        ("v5e", "seed=0", "--topology v5e: "),
        ("v9z:2x2", "seed=0", "--topology v9z:2x2: "),
        ("v3:2x2", "seed=0", "--topology v3:2x2: "),
    ],
)
def test_a_slice_that_does_not_do_is_one_line(topology, override, message):
    done = run("-m", "dynamo_jax", "plan", str(ARITHMETIC), override, "--topology", topology)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


OUT_OF_MEMORY = """
import jax, jax.numpy as jnp
from dynamo_jax.config import MeshConfig
from dynamo_jax.plan import Job, compile_job, topology_devices
from dynamo_jax.sharding import make_mesh, sharding

where = sharding(make_mesh(MeshConfig(fsdp=4), topology_devices("v5e:2x2")), "batch")
x = jax.ShapeDtypeStruct((4, 2**33), jnp.float32, sharding=where)
plan = compile_job(Job("update", jax.jit(lambda x: x * 2), (x,)))
print(plan.verdict(None))
"""


@needs_libtpu
def test_out_of_memory_is_one_line_with_a_remedy():
    done = run("-c", OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("does not fit: Ran out of memory")
    assert "15.75G" in line
    assert line.endswith("or take a larger mesh.")
