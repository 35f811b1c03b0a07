"""The kernel of the token statistics, compiled for an H100 that need not be there: registers, instructions, memory.

    pip install "jax[cuda13]" nvidia-cuda-nvcc nvidia-cuda-nvdisasm    # in an environment of its own; jax 0.12
    python benchmarks/gpu_compile.py                                   # half a minute, no GPU

A column more than ptxas and XLA say: the instructions that a thread spends on the sums of one logit, from the machine
code between the last product of a block and the next block.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

FOLDER = tempfile.TemporaryDirectory(prefix="gpu_compile_")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_SASS": "1",
    "MOSAIC_GPU_DUMP_TO": FOLDER.name,
    # ptxas and nvdisasm from their wheels.
    "PATH": os.pathsep.join([f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin", os.environ["PATH"]]),
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from dynamo_jax.kernels.token_stats.pallas_gpu import BLOCKS, GpuBlocks, forward  # noqa: E402

# NVIDIA's figures for an H100 SXM, as XLA's GpuTargetConfigProto names them.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CASES = [
    *[(T, 1536, 151936, BLOCKS) for T in (2048, 8192)],
    (8192, 4096, 131072, BLOCKS),
    *[(8192, 1536, 151936, GpuBlocks(*blocks)) for blocks in ((256, 128, 4), (128, 192, 4), (128, 128, 6))],
]


def newest(ending: str) -> str:
    """What was written last of that kind; empty where there is none, for want of the tool."""
    files = sorted(glob.glob(f"{FOLDER.name}/*{ending}"), key=os.path.getmtime)
    return Path(files[-1]).read_text() if files else ""


def instructions(machine_code: str) -> int | None:
    """Of a thread for the sums of a block, the mask of the last block left out."""
    lines = [line for line in machine_code.splitlines() if re.search(r"/\*[0-9a-f]{4,5}\*/|^\s*\.L_x_\d+:", line)]
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line]
    if not waits:
        return None
    jumps = [i for i in range(waits[-1], len(lines)) if " BRA " in lines[i]]
    label = re.search(r"\.L_x_\d+", lines[jumps[0]])
    assert label is not None
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{label[0]}:"))
    end = next(i for i in jumps if i > start)
    return end - start


def main() -> None:
    device: Any = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]
    here = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    print(f"{device.device_kind}, jax {jax.__version__}")
    for T, D, V, blocks in CASES:
        hidden, head = (jax.ShapeDtypeStruct((n, D), jnp.bfloat16, sharding=here) for n in (T, V))
        targets = jax.ShapeDtypeStruct((T,), jnp.int32, sharding=here)
        f = jax.jit(lambda *arrays, blocks=blocks: forward(*arrays, None, 1.0, blocks))
        compiled = f.trace(hidden, head, targets).lower(lowering_platforms=("cuda",)).compile()
        (spilled,) = re.findall(r"(\d+) bytes spill stores", newest(".ptxas"))[:1] or ["?"]
        took = instructions(newest(".sass_ctrl"))
        logits = blocks.tokens // 2 * blocks.vocab / 128  # of a thread
        print(
            f"T {T:5d} D {D} V {V} blocks {blocks.tokens} x {blocks.vocab} x {blocks.stages}: "
            f"{spilled} bytes spilled, {took / logits if took else float('nan'):.1f} instructions a logit, "
            f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB beside arguments and results",
            flush=True,
        )


if __name__ == "__main__":
    main()
