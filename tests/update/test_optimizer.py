"""Schedules of the rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.config import OptimizerConfig
from dynamo_jax.update import learning_rate_schedule, make_optimizer


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [{"updates": 24}, {"updates": 99, "decay_steps": 24}])
def test_falling_rates_by_hand(schedule: str, steps: dict[str, int]) -> None:
    """Up over 4 updates to 0.4, down to a quarter of it at update 24, and no further."""
    updates, rest = steps["updates"], {k: v for k, v in steps.items() if k != "updates"}
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4, schedule=schedule, floor=0.25, **rest)
    rate = learning_rate_schedule(config, updates)
    x = np.clip((np.arange(30) - 4) / 20, 0, 1)
    share = 1 - 0.75 * x if schedule == "linear" else 0.25 + 0.75 * (1 + np.cos(math.pi * x)) / 2
    expected = 0.4 * share * np.minimum(1, (np.arange(30) + 1) / 4)
    np.testing.assert_allclose([rate(u) for u in range(30)], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(14)), expected[14], rtol=1e-6)
    assert float(rate(24)) == float(rate(1000)) == pytest.approx(0.1)


def test_a_rate_that_falls_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule = cosine and optimizer.decay_steps = null; set decay_steps, or"):
        make_optimizer(OptimizerConfig(schedule="cosine"))
    make_optimizer(OptimizerConfig(schedule="cosine", decay_steps=5))
