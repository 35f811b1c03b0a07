"""The clip of the probability ratio: what it stops, and what it is refused for. Ratios: see test_policy_loss*.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.objective import Clip


def test_what_each_clip_stops():
    """A token on the bound itself has its gradient; one of no advantage has none to lose."""
    ratio = jnp.array([0.5, 0.75, 1.0, 1.5, 1.75, 5.0])
    up, down, none = (jnp.full((6,), a) for a in (2.0, -2.0, 0.0))
    clip = Clip(0.25, 0.5, 3.0)
    np.testing.assert_array_equal(clip.of(ratio), [0.75, 0.75, 1.0, 1.5, 1.5, 1.5])
    np.testing.assert_array_equal(clip.stops(ratio, up), [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(clip.stops(ratio, down), [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(clip.dual_stops(ratio, down), [0, 0, 0, 0, 0, 1])
    for stopped in (
        clip.stops(ratio, none), clip.dual_stops(ratio, up), clip.dual_stops(ratio, none),
        Clip(None, None).stops(ratio, down), Clip(0.2, 0.2).dual_stops(ratio, down),
    ):  # fmt: skip
        np.testing.assert_array_equal(stopped, np.zeros(6))
    np.testing.assert_array_equal(Clip(None, None, 3.0).of(ratio), ratio)


def test_a_clip_is_no_array():
    """It may be handed through `jax.jit` as it is: another one is another program."""
    run = jax.jit(lambda clip, ratio: clip.of(ratio))
    assert run(Clip(0.2, 0.2), 2.0) == pytest.approx(1.2)
    assert run(Clip(0.2, 0.28), 2.0) == pytest.approx(1.28)


def test_clips_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"low = None and high = 0.2 .*give both, or None for both"):
        Clip(None, 0.2)
    with pytest.raises(ValueError, match=r"low = 0.2 and high = None"):
        Clip(0.2, None)
    with pytest.raises(ValueError, match=r"dual = 1.0; it must be above 1"):
        Clip(0.2, 0.2, 1.0)
