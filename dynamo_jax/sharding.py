"""Mesh, the one table of sharding rules, distributed start-up, and moving arrays between host and mesh."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynamo_jax.config import MeshConfig
from dynamo_jax.hosts.cluster import HEARTBEAT_SECONDS, SHUTDOWN_SECONDS, Cluster, cluster_of, tpu_is_here
from dynamo_jax.hosts.progress import PROGRESS

log = logging.getLogger("dynamo_jax")

# XLA's CPU programs split sums over their threads, as many as there are cores or virtual devices: one number for all
# machines and meshes makes their last bits, and with them a hundred optimizer steps, equal.
CPU_THREADS = "8"

# Logical axis of an array -> mesh axes that it is split over. Every sharding in the package is looked up here.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    None: None,
}


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes; missing trailing ones are not split."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def start_devices(device: str, mesh: MeshConfig) -> None:
    """Choose the platform and join the other processes, before anything else touches a device.

    On CPU, a mesh of several devices gets as many virtual ones, shared equally by the processes. The processes are
    those that the environment tells of (`cluster_of`), or on a TPU slice its metadata.

    Raises `ValueError` where the environment makes no sense or the machine has no device of the asked kind.
    """
    os.environ.setdefault("PJRT_NPROC", CPU_THREADS)
    platforms = _platforms(device)
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)
    cluster = cluster_of(os.environ)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", _cpu_devices(mesh, cluster))  # no effect on other platforms
    if not jax.distributed.is_initialized():
        _join(device, cluster)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # without its CUDA plugin jax fails an assertion of its own
        reason = (str(error).splitlines() or ["its plugin is not installed"])[0]
        raise ValueError(
            f"device = {device}: jax finds no such device here ({reason}). Install the matching extra "
            "(dynamo_jax[tpu] or dynamo_jax[cuda]), or set device=auto or device=cpu."
        ) from None


def _platforms(device: str) -> str | None:
    """Where jax shall look for devices; None: wherever it does by itself.

    Which is in libtpu, too, if that is installed, as `dynamo-jax plan` needs it. Without a TPU it takes seconds to say
    so, in lines that look like errors.
    """
    if device != "auto":
        return {"gpu": "cuda"}.get(device, device)
    # jax has set it if JAX_PLATFORMS is set, and on import if it has seen a TPU.
    if jax.config.values["jax_platforms"] or tpu_is_here(os.environ) or importlib.util.find_spec("libtpu") is None:
        return None
    plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")]
    if not all("cuda" in name for name in plugins):
        return None
    return "cuda,cpu" if plugins else "cpu"  # jax passes over cuda where there is no GPU


def _cpu_devices(mesh: MeshConfig, cluster: Cluster | None) -> int:
    """Virtual devices of one process: the mesh's, shared equally, and one if there are more processes than devices."""
    return max(1, mesh.size // cluster.processes) if cluster else mesh.size


def _join(device: str, cluster: Cluster | None) -> None:
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    if cluster is not None:
        initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",  # jax's own reading of SLURM shows each process one device only
        )
    elif device in ("auto", "tpu") and tpu_is_here(os.environ):
        initialize()
    else:
        return
    if threading.current_thread() is threading.main_thread():
        # jax has taken SIGTERM over and would do nothing about it until training has its own handler.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor.

    Raises `ValueError` if there are fewer devices than it needs, or a process would have none of its devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < config.size:
        raise ValueError(
            f"mesh = data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} needs {config.size} devices, "
            f"but there are {len(devices)} ({devices[0].device_kind}). Set a smaller mesh.data, mesh.fsdp or "
            "mesh.tensor."
        )
    if len(devices) > config.size:
        log.warning("The mesh uses %d of %d devices; the others stay idle.", config.size, len(devices))
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[: config.size]}
    if idle:
        raise ValueError(
            f"mesh = data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} takes {config.size} of the "
            f"{len(devices)} devices and leaves process {min(idle)} with none. Set a mesh of {len(devices)} devices, "
            "or start fewer processes."
        )
    grid = np.asarray(devices[: config.size]).reshape(config.data, config.fsdp, config.tensor)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def to_mesh(tree: Any, target: Any) -> Any:
    """Host arrays, equal on every process, as global arrays. `target`: one sharding, or a tree of them."""
    if isinstance(target, NamedSharding):
        target = jax.tree.map(lambda _: target, tree)

    def put(x: Any, where: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(put, tree, target)


def to_host(tree: Any) -> Any:
    """Global arrays as numpy arrays, whole on every process, in one transfer."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    with PROGRESS.meeting():
        return multihost_utils.process_allgather(tree, tiled=True)


def agreed(flag: int) -> int:
    """The largest `flag` of all processes: what one was told, all know. Every process must call it."""
    return flag if jax.process_count() == 1 else int(_gathered(np.int32(flag)).max())


def total(x: np.ndarray) -> np.ndarray:
    """The sum of all processes' arrays `x`, of equal shapes, on each. Every process must call it."""
    return x if jax.process_count() == 1 else _gathered(x).sum(axis=0, dtype=x.dtype)


def _gathered(x: Any) -> np.ndarray:
    with PROGRESS.meeting():
        return np.asarray(multihost_utils.process_allgather(x))


def of_process_0(tree: Any) -> Any:
    """Process 0's host arrays on every process, which must all call it with arrays of the same shapes."""
    if jax.process_count() == 1:
        return tree
    with PROGRESS.meeting():
        return jax.device_get(multihost_utils.broadcast_one_to_all(tree))


def own_share(size: int) -> slice:
    """This process's part of `size` rows: those that its devices hold, where the mesh splits rows in process order."""
    index, count = jax.process_index(), jax.process_count()
    return slice(index * size // count, (index + 1) * size // count)
