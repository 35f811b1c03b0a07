"""What moments in bfloat16 and parameters without masters cost.

    python benchmarks/optimizer_dtypes.py [--steps 2000] [--seeds 5]

Each row is a kind of optimizer. `loss`: nats, of a small network on a fifth of all triples (a, b, c) below 17 that it
has not seen, after it has learned (a + 2 b + 3 c) // 6 from the others; all kinds start from the same numbers and see
the same batches, and compute in float32. `drift`: 1,000 updates of 1e-6 in one direction on weights of 0.02, mean and
standard deviation over the weights of the way that they have gone, by that of float32 (1e-3).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.update import apply_gradients, init_state, make_optimizer

V, WIDTH, BATCH = 17, 32, 128
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # parameters' dtype, and the optimizer's settings
    "float32": ("float32", {}),
    "float32, moments bfloat16": ("float32", {"moments": "bfloat16"}),
    "bfloat16 with masters": ("bfloat16", {}),
    "bfloat16 stochastic": ("bfloat16", {"rounding": "stochastic"}),
    "bfloat16 stochastic, moments bfloat16": ("bfloat16", {"rounding": "stochastic", "moments": "bfloat16"}),
}


def examples() -> tuple[np.ndarray, np.ndarray]:
    """All triples of numbers below V, shuffled, and what is to be learned of each: (a + 2 b + 3 c) // 6."""
    triples = np.stack(np.meshgrid(*[np.arange(V)] * 3), axis=-1).reshape(-1, 3)
    np.random.default_rng(0).shuffle(triples)
    return triples, triples @ np.array([1, 2, 3]) // 6


def final_loss(dtype: str, settings: dict[str, Any], steps: int, seed: int) -> float:
    config = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=steps // 20, schedule="cosine", decay_steps=steps, weight_decay=0.1, **settings
    )
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(seed)
    sizes = {"embedding": (V, WIDTH), "up": (3 * WIDTH, 8 * WIDTH), "down": (8 * WIDTH, WIDTH), "lm_head": (V, WIDTH)}
    params = {name: jnp.asarray(rng.normal(0, size[-1] ** -0.5, size), dtype) for name, size in sizes.items()}

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        hidden = jax.nn.silu(p["embedding"][x].reshape(len(x), -1) @ p["up"]) @ p["down"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden @ p["lm_head"].T), y[:, None], axis=1))

    @jax.jit
    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss)(state.params, x, y)
        return apply_gradients(state, grads, optimizer, config.rounding)._replace(updates=state.updates + 1)

    (x, y), state = examples(), init_state(params, optimizer, config.rounding)
    held_out = len(x) // 5
    for _ in range(steps):
        rows = rng.integers(held_out, len(x), BATCH)
        state = step(state, x[rows], y[rows])
    return float(jax.jit(loss)(state.params, x[:held_out], y[:held_out]))


def drift(dtype: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation over weights of the way gone, by that of float32."""
    config = OptimizerConfig(learning_rate=1e-6, **settings)
    optimizer = make_optimizer(config)
    start = {"q": jnp.full(100_000, 0.02, dtype)}
    grads = {"q": jnp.full(100_000, -0.01)}

    @jax.jit
    def run(state: Any) -> Any:
        def one(_: int, s: Any) -> Any:
            return apply_gradients(s, grads, optimizer, config.rounding)._replace(updates=s.updates + 1)

        return jax.lax.fori_loop(0, 1000, one, state)

    gone = np.asarray(run(init_state(start, optimizer, config.rounding)).params["q"], np.float64)
    gone = (gone - np.asarray(start["q"], np.float64)) / 1e-3
    return float(gone.mean()), float(gone.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    for name, (dtype, settings) in KINDS.items():
        losses = [final_loss(dtype, settings, arguments.steps, seed) for seed in range(arguments.seeds)]
        mean, spread = drift(dtype, settings)
        row = {"kind": name, "loss": losses, "mean": float(np.mean(losses)), "drift_mean": mean, "drift_std": spread}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
