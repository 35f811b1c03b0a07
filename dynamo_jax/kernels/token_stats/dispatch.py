"""Which forward pass runs where."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from dynamo_jax.kernels.token_stats import chunked, pallas_tpu
from dynamo_jax.kernels.token_stats.sums import Sums

HOPPER = "9.0"  # compute capability; wgmma is in no other


def forward(
    impl: str,
    mesh: Mesh | None,
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    live: jax.Array | None,
    temperature: float,
    blocks: chunked.Blocks | None,
) -> Sums:
    """The sums over the columns of `head_VD`, from `chunked.forward` or a kernel.

    `pallas_tpu` names its kernel wherever it runs; where it cannot, it is interpreted. `pallas_gpu` needs Hopper.
    """
    sizes = {} if blocks is None else blocks._asdict()
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    tpu_blocks = pallas_tpu.BLOCKS.get(str(device.device_kind), pallas_tpu.SMALLEST)._replace(**sizes)
    tpu_blocks = pallas_tpu.fitted(
        tpu_blocks, hidden_TD.shape[1], max(hidden_TD.dtype.itemsize, head_VD.dtype.itemsize)
    )
    in_chunks = partial(chunked.forward, temperature=temperature, blocks=blocks)
    on_tpu = partial(pallas_tpu.forward, temperature=temperature, blocks=tpu_blocks)
    if impl == "pallas":
        impl = kernel_of(device, jnp.promote_types(hidden_TD.dtype, head_VD.dtype))

    arrays = (hidden_TD, head_VD, targets_T, live)
    sums: Sums
    match impl:
        case "chunked":
            sums = in_chunks(*arrays)
        case "pallas_tpu":
            sums = on_tpu(*arrays)
        case "pallas_gpu":
            # Here, for jax calls its Mosaic GPU unstable: the release that breaks it must break this kernel only.
            from dynamo_jax.kernels.token_stats import pallas_gpu

            sums = pallas_gpu.forward(*arrays, temperature, pallas_gpu.BLOCKS._replace(**sizes))
        case _:  # auto. The GPU kernel has not been measured yet.
            sums = lax.platform_dependent(*arrays, tpu=on_tpu, default=in_chunks)
    return sums


def kernel_of(device: Any, dtype: Any) -> str:
    """The kernel for a device, or `chunked` where there is none: GPUs other than Hopper, and float32 on those."""
    if device.platform != "gpu":
        return "pallas_tpu"
    return "pallas_gpu" if device.compute_capability == HOPPER and dtype == jnp.bfloat16 else "chunked"
