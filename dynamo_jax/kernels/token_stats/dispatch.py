"""Which forward pass runs where."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from dynamo_jax.kernels.token_stats import chunked, pallas_tpu
from dynamo_jax.kernels.token_stats.sums import Sums


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
    """The sums over the columns of `head_VD`, from `chunked.forward` or the kernel of the platform.

    `pallas_tpu` and `pallas_gpu` name a kernel wherever it runs; where it cannot, it is interpreted.
    """
    sizes = {} if blocks is None else blocks._asdict()
    tpu_blocks = pallas_tpu.BLOCKS.get(device_kind(mesh), pallas_tpu.SMALLEST)._replace(**sizes)
    tpu_blocks = pallas_tpu.fitted(
        tpu_blocks, hidden_TD.shape[1], max(hidden_TD.dtype.itemsize, head_VD.dtype.itemsize)
    )
    in_chunks = partial(chunked.forward, temperature=temperature, blocks=blocks)
    on_tpu = partial(pallas_tpu.forward, temperature=temperature, blocks=tpu_blocks)

    def on_gpu(*arrays: Any) -> Sums:
        # Here, for jax has deprecated its Triton: the release that drops it must break this kernel and nothing else.
        from dynamo_jax.kernels.token_stats import pallas_gpu

        blocks = pallas_gpu.BLOCKS._replace(**sizes)
        sums: Sums = partial(pallas_gpu.forward, temperature=temperature, blocks=blocks)(*arrays)
        return sums

    arrays = (hidden_TD, head_VD, targets_T, live)
    sums: Sums
    match impl:
        case "chunked":
            sums = in_chunks(*arrays)
        case "pallas_tpu":
            sums = on_tpu(*arrays)
        case "pallas_gpu":
            sums = on_gpu(*arrays)
        case "pallas":
            sums = lax.platform_dependent(*arrays, cuda=on_gpu, default=on_tpu)
        case _:  # auto. The GPU kernel has not been measured yet.
            sums = lax.platform_dependent(*arrays, tpu=on_tpu, default=in_chunks)
    return sums


def device_kind(mesh: Mesh | None) -> str:
    """Of the devices that the program is for: a mesh may be of a machine that is not this one."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return str(device.device_kind)
