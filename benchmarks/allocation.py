"""How long `allocate` takes against the rule of the authors' released code, for the same prompts and budget.

    python benchmarks/allocation.py [--prompts 512 8192 1000000] [--seconds 2]

Needs 2 CPU cores and about 20 seconds. `allocate` is jitted and compiled beforehand. `released_allocate` is this
project's numpy version of the released rule: it deals out remainders in one operation where the authors' code loops
over prompts in Python, so that it is faster than theirs. The two are timed in turn, ten times in a row, and medians and
their ratio printed. 16 rollouts a prompt, between 8 and 24; success counts are random, of up to 64 rollouts a prompt,
a few prompts not tried yet. On a busy machine XLA's threads wait for each other between operations of a microsecond:
PJRT_NPROC=1 in the environment measures with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dynamo_jax.allocation import allocate, posterior_variance, released_allocate, released_priority  # noqa: E402

MEAN, LOW, HIGH = 16, 8, 24
INITIAL = 4
IN_A_ROW = 10
GOALS = {512: 1.0, 8192: 0.2, 1_000_000: 0.3}  # largest ratio asked for


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the exact allocation against the released rule.")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each row is repeated")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, numpy {np.__version__}; {MEAN} rollouts a prompt")
    print(f"{'prompts':>9s}{'repeats':>9s}{'allocate':>12s}{'released':>12s}{'ratio':>8s}{'goal':>8s}")
    for P in arguments.prompts:
        row(P, arguments.seconds)
    return 0


def row(P: int, seconds: float) -> None:
    rng = np.random.default_rng(0)
    trials_P = rng.integers(0, 65, P)
    successes_P = rng.binomial(trials_P, rng.beta(0.5, 0.5, P))
    sigma_P = jax.block_until_ready(posterior_variance(successes_P.astype(np.float32), trials_P.astype(np.float32)))
    priority_P = released_priority(successes_P, trials_P)

    exact = jax.jit(partial(allocate, budget=MEAN * P, low=LOW, high=HIGH))
    released = partial(released_allocate, trials_P, priority_P, MEAN * P, LOW, HIGH, INITIAL)
    ours, _ = timed(lambda: jax.block_until_ready(exact(sigma_P)))  # compiles
    ours, counts_P = timed(lambda: jax.block_until_ready(exact(sigma_P)))
    theirs, released_P = timed(released)
    assert int(np.sum(counts_P)) == int(released_P.sum()) == MEAN * P

    times: list[tuple[list[float], list[float]]] = []
    rounds = max(1, int(seconds / (IN_A_ROW * (ours + theirs))))
    for _ in range(rounds):  # the machine may be slower for a while: both then are
        one = [timed(lambda: jax.block_until_ready(exact(sigma_P)))[0] for _ in range(IN_A_ROW)]
        times.append((one, [timed(released)[0] for _ in range(IN_A_ROW)]))
    ours, theirs = (statistics.median(chain.from_iterable(column)) for column in zip(*times, strict=True))
    goal = f"{GOALS[P]:8.2f}" if P in GOALS else ""
    print(f"{P:9d}{rounds * IN_A_ROW:9d}{ours * 1e3:9.3f} ms{theirs * 1e3:9.3f} ms{ours / theirs:8.3f}{goal}")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    sys.exit(main())
