"""What a run takes on a TPU slice, said before there is one: memory, time and cost, by the compiler of its machines."""

from dynamo_jax.plan.chips import CHIPS, GIB, Chip
from dynamo_jax.plan.command import plan_command
from dynamo_jax.plan.compiled import ProgramPlan, compile_job, topology_devices
from dynamo_jax.plan.cost import Cost, program_cost
from dynamo_jax.plan.hlo import parse
from dynamo_jax.plan.jobs import Job, jobs, run_jobs
from dynamo_jax.plan.lengths import Lengths, read_lengths

__all__ = [
    "CHIPS",
    "GIB",
    "Chip",
    "Cost",
    "Job",
    "Lengths",
    "ProgramPlan",
    "compile_job",
    "jobs",
    "parse",
    "plan_command",
    "program_cost",
    "read_lengths",
    "run_jobs",
    "topology_devices",
]
