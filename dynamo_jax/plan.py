"""Does a run fit, before there is a TPU to run it on: ahead-of-time compiles of every device program of a config.

The compiler that a TPU machine uses (libtpu) needs no TPU. It is given the trainer's own jitted functions with
abstract arguments, so what it says of memory is what it would say there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from dynamo_jax.allocation.programs import AllocationPrograms
from dynamo_jax.allocation.rules import RULES
from dynamo_jax.batch import PackedRows, TokenStats, TrainBatch
from dynamo_jax.config import Config
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import read_architecture
from dynamo_jax.policy.model import abstract_policy
from dynamo_jax.rollout.build import SpecialTokens, make_samplers
from dynamo_jax.rollout.sampler import Sampler
from dynamo_jax.sharding import make_mesh, sharding
from dynamo_jax.tasks.task import build_tokenizer
from dynamo_jax.update import Programs

GIB = 2**30

# `kept`: the run's other arrays that stay on the device meanwhile. `peak` includes them. Of a loop, XLA's cost analysis
# counts one turn, so FLOPs and bytes accessed compare programs of one config, and are no measure of time.
COLUMNS = ("arguments", "outputs", "temporaries", "kept", "peak", "FLOPs", "bytes", "compiled", "verdict")

# What the compiler lets a program use of a device's HBM, GiB: the figure in its own out-of-memory message.
HBM_GIB = {"TPU v4": 15.25, "TPU v5": 95.73, "TPU v5 lite": 15.75, "TPU v6 lite": 31.24, "TPU7x": 94.74}

# Rows of the success statistics if only the data would tell. They take 16 bytes a prompt.
UNKNOWN_PROMPTS = 100_000

REMEDIES = {
    "sample": "lower rollout.batch or rollout.max_tokens, or take a larger mesh",
    "sample (eval)": "lower rollout.batch or rollout.max_tokens, or take a larger mesh",
    "score": "lower trainer.micro_batch, or take a larger mesh",
    "update": "lower trainer.micro_batch, set policy.remat=true, or take a larger mesh",
}


@dataclasses.dataclass(frozen=True)
class _AnyTokens:
    """Stands in for a tokenizer. These ids are constants of the sampler: which ones makes no difference to its cost."""

    stop_ids: tuple[int, ...] = (0, 1)
    pad_id: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A jitted function of the run, the abstract arguments it is called with, and what else is on the devices then."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident: Any = ()  # pytree of abstract arrays


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What the compiler says of one program, per device. Bytes; `None` where it says nothing."""

    name: str
    resident: int  # of the run, on the device meanwhile, but no argument of this program
    seconds: float  # of compilation
    arguments: int | None = None
    outputs: int | None = None  # beyond those that take over the memory of a donated argument
    temporaries: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    error: str | None = None  # the compiler's out-of-memory message

    @property
    def peak(self) -> int | None:
        """What the device holds while the program runs, all of the run's data included."""
        if self.arguments is None or self.outputs is None or self.temporaries is None:
            return None
        return self.arguments + self.outputs + self.temporaries + self.resident

    def verdict(self, hbm: float | None) -> str:
        """`fits`, or why not and what to do. `hbm`: bytes of a device, None if not known."""
        remedy = REMEDIES.get(self.name, "take a larger mesh")
        if self.error is not None:
            return f"does not fit: {self.error} Remedy: {remedy}."
        if hbm is not None and self.peak is not None and self.peak > hbm:
            return f"does not fit beside the {_gib(self.resident)} GiB that the run keeps. Remedy: {remedy}."
        return "fits"


def plan_command(config: Config, topology: str) -> bool:
    """Print the table of every device program of a run on `topology`, such as `v5e:4x4`. True if all fit.

    Raises `ValueError` where libtpu is missing, for a topology that it does not know or that has fewer devices than the
    mesh, and for a policy whose shape is not known.
    """
    devices = topology_devices(topology)
    hbm_gib = HBM_GIB.get(devices[0].device_kind)
    m = config.mesh
    sys.stdout.write(
        f"{topology}: {len(devices)} x {devices[0].device_kind}, "
        f"{'unknown HBM' if hbm_gib is None else f'{hbm_gib} GiB of HBM'} each; "
        f"mesh data {m.data} x fsdp {m.fsdp} x tensor {m.tensor}. Memory in GiB; all figures are of one device.\n"
        f"{_row('program', *COLUMNS)}\n"
    )
    hbm = None if hbm_gib is None else hbm_gib * GIB
    fits = True
    for plan in compile_jobs(run_jobs(config, make_mesh(m, devices))):
        verdict = plan.verdict(hbm)
        fits &= verdict == "fits"
        sys.stdout.write(_line(plan, verdict) + "\n")
        sys.stdout.flush()  # the next program may take minutes
    return fits


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice that need not exist. Raises `ValueError` without libtpu or for an unknown slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("plan needs the TPU compiler, libtpu, which is not installed: pip install dynamo_jax[tpu]")
    # libtpu reads these as it loads. Without them it asks the cloud's metadata server what it runs on, for minutes.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs; a real TPU stays free for others
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology {topology}: {str(error).splitlines()[0]} Give a slice such as v5e:4x4, v5p:2x2x2 or v6e:4x4."
        ) from None


def run_jobs(config: Config, mesh: Mesh) -> list[Job]:
    """The programs of a run of `config` on `mesh`, built as the trainer builds them. Needs neither weights nor data.

    Raises `ValueError` if the vocabulary is neither in the config nor in `config.json` and there is no tokenizer.
    """
    policy = config.policy
    shape = policy.architecture if policy.load is None else read_architecture(policy.load)
    special: SpecialTokens = _AnyTokens()
    size = shape.vocab_size if shape else None
    if size is None or config.task.kind == "arithmetic":  # whose tokenizer needs no files
        tokenizer = build_tokenizer(config)
        special, size = tokenizer, tokenizer.size
    graph, abstract_params = abstract_policy(decoder_config(config, size, mesh))
    prompts = config.task.arithmetic.train_prompts if config.task.kind == "arithmetic" else UNKNOWN_PROMPTS
    programs = Programs(graph, abstract_params, config, mesh)
    a = config.allocation
    features_NE = np.broadcast_to(np.float32(0), (prompts, a.vip.features)) if RULES[a.rule].features else None
    allocation = AllocationPrograms(a, prompts, config.rollout.budget, mesh, features_NE=features_NE)
    return jobs(config, mesh, programs, allocation, *make_samplers(graph, config, special, mesh))


def jobs(
    config: Config,
    mesh: Mesh,
    programs: Programs,
    allocation: AllocationPrograms,
    sampler: Sampler,
    eval_sampler: Sampler,
) -> list[Job]:
    """Each program with the abstract values of what `trainer.py` and `rollout/sampler.py` call it with."""
    rows = sharding(mesh, "batch")
    P, B, L = config.rollout.prompts, config.rollout.budget, config.task.max_prompt_tokens

    def split(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def host(*shape: int, dtype: Any = jnp.int32, weak_type: bool = False) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type)  # numpy arrays come without a sharding

    state, stats = programs.abstract_state, allocation.abstract_stats
    key_type = jax.eval_shape(lambda: jax.random.key(0)).dtype
    key: Any = jax.ShapeDtypeStruct((), key_type, sharding=sharding(mesh))
    step = host(weak_type=True)  # a Python integer
    index_P, reward_B = host(P), host(B, dtype=jnp.float32)

    a = config.allocation
    features = host(P, a.vip.features, dtype=jnp.float32) if RULES[a.rule].features else None

    def everywhere(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh))

    def packed(dtype: Any, batches: int = 1) -> Any:
        shape = programs.shape._replace(micro_batches=batches * programs.shape.micro_batches)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, None, "batch"))

    def mini_batch(batches: int = 1) -> tuple[TrainBatch, TokenStats]:
        int_IGS, float_IGS, M = packed(jnp.int32, batches), packed(jnp.float32, batches), config.mini_batch * batches
        float_M, random_M = everywhere(M, dtype=jnp.float32), everywhere(M, dtype=jnp.uint32)
        rows = PackedRows(int_IGS, int_IGS, int_IGS, float_IGS)
        batch = TrainBatch(rows, everywhere(M), everywhere(M), float_M, float_M, random_M)
        return batch, TokenStats(float_IGS, float_IGS, float_IGS)

    batch, old = mini_batch()
    # All mini-batches of a step and their scores wait on the devices for their updates.
    waiting = mini_batch(B // config.mini_batch - 1)
    index = host()
    moments = (state._replace(params=None), stats)  # and masters, if it has any

    found = [Job("allocate", allocation.allocate_program, (stats, index_P, step, features), state)]
    for name, s in {"sample": sampler, "sample (eval)": eval_sampler}.items():
        window, b = s.config.window, s.config.batch
        inputs = (split(window, L), split(window), split(b), split(b), key)
        if s is not sampler or name == "sample":
            found.append(Job(name, s.program, (state.params, *inputs), moments))
    return [
        *found,
        *update_jobs(programs, state, batch, old, index, moments, (stats, waiting)),
        Job("record", allocation.record_program, (stats, index_P, host(B), reward_B, reward_B, step, features), state),
    ]


def update_jobs(
    programs: Programs, state: Any, batch: TrainBatch, old: TokenStats, index: Any, moments: Any, waiting: Any
) -> list[Job]:
    """The programs of `update/programs.py` that this run uses."""
    beside, found = (moments, waiting), []
    if programs.scores_first or not programs.alone:
        found.append(Job("score", programs.score_program, (state.params, batch, index, old), beside))
    if programs.alone:
        old_logp = old.logp if programs.scores_first else None
        return [*found, Job("update", programs.whole_program, (state, batch, old_logp), waiting)]
    of_terms = (state.params, batch, old.logp, old)
    terms, metrics, total = jax.tree.map(
        lambda where, below: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), below),
        programs.terms_shardings,
        jax.eval_shape(programs.terms_program, *of_terms),
    )
    of_update = (total, state.params, batch, old.logp, terms, index)
    return [
        *found,
        Job("terms", programs.terms_program, of_terms, beside),
        Job("update", programs.gradient_program, of_update, beside),
        Job("update (apply)", programs.apply_program, (state, total, metrics), waiting),
    ]


def compile_jobs(found: list[Job]) -> Iterator[ProgramPlan]:
    """Compile one program after the other: each takes seconds to minutes, and gigabytes of the host's memory."""
    for job in found:
        resident, began = sum(_device_bytes(x) for x in jax.tree.leaves(job.resident)), time.perf_counter()
        try:
            compiled = job.function.lower(*job.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield ProgramPlan(job.name, resident, time.perf_counter() - began, error=_one_line(str(error)))
            continue
        seconds = time.perf_counter() - began
        m, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        outputs = m.output_size_in_bytes - m.alias_size_in_bytes
        yield ProgramPlan(
            job.name,
            resident,
            seconds,
            arguments=m.argument_size_in_bytes,
            outputs=outputs,
            temporaries=m.temp_size_in_bytes,
            flops=cost.get("flops"),
            bytes_accessed=cost.get("bytes accessed"),
        )


def _device_bytes(x: Any) -> int:
    shard: tuple[int, ...] = x.sharding.shard_shape(x.shape)
    return math.prod(shard) * int(x.dtype.itemsize)


def _one_line(message: str) -> str:
    """`RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory ...` without codes, module name and links."""
    text = re.sub(r"^(\w+: )*", "", message.splitlines()[0])
    return re.sub(r"\s*HLO module: \S+$", "", text)


def _row(name: str, *cells: str) -> str:
    return f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells[:-1]) + f"  {cells[-1]}"


def _line(plan: ProgramPlan, verdict: str) -> str:
    memory = (plan.arguments, plan.outputs, plan.temporaries, plan.resident, plan.peak)
    cost = (plan.flops, plan.bytes_accessed)
    return _row(
        plan.name,
        *("-" if x is None else _gib(x) for x in memory),
        *("-" if x is None else f"{x:.2e}" for x in cost),
        f"{plan.seconds:.0f} s",
        verdict,
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}"
