"""Which mesh, micro-batch and rematerialisation make a step cheapest on a slice: `dynamo-jax plan --search`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from dynamo_jax.config import Config, ConfigError, MeshConfig
from dynamo_jax.config.checks import impossible
from dynamo_jax.config.choices import Remat
from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.compiled import device_bytes
from dynamo_jax.plan.estimate import ProgramEstimate, estimate, step_cost
from dynamo_jax.plan.jobs import planned_policy, run_jobs
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.plan.step import PROGRAMS, StepCost, Work, multiplied_parameters, train_flops
from dynamo_jax.policy.model import DecoderConfig, abstract_policy
from dynamo_jax.policy.params import axis_sizes
from dynamo_jax.sharding import make_mesh
from dynamo_jax.update.optimizer import make_optimizer
from dynamo_jax.update.state import abstract_state

TRIED = 10  # candidates that are compiled: each takes minutes
SHOWN = 3

# The rematerialisation policies, those that keep least first, and how many forward passes an update makes.
_FORWARD: dict[Remat, float] = {"full": 2.0, "attention": 1.9, "dots": 1.1, "none": 1.0}
# Programs in the order of their need for memory: most candidates that do not fit fail at the first.
_ORDER = ("update", "score", "sample")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config to try, and what is known of it before it is compiled."""

    config: Config
    bytes: float  # that a device needs at least
    seconds: float  # of score and update, roughly

    @property
    def overrides(self) -> str:
        """What to add to the command."""
        c = self.config
        mesh = " ".join(f"mesh.{name}={size}" for name, size in dataclasses.asdict(c.mesh).items())
        return f"{mesh} trainer.micro_batch={c.micro_batch} policy.remat={c.policy.remat}"

    def needs_more_than(self, other: Candidate) -> bool:
        """Whether it cannot fit where `other`, on the same mesh, does not."""
        mine, its = self.config, other.config
        keeps = list(_FORWARD)
        return (
            mine.mesh == its.mesh
            and mine.micro_batch >= its.micro_batch
            and keeps.index(mine.policy.remat) >= keeps.index(its.policy.remat)
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate that fits."""

    candidate: Candidate
    step: StepCost
    of_hbm: float  # the largest program's share

    @property
    def rank(self) -> float:
        """Seconds: the middle between all sent beside the computation and all after it."""
        return (self.step.low + self.step.high) / 2


def search(config: Config, devices: Sequence[jax.Device], chip: Chip, lengths: Lengths) -> list[Found]:
    """The best `SHOWN` of the candidates that fit, the cheapest step first. Prints what it tries.

    Candidates are compiled in the order of a rough estimate, `TRIED` of them at most.
    """
    possible = sorted(candidates(config, devices, chip, lengths), key=lambda one: one.seconds)
    room = [one for one in possible if one.bytes <= chip.hbm]
    sys.stdout.write(
        f"{len(possible)} ways to run it on {len(devices)} devices, {len(room)} of which may fit; at most {TRIED}, "
        "those that look best, are compiled.\n"
    )
    found: list[Found] = []
    failed: list[Candidate] = []
    known: dict[tuple[object, ...], ProgramEstimate] = {}
    tried = 0
    for one in room:
        if tried == TRIED:
            break
        if any(one.needs_more_than(other) for other in failed):
            continue
        tried += 1
        programs = list(_programs(one.config, devices, chip, lengths, known))
        peaks = [program.plan.peak for program in programs]
        verdict = programs[-1].plan.verdict(chip.hbm)
        step = step_cost(one.config, devices, chip, lengths, programs) if verdict == "fits" else None
        if step is None:
            failed.append(one)
            sys.stdout.write(f"  {one.overrides}: {programs[-1].name} {verdict}\n")
        else:
            found.append(Found(one, step, max(peak or 0 for peak in peaks) / chip.hbm))
            sys.stdout.write(f"  {one.overrides}: {_said(found[-1])}\n")
        sys.stdout.flush()
    return sorted(found, key=lambda one: one.rank)[:SHOWN]


def best_lines(found: Sequence[Found]) -> str:
    """The result, as overrides to paste."""
    if not found:
        return "Nothing that was tried fits. Take a larger slice, or lower rollout.batch or rollout.max_tokens.\n"
    lines = [f"{number}. {one.candidate.overrides}\n   {_said(one)}\n" for number, one in enumerate(found, 1)]
    return "The best that fit:\n" + "".join(lines)


def _said(one: Found) -> str:
    step = one.step
    return (
        f"{step.seconds:.4g} s a step ({step.low:.4g} to {step.high:.4g} with the links), update at "
        f"{step.update_mfu:.1%} of peak, {one.of_hbm:.0%} of HBM"
    )


def candidates(config: Config, devices: Sequence[jax.Device], chip: Chip, lengths: Lengths) -> Iterator[Candidate]:
    """Every mesh of all devices that divides the policy's shape, with every micro-batch of a power of two rows a shard
    and every policy of rematerialisation."""
    count = len(devices)
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            mesh = MeshConfig(count // tensor // fsdp, fsdp, tensor)
            for rows in _powers(config.mini_batch // mesh.batch_shards):
                trainer = dataclasses.replace(config.trainer, micro_batch=rows * mesh.batch_shards)
                one = dataclasses.replace(config, mesh=mesh, trainer=trainer)
                if impossible(one):
                    continue
                grid = make_mesh(mesh, devices)
                try:
                    decoder = planned_policy(one, grid)[1]
                except ConfigError:  # the mesh does not divide the policy
                    break
                state = _state_bytes(one, decoder, grid)
                for remat in _FORWARD:
                    policy = dataclasses.replace(one.policy, remat=remat)
                    full = dataclasses.replace(one, policy=policy)
                    needed = state + _kept_bytes(full, decoder)
                    yield Candidate(full, needed, _rough_seconds(full, decoder, chip, lengths))


def _state_bytes(config: Config, decoder: DecoderConfig, mesh: Mesh) -> float:
    """Of parameters, optimizer and the gradients that are added up."""
    abstract = abstract_policy(decoder)[1]
    state = abstract_state(abstract, make_optimizer(config.optimizer), mesh)
    gradients = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract))
    return sum(device_bytes(x) for x in jax.tree.leaves(state)) + gradients


def _kept_bytes(config: Config, decoder: DecoderConfig) -> float:
    """Of what the forward pass of a micro-batch keeps of its layers for the backward pass, at least."""
    z, tensor = axis_sizes(decoder.shape), config.mesh.tensor
    heads, mlp = z["A"] * z["H"] / tensor, z["F"] / tensor
    widths = {"full": 0.0, "attention": heads, "dots": 2 * heads + 2 * mlp, "none": 2 * heads + 2 * mlp}
    tokens = config.micro_batch / config.mesh.batch_shards * config.row_tokens
    width = z["D"] + widths[config.policy.remat]
    return z["Z"] * tokens * width * (2 if config.policy.compute_dtype == "bfloat16" else 4)


def _rough_seconds(config: Config, decoder: DecoderConfig, chip: Chip, lengths: Lengths) -> float:
    """Of a step's score and update: products at the peak, then what is sent on one ring. Only to order candidates by.

    A micro-batch gathers the weights over fsdp for each pass and scatters their gradients; tensor parallelism adds up
    the activations of attention and of the MLP in each pass; data parallelism adds up gradients once an update.
    """
    work, z, mesh = Work(config, lengths), axis_sizes(decoder.shape), config.mesh
    slots = config.micro_batch * config.row_tokens
    forward = train_flops(decoder.shape, work) / 3 / (1 - work.padding)
    passes = 2 + _FORWARD[config.policy.remat]  # of an update: the backward pass is two
    scored = work.scores / sum(work.live)
    products = forward * (passes + scored) / (chip.flops * mesh.size)
    weights = 2 * multiplied_parameters(decoder.shape) / mesh.tensor  # bytes in bfloat16
    part = (mesh.fsdp - 1) / mesh.fsdp
    gathers = part * weights * (work.scores + sum(work.live) * (passes + 2))
    adds = 2 * (mesh.tensor - 1) / mesh.tensor * 2 * z["Z"] * (slots / mesh.batch_shards * z["D"] * 2)
    activations = adds * (work.scores + sum(work.live) * passes)
    gradients = 2 * (mesh.data - 1) / mesh.data * 2 * weights / mesh.fsdp * work.mini_batches
    return products + (gathers + activations + gradients) / chip.ring


def _programs(
    config: Config,
    devices: Sequence[jax.Device],
    chip: Chip,
    lengths: Lengths,
    known: dict[tuple[object, ...], ProgramEstimate],
) -> Iterator[ProgramEstimate]:
    """Each program of the run, until one does not fit. `known`: those of other candidates, which may be the same."""
    jobs = run_jobs(config, make_mesh(config.mesh, devices))
    for job in sorted(jobs, key=lambda job: _ORDER.index(job.name) if job.name in _ORDER else len(_ORDER)):
        rows = config.micro_batch if job.name.startswith(("score", "terms", "update")) else None
        key = (job.name, config.mesh, rows, config.policy.remat if job.name == "update" else None)
        if key not in known:
            known[key] = estimate(job, config, chip, lengths)
        one = known[key]
        yield dataclasses.replace(one, calls=PROGRAMS[job.name].calls(Work(config, lengths)))
        if one.plan.verdict(chip.hbm) != "fits":
            return


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(most: int) -> list[int]:
    return [2**k for k in range(max(1, most).bit_length()) if 2**k <= most]
