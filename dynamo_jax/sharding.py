"""Mesh, the one table of sharding rules, distributed start-up, and moving arrays between host and mesh."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynamo_jax.config import MeshConfig

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

    On CPU, a mesh of several devices gets as many virtual ones. Several processes start when the environment names a
    coordinator (`JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`).

    Raises `ValueError` where the machine has no device of the asked kind.
    """
    os.environ.setdefault("PJRT_NPROC", CPU_THREADS)
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        processes, process = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(num_processes=processes, process_id=process)
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", mesh.size)  # no effect on other platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # without its CUDA plugin jax fails an assertion of its own
        reason = (str(error).splitlines() or ["its plugin is not installed"])[0]
        raise ValueError(
            f"device = {device}: jax finds no such device here ({reason}). Install the matching extra "
            "(dynamo_jax[tpu] or dynamo_jax[cuda]), or set device=auto or device=cpu."
        ) from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor. Raises `ValueError` if there are fewer devices than it needs."""
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < config.size:
        raise ValueError(
            f"mesh = data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} needs {config.size} devices, "
            f"but there are {len(devices)} ({devices[0].device_kind}). Set a smaller mesh.data, mesh.fsdp or "
            "mesh.tensor."
        )
    if len(devices) > config.size:
        log.warning("The mesh uses %d of %d devices; the others stay idle.", config.size, len(devices))
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
    return multihost_utils.process_allgather(tree, tiled=True)


def agreed(flag: int) -> int:
    """The largest `flag` of all processes: what one was told, all know. Every process must call it."""
    return flag if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(flag))))
