"""Sums and means over rollouts: of rows, and of several rollouts in a row."""

import jax
import numpy as np

from dynamo_jax.objective.segments import Segments, segment_mean, segment_sum

VALUES = np.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], np.float32)


def test_a_row_is_a_rollout_without_segments() -> None:
    np.testing.assert_array_equal(segment_sum(VALUES, None), [[15.0] * 4, [240.0] * 4])
    np.testing.assert_array_equal(segment_mean(VALUES, VALUES > 3, None), [[6.0] * 4, [60.0] * 4])


def test_several_rollouts_in_a_row_and_one_in_two_rows() -> None:
    of = np.array([[2, 2, 0, 3], [0, 1, 1, 3]], np.int32)  # 3: of no rollout
    found = jax.jit(lambda x: segment_sum(x, Segments(of, 3)))(VALUES)
    np.testing.assert_array_equal(found, [[3, 3, 20, 0], [20, 96, 96, 0]])
    mask = np.array([[0, 1, 1, 1], [1, 0, 0, 1]])
    np.testing.assert_array_equal(segment_mean(VALUES, mask, Segments(of, 3)), [[2, 2, 10, 0], [10, 0, 0, 0]])
