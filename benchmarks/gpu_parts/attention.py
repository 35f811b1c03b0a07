"""Attention within the segments of packed rows: the door's kernel, plain XLA, and cuDNN without segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.config import MeshConfig
from dynamo_jax.kernels.attention import segment_attention
from dynamo_jax.sharding import make_mesh
from gpu_parts.common import PEAK, emit, gpu, measured

BOUND = 2e-2  # largest error of a value or of a gradient, as a share of the largest value: bfloat16 has 8 bits


def main(small: bool) -> None:
    emit(device=gpu(small))
    G, S, A, K, H = (4, 4096, 12, 2, 128) if not small else (2, 64, 4, 2, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (
        jax.random.normal(key, (G, S, heads, H), jnp.bfloat16) for key, heads in zip(keys, (A, K, K, A), strict=True)
    )
    segments = jnp.asarray(np.arange(S) * 4 // S + np.zeros((G, 1), int), jnp.int32)  # four a row
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    forms: dict[str, Callable[..., Any]] = {
        "plain XLA": lambda q, k, v: segment_attention(q, k, v, segments),
        "ours": lambda q, k, v: segment_attention(q, k, v, segments, mesh=mesh),
    }
    if not small:
        forms["cuDNN, one segment a row"] = lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )

    def with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any) -> Any:
            out, pull = jax.vjp(f, q, k, v)
            return (out, *pull(w))

        return run

    exact = None
    for form, f in forms.items():
        row: dict[str, Any] = {"form": form, "G": G, "S": S, "A": A, "K": K, "H": H}
        products = 2.0 * G * A * S * (S if form.startswith("cuDNN") else S / 4) * H  # q k^T and p v, causal: half
        for which, g, times in (("forward", f, 1.0), ("value and gradient", with_gradient(f), 3.5)):
            try:
                compiled = jax.jit(g).lower(q, k, v).compile()
                row |= {"pass": which, **measured(compiled, (q, k, v), 10 if not small else 1)}
            except Exception as error:  # what the card or its cuDNN refuses
                emit(**row, **{"pass": which}, **{"wrong" if form == "ours" else "failed": str(error)[:2000]})
                continue
            row["of_peak"] = times * products / row["seconds"] / PEAK
            if which == "forward":
                emit(**row)
                continue
            found = [np.asarray(x, np.float32) for x in compiled(q, k, v)]
            if exact is None:  # the first form, in float32
                exact = [np.asarray(x) for x in jax.jit(with_float32(f, w))(q, k, v)]
            apart = [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(found, exact, strict=True)]
            named = dict(zip(("out", "dq", "dk", "dv"), apart, strict=True))
            bad = form == "ours" and not max(apart) <= BOUND
            errors = {} if form.startswith("cuDNN") else {"errors": named}
            emit(**row, **errors, **({"wrong": f"above {BOUND}"} if bad else {}))


def with_float32(f: Callable[..., Any], w: Any) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(f, *(x.astype(jnp.float32) for x in arrays))
        return (out, *pull(w.astype(jnp.float32)))

    return run
