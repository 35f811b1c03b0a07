"""Which processes make up a run, read from the environment that started them."""

from __future__ import annotations

import glob
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PORT = 8476  # of process 0, where the environment names its host only
HEARTBEAT_SECONDS = 50  # jax's own notice of a lost process; `peers.py` is sooner and knows its name
SHUTDOWN_SECONDS = 60  # a process that ends waits so long for the others


class Cluster(NamedTuple):
    """The processes of a run and this one's place among them."""

    source: str  # what told so, for messages
    coordinator: str  # host:port of process 0
    processes: int
    process: int  # this one's number, from 0
    local_devices: tuple[int, ...] | None = None  # the accelerators of this machine that are ours; None: all


def cluster_of(environ: Mapping[str, str]) -> Cluster | None:
    """The processes that `environ` tells of; None where it tells of no other than this one.

    Known are plain variables (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), Google Batch, and
    SLURM's `srun`, in this order. TPU slices are left to jax, which asks their metadata server (`tpu_is_here`).

    Raises `ValueError` naming the variable that is missing or makes no sense, and the remedy.
    """
    for source in (_plain, _batch, _slurm):
        cluster = source(environ)
        if cluster is not None:
            if not 0 <= cluster.process < cluster.processes:
                raise ValueError(
                    f"{cluster.source}: process {cluster.process} of {cluster.processes}: the index must be in "
                    f"0 .. {cluster.processes - 1}. Give every process its own."
                )
            return cluster if cluster.processes > 1 else None
    return None


def tpu_is_here(environ: Mapping[str, str]) -> bool:
    """Whether this machine is a host of a TPU slice, so that jax can find the others."""
    if environ.get("TPU_WORKER_HOSTNAMES", "localhost") != "localhost":
        return True
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")) and _has_tpu_on_pci()


def _has_tpu_on_pci() -> bool:
    """Files under /dev/vfio may belong to any device; Google's PCI vendor id is 0x1ae0."""
    return any(Path(path).read_text().strip() == "0x1ae0" for path in glob.glob("/sys/bus/pci/devices/*/vendor"))


def _plain(environ: Mapping[str, str]) -> Cluster | None:
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return None
    processes, index = (_number(environ, f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address}: is not host:port of process 0. Give both.")
    return Cluster("JAX_COORDINATOR_ADDRESS", address, processes, index)


def _batch(environ: Mapping[str, str]) -> Cluster | None:
    """Google Batch, with one task on each of several machines."""
    if "BATCH_TASK_INDEX" not in environ:
        return None
    if environ.get("BATCH_NODE_COUNT") and environ.get("BATCH_MAIN_NODE_HOSTNAME"):
        count, process = (_number(environ, f"BATCH_NODE_{name}") for name in ("COUNT", "INDEX"))
        return Cluster("BATCH_NODE_INDEX", f"{environ['BATCH_MAIN_NODE_HOSTNAME']}:{PORT}", count, process)
    if environ.get("BATCH_TASK_COUNT", "1") == "1":
        return None
    file = environ.get("BATCH_HOSTS_FILE")
    hosts = Path(file).read_text().split() if file and Path(file).is_file() else []
    if not hosts:
        raise ValueError(
            f"BATCH_TASK_COUNT = {environ['BATCH_TASK_COUNT']}, but BATCH_HOSTS_FILE = {file} names no hosts. Set "
            "taskCountPerNode: 1 and requireHostsFile: true in the job, and mount that file in the container."
        )
    count, process = (_number(environ, f"BATCH_TASK_{name}") for name in ("COUNT", "INDEX"))
    return Cluster("BATCH_TASK_INDEX", f"{hosts[0]}:{PORT}", count, process)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Set by `srun` for each of a step's tasks; a shell of `salloc` or a batch script has no step and runs alone."""
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= environ.keys():
        return None
    # node7 | node7,other | node[7-9,12],other: the first host runs process 0.
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environ["SLURM_STEP_NODELIST"])
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {environ['SLURM_STEP_NODELIST']}: names no host.")
    host = match[1] + (match[2] or "")
    # Jobs that share a machine must not share a port.
    port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
    return Cluster(
        "SLURM_PROCID",
        f"{host}:{port}",
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        _number(environ, "SLURM_PROCID"),
        _slurm_devices(environ),
    )


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """With several tasks on a machine, each takes the accelerator of its number, unless SLURM shows it one only."""
    alone = re.match(r"1(\(|,|$)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    if alone or (shown and "," not in shown):
        return None
    return (_number(environ, "SLURM_LOCALID"),)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"the environment variable {name} = {text!r}: should be a whole number. Set it.")
    return int(text)


def host_name(environ: Mapping[str, str]) -> str:
    """What this machine is called in messages."""
    return environ.get("DYNAMO_JAX_HOST_NAME") or socket.gethostname()
