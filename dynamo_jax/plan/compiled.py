"""What the TPU's compiler says of a program: whether it fits, and its text, from which follows how long it takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from dynamo_jax.plan.chips import GIB
from dynamo_jax.plan.jobs import Job

# Devices of whose programs jax can give the text. Those with SparseCores have instructions of more operands than
# jaxlib's reader allows ("async-update instruction should have 1 operands but sees 4", jaxlib 0.10.2, libtpu 0.0.52).
READABLE = ("cpu", "TPU v4", "TPU v5 lite")

REMEDIES = {
    "sample": "lower rollout.batch or rollout.max_tokens, or take a larger mesh",
    "sample (eval)": "lower rollout.batch or rollout.max_tokens, or take a larger mesh",
    "score": "lower trainer.micro_batch, or take a larger mesh",
    "score (reference)": "lower trainer.micro_batch, or take a larger mesh",
    "update": "lower trainer.micro_batch, set policy.remat=full, or take a larger mesh",
}


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What the compiler says of one program, per device. Bytes; `None` where it says nothing."""

    name: str
    resident: int  # of the run, on the device meanwhile, but no argument of this program
    seconds: float  # of compilation
    arguments: int | None = None
    outputs: int | None = None  # beyond those that take over the memory of a donated argument
    temporaries: int | None = None
    text: str | None = None  # of the compiled program
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
            return f"does not fit beside the {self.resident / GIB:.3f} GiB that the run keeps. Remedy: {remedy}."
        return "fits"


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


def compile_job(job: Job) -> ProgramPlan:
    """What the compiler says of a program: seconds to minutes later, and with gigabytes of the host's memory."""
    resident, began = sum(device_bytes(x) for x in jax.tree.leaves(job.resident)), time.perf_counter()
    try:
        compiled, text = _compiled(job)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return ProgramPlan(job.name, resident, time.perf_counter() - began, error=_one_line(str(error)))
    seconds, m = time.perf_counter() - began, compiled.memory_analysis()
    return ProgramPlan(
        job.name,
        resident,
        seconds,
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes - m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        text=text,
    )


def _compiled(job: Job) -> tuple[Any, str]:
    """The program and its text: from jax, or where it cannot read what the compiler made, as the compiler writes it."""
    lowered = job.function.lower(*job.arguments)
    if _kind(job) in READABLE:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = Path(folder).glob("*.after_codegen.txt")
        return compiled, written.read_text(encoding="utf-8")


def _kind(job: Job) -> str:
    """Of the devices that the program is for; of this machine's if its arguments name none."""
    shardings = [x.sharding for x in jax.tree.leaves(job.arguments) if getattr(x, "sharding", None) is not None]
    devices = shardings[0].device_set if shardings else jax.devices()
    return str(next(iter(devices)).device_kind)


def device_bytes(x: Any) -> int:
    """Of an abstract array, on each device."""
    shard: tuple[int, ...] = x.sharding.shard_shape(x.shape)
    return math.prod(shard) * int(x.dtype.itemsize)


def _one_line(message: str) -> str:
    """`RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory ...` without codes, module name and links."""
    text = re.sub(r"^(\w+: )*", "", message.splitlines()[0])
    return re.sub(r"\s*HLO module: \S+$", "", text)
