"""Token statistics: the chunked form and the kernel against the definitions written down; errors against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from token_stats import naive, with_gradient

from dynamo_jax.kernels.token_stats import token_stats
from gpu_parts.common import PEAK, emit, gpu, measured

FORMS: dict[str, Callable[..., Any]] = {
    "naive": naive,
    "chunked": lambda *a: tuple(token_stats(*a, impl="chunked")),
    "pallas": lambda *a: tuple(token_stats(*a, impl="pallas")),
}
BLOCKS = [(256, 128), (128, 192), (128, 128)]  # of the kernel, beside its own (128, 256)
VALUES = ("logp", "entropy", "lambda_mean")
# Largest error of a value; of a gradient, in the norm. Gradients of bfloat16 are rounded to it. Not held to: naive.
BOUNDS = {"float32": (2e-5, 1e-5), "bfloat16": (2e-4, 6e-3)}
CHUNK = 256  # tokens of the float64 reference at a time


def main(small: bool) -> None:
    emit(device=gpu(small))
    errors(1024, 1536, 151936, jnp.bfloat16) if not small else errors(48, 32, 300, jnp.bfloat16)
    errors(512, 256, 32003, jnp.float32) if not small else errors(21, 16, 151, jnp.float32)
    D, V = (4096, 131072) if not small else (32, 300)
    for T in (8192, 2048, 32768) if not small else (48,):
        times(T, D, V, 5 if not small else 1)


def inputs(T: int, D: int, V: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Logits of standard deviation 3, the largest about 15. Weights of logp and entropy as a loss would have them."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, head = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, ((T, D), (V, D)), strict=False))
    targets = jax.random.randint(keys[2], (T,), 0, V, jnp.int32)
    weights = tuple(jax.random.normal(k, (T,), jnp.float32) for k in keys[3:])
    return (3 * D**-0.5 * hidden).astype(dtype), head.astype(dtype), targets, weights


def errors(T: int, D: int, V: int, dtype: Any) -> None:
    """A row a form: how far its values and gradients are from float64."""
    name, arguments = jnp.dtype(dtype).name, inputs(T, D, V, dtype)
    expected = in_float64(arguments)
    for form, f in FORMS.items():
        row: dict[str, Any] = {"form": form, "T": T, "D": D, "V": V, "dtype": name}
        try:
            values = jax.jit(f)(*arguments[:3])
            (_, again), gradients = jax.jit(with_gradient(f))(*arguments)
        except Exception as error:  # a kernel that the card refuses must not hide what the others do
            emit(**row, wrong=str(error)[:2000])
            continue
        found = {}
        for key, x, y, z in zip(VALUES, values, again, expected, strict=False):
            found[key] = max(float(np.abs(np.asarray(v, np.float64) - z).max()) for v in (x, y))
        for key, x, y in zip(("d_hidden", "d_head"), gradients, expected[3:], strict=True):
            found[key] = float(np.linalg.norm(np.asarray(x.astype(jnp.float32)) - y) / np.linalg.norm(y))
        row["errors"] = found
        above = [key for key, error in found.items() if not error <= BOUNDS[name][key not in VALUES]]
        emit(**row, **({"wrong": f"above their bounds: {above}"} if above and form != "naive" else {}))


def times(T: int, D: int, V: int, rounds: int) -> None:
    """A row a form and pass."""
    arguments = inputs(T, D, V, jnp.bfloat16)
    forms = {**FORMS}
    if T == 8192:
        forms |= {f"pallas {b}": partial(token_stats, impl="pallas", blocks=b) for b in BLOCKS}
    for form, f in forms.items():
        backward = [] if form.startswith("pallas (") else [("value and gradient", with_gradient(f), arguments, 4)]
        for which, g, given, products in [("forward", f, arguments[:3], 1), *backward]:
            row: dict[str, Any] = {"form": form, "pass": which, "T": T, "D": D, "V": V, "dtype": "bfloat16"}
            try:
                row |= measured(jax.jit(g).lower(*given).compile(), given, rounds)
            except Exception as error:  # the naive form's memory; blocks that the card refuses
                ours = form in FORMS and form != "naive"
                emit(**row, **{"wrong" if ours else "failed": str(error)[:300]})
                continue
            emit(**row, of_peak=2.0 * products * T * D * V / row["seconds"] / PEAK)


def in_float64(arguments: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """logp, entropy, lambda_mean, d_hidden, d_head."""
    jax.config.update("jax_enable_x64", True)
    try:
        hidden, head, targets, weights = jax.device_put(jax.device_get(arguments))
        head = head.astype(jnp.float64)

        @jax.jit
        def some(hidden_tD: Any, head: Any, targets_t: Any, weights_t: Any, d_head_VD: Any) -> Any:
            hidden_tD = hidden_tD.astype(jnp.float64)
            z = hidden_tD @ head.T
            logp = jax.nn.log_softmax(z, axis=-1)
            p, at = jnp.exp(logp), jnp.arange(len(targets_t))
            entropy = -jnp.sum(p * logp, axis=-1)
            surprise = logp + entropy[:, None]
            dz = -p * (weights_t[0][:, None] + weights_t[1][:, None] * surprise)
            dz = dz.at[at, targets_t].add(weights_t[0])
            values = logp[at, targets_t], entropy, jnp.sum(p * p * surprise, axis=-1)
            return (*values, dz @ head), d_head_VD + dz.T @ hidden_tD

        d_head, parts = jnp.zeros(head.shape, jnp.float64), []
        for first in range(0, len(targets), CHUNK):
            rows = slice(first, first + CHUNK)
            part, d_head = some(hidden[rows], head, targets[rows], tuple(w[rows] for w in weights), d_head)
            parts.append(jax.device_get(part))
        return (*(np.concatenate(x) for x in zip(*parts, strict=True)), np.asarray(d_head))
    finally:
        jax.config.update("jax_enable_x64", False)
