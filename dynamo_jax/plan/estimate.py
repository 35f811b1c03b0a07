"""A run on a slice, program by program: memory, time, and what a step of it all costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from dynamo_jax.config import Config
from dynamo_jax.plan.chips import Chip
from dynamo_jax.plan.compiled import ProgramPlan, compile_job
from dynamo_jax.plan.cost import Cost, program_cost
from dynamo_jax.plan.hlo import parse
from dynamo_jax.plan.jobs import Job, planned_policy
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.plan.step import PROGRAMS, StepCost, Work, train_flops
from dynamo_jax.sharding import make_mesh

PHASES = ("sample", "score", "update", "allocate")


@dataclasses.dataclass(frozen=True)
class ProgramEstimate:
    """A program of a run: the compiler's plan of it, the time of a call, and the calls of a step."""

    plan: ProgramPlan
    phase: str
    calls: float
    cost: Cost | None = None  # of a call, as the text says: every loop to its limit; None if it does not fit
    usual: Cost | None = None  # of a call with rollouts of the given lengths, where loops end earlier
    hlo: Path | None = None  # where its text is

    @property
    def name(self) -> str:
        return self.plan.name


def estimate(job: Job, config: Config, chip: Chip, lengths: Lengths) -> ProgramEstimate:
    """Compile a program of the run, and read its text."""
    work, use, plan = Work(config, lengths), PROGRAMS[job.name], compile_job(job)
    one = ProgramEstimate(plan, use.phase, use.calls(work))
    if plan.text is None:
        return one
    program = parse(plan.text)
    cost, usual = program_cost(program, chip), program_cost(program, chip, use.ends(work))
    return dataclasses.replace(one, cost=cost, usual=usual)


def step_cost(
    config: Config, devices: Sequence[jax.Device], chip: Chip, lengths: Lengths, programs: Sequence[ProgramEstimate]
) -> StepCost | None:
    """What a step costs, if all of its programs fit."""
    if any(one.usual is None for one in programs):
        return None
    mesh, phases, low, high = make_mesh(config.mesh, devices), dict.fromkeys(PHASES, 0.0), 0.0, 0.0
    for one in programs:
        if one.usual is not None:
            phases[one.phase] += one.calls * one.usual.seconds
            low += one.calls * one.usual.low
            high += one.calls * one.usual.high
    work = Work(config, lengths)
    return StepCost(
        seconds=sum(phases.values()),
        low=low,
        high=high,
        phases=phases,
        tokens=work.tokens,
        padding=work.padding,
        model_flops=train_flops(planned_policy(config, mesh)[1].shape, work),
        devices=len(devices),
        chip=chip,
    )
