"""Packing: every token once and with all that belongs to it, no row too full, few rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import Flat, in_rows, of_rollouts, packed, tokens_in

from dynamo_jax.batch import Pool, PromptBatch, Rollouts
from dynamo_jax.update import pack
from dynamo_jax.update.packing import Shape, fitted, rows_needed

SLOTS, L, C = 24, 4, 6
lengths_of_rows = st.lists(st.integers(0, SLOTS), max_size=40)


@given(lengths_of_rows)
def test_every_sequence_is_in_one_row_and_no_row_too_full(lengths: list[int]) -> None:
    rows = fitted(lengths, SLOTS)
    assert sorted(i for row in rows for i in row) == [i for i, length in enumerate(lengths) if length]
    assert all(0 < sum(lengths[i] for i in row) <= SLOTS for row in rows)
    assert rows == fitted(np.array(lengths, np.int32), SLOTS)  # the same each time, for whatever holds the lengths
    assert rows_needed(lengths, SLOTS) == len(rows) <= len(lengths)


@given(lengths_of_rows)
def test_no_two_rows_fit_into_one(lengths: list[int]) -> None:
    """No two rows could have been one."""
    used = sorted(sum(lengths[i] for i in row) for row in fitted(lengths, SLOTS))
    assert len(used) < 2 or used[0] + used[1] > SLOTS


def best(lengths: list[int], slots: int) -> int:
    """The fewest rows there are, by trying all."""
    fewest = len(lengths)

    def place(left: list[int], free: list[int]) -> None:
        nonlocal fewest
        if len(free) >= fewest:
            return
        if not left:
            fewest = len(free)
            return
        for i in range(len(free)):
            if free[i] >= left[0]:
                place(left[1:], [*free[:i], free[i] - left[0], *free[i + 1 :]])
        place(left[1:], [*free, slots - left[0]])

    place(sorted((length for length in lengths if length), reverse=True), [])
    return fewest


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, SLOTS), max_size=6))
def test_first_fit_decreasing_is_near_the_optimum(lengths: list[int]) -> None:
    """At most 11/9 of it + 6/9 (G. Dosa, 2007)."""
    assert 9 * rows_needed(lengths, SLOTS) <= 11 * best(lengths, SLOTS) + 6


def test_rows_by_hand() -> None:
    """The longest first, each into the first row with room; of equal ones the first first."""
    assert fitted([3, 6, 5, 0, 5, 1], 10) == [[1, 0, 5], [2, 4]]
    assert fitted([], 10) == []
    assert rows_needed([10, 10, 1], 10) == 3
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit into rows of 10"):
        fitted([3, 11], 10)


def numbered(prompt_length_M: np.ndarray, length_M: np.ndarray) -> Flat:
    """Every number names its rollout, and what it is of it; padding holds numbers like any other."""
    m = np.arange(len(length_M))
    return Flat(
        prompts_ML=(m[:, None] * 1000 + 100 + np.arange(L)).astype(np.int32),
        prompt_length_M=prompt_length_M.astype(np.int32),
        tokens_MC=(m[:, None] * 1000 + 500 + np.arange(C)).astype(np.int32),
        length_M=length_M.astype(np.int32),
        advantage_M=(m + 0.5).astype(np.float32),
        weight_M=(m + 0.25).astype(np.float32),
        random_M=(m + 7).astype(np.uint32),
        sampled_logp_MC=-(m[:, None] * 100 + np.arange(C)).astype(np.float32) - 1,
    )


SHAPES = [Shape(2, 3, L + C), Shape(1, 6, L + C), Shape(3, 2, 23)]  # few: each is traced


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Flat, Shape, np.ndarray]:
    """A mini-batch of some of six rollouts, in any order, with empty ones among them."""
    prompt_length_M, length_M = (
        np.array(draw(st.lists(st.integers(1, top), min_size=6, max_size=6))) for top in (L, C)
    )
    rows_M = np.array(draw(st.permutations(range(6))))
    rows_M[draw(st.lists(st.integers(0, 5), max_size=6))] = -1
    return numbered(prompt_length_M, length_M), draw(st.sampled_from(SHAPES)), rows_M


@settings(deadline=None, max_examples=50)
@given(rollouts())
def test_every_token_of_every_rollout_is_there_once_with_all_that_is_its(case: tuple[Flat, Shape, np.ndarray]) -> None:
    flat, shape, rows_M = case
    mini = packed(flat, shape, rows_M=rows_M)
    batch, rows, real_M = mini.batch, mini.batch.rows, rows_M >= 0
    M = len(rows_M)
    assert {x.shape for x in rows if x is not None} == {shape}  # there is no reference
    assert mini.tokens == (rows.rollout < M).sum()
    for m, b in enumerate(rows_M):
        at = np.argwhere(rows.rollout == m)
        if b < 0:
            assert len(at) == batch.length_M[m] == batch.advantage_M[m] == batch.weight_M[m] == 0
            continue
        prompt, length = flat.prompt_length_M[b], flat.length_M[b]
        assert (batch.prompt_length_M[m], batch.length_M[m]) == (prompt, length)
        assert (batch.advantage_M[m], batch.weight_M[m], batch.random_M[m]) == (b + 0.5, b + 0.25, b + 7)
        where = tuple(at.T)  # one row, one slot after the other
        assert len(set(map(tuple, at[:, :2]))) == 1
        np.testing.assert_array_equal(np.diff(at[:, 2]), 1)
        np.testing.assert_array_equal(rows.position[where], np.arange(prompt + length))
        whole = [*flat.prompts_ML[b, L - prompt :], *flat.tokens_MC[b, :length]]
        np.testing.assert_array_equal(rows.tokens[where], whole)
    # What is said of a token stands in the slot before it.
    tokens = tokens_in(mini)
    assert tokens.mask.sum() == flat.length_M[rows_M[real_M]].sum()
    predicted = np.roll(rows.tokens, -1, axis=-1)[tokens.mask > 0]
    b = rows_M[tokens.rollout[tokens.mask > 0]]
    np.testing.assert_array_equal(predicted, b * 1000 + 500 + tokens.step[tokens.mask > 0])
    for found, expected in ((tokens.advantage, b + 0.5), (tokens.weight, b + 0.25), (tokens.random, b + 7)):
        np.testing.assert_array_equal(found[tokens.mask > 0], expected)
    np.testing.assert_array_equal(tokens.sampled_logp[tokens.mask > 0], -(b * 100 + tokens.step[tokens.mask > 0]) - 1)
    # Live micro-batches come first and share the rows out.
    rows_I = (rows.rollout < M).any(axis=2).sum(axis=1)
    assert mini.live == max(1, np.count_nonzero(rows_I))
    assert rows_I[: mini.live].max() - rows_I[: mini.live].min() <= 1


def test_what_is_packed_comes_out_again() -> None:
    rng = np.random.default_rng(0)
    flat = numbered(rng.integers(1, L + 1, 6), rng.integers(1, C + 1, 6))
    mini = packed(flat, SHAPES[0])
    logp_MC = np.where(flat.mask_MC, flat.sampled_logp_MC, 0)
    np.testing.assert_array_equal(of_rollouts(mini, mini.batch.rows.sampled_logp, C), logp_MC)
    np.testing.assert_array_equal(in_rows(mini, flat.sampled_logp_MC), mini.batch.rows.sampled_logp)


def test_prompts_are_read_through_the_map_from_rollouts_to_them() -> None:
    """Unequal groups, an empty one among them, and an order that mixes them."""
    prompt_of_R = np.array([2, 0, 2, 2, 3])
    names = ("a", "b", "c", "d")
    prompts = PromptBatch(np.arange(4), np.arange(8).reshape(4, 2), np.array([1, 2, 2, 1]), names, names, names)
    drawn = Rollouts(np.arange(10, 20).reshape(5, 2), np.array([2, 1, 1, 2, 1]), np.ones(5, bool), np.zeros((5, 2)))
    x_R = np.arange(5)
    pool = Pool(prompts, prompt_of_R, drawn, x_R > 0, x_R * 0.0, x_R * 0.0, np.zeros(4))
    batch = pack(pool, x_R + 0.5, x_R + 0.25, x_R, np.array([4, 3, -1, 1]), Shape(1, 4, 4)).batch
    found = [batch.rows.tokens[batch.rows.rollout == m].tolist() for m in range(4)]
    assert found == [[7, 18], [4, 5, 16, 17], [], [1, 12]]
    assert batch.advantage_M.tolist() == [4.5, 3.5, 0.0, 1.5]
