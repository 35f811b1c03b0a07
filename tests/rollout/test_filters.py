"""top-k, top-p and min-p against cases worked by hand, and against their definitions on random logits."""

import jax
import numpy as np
import pytest

from dynamo_jax.rollout.filters import EXCLUDED, filter_logits


def kept(probabilities: list[float], **settings: float) -> list[int]:
    """Token ids that stay, after a check that theirs keep their logits and the others get none."""
    logits = np.log(np.array([probabilities], np.float32))
    out = np.asarray(jax.jit(lambda x: filter_logits(x, **settings))(logits))
    stays = out[0] != np.float32(EXCLUDED)
    np.testing.assert_array_equal(out[0, stays], logits[0, stays])
    return np.flatnonzero(stays).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),  # 0.4 is not enough, so the next likely joins
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.8}, [1]),
        ({"min_p": 0.7}, [1, 3]),  # 0.3 >= 0.7 * 0.4
        ({"min_p": 0.3}, [0, 1, 3]),  # 0.2 >= 0.12, 0.1 is not
        ({"min_p": 0.2}, [0, 1, 2, 3]),
    ],
)
def test_by_hand(settings: dict[str, float], expected: list[int]) -> None:
    assert kept([0.2, 0.4, 0.1, 0.3], **settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.2}, [0]),
        ({"top_p": 0.3}, [0, 1]),
        ({"top_p": 0.6}, [0, 1, 2]),
        ({"min_p": 1.0}, [0, 1, 2, 3]),  # all are as likely as the most likely one
    ],
)
def test_ties_go_to_the_smaller_id(settings: dict[str, float], expected: list[int]) -> None:
    assert kept([0.25] * 4, **settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 0.4 and 0.3 alone are 0.57 and 0.43: what top-p sees is renormalised.
        ({"top_k": 2, "top_p": 0.5}, [0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1]),
        ({"top_p": 0.5, "min_p": 0.7}, [0, 1]),
        ({"top_p": 0.5, "min_p": 0.8}, [0]),
        ({"top_k": 3, "min_p": 0.1}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.75, "min_p": 0.6}, [0, 1]),  # 0.4, 0.3, 0.2 of 0.9: two are 0.78
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.4}, [0, 1, 2]),
    ],
)
def test_composition(settings: dict[str, float], expected: list[int]) -> None:
    assert kept([0.4, 0.3, 0.2, 0.1], **settings) == expected


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1, "top_p": 1e-9, "min_p": 1.0}]
)
def test_the_most_likely_token_always_stays(settings: dict[str, float], scale: float) -> None:
    logits = scale * np.random.default_rng(0).normal(size=(20, 13)).astype(np.float32)
    out = np.asarray(filter_logits(logits, **settings))
    top = np.argmax(logits, axis=1)
    assert (np.argmax(out, axis=1) == top).all()
    assert ((out != np.float32(EXCLUDED)).sum(axis=1) == 1).all()
    assert np.isfinite(out).all()


def test_against_the_definitions() -> None:
    logits = np.random.default_rng(1).normal(size=(50, 17)).astype(np.float32) * 2
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(axis=1, keepdims=True)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        stays = np.asarray(filter_logits(logits, top_p=top_p)) != np.float32(EXCLUDED)
        for row, p in zip(stays, probability, strict=True):
            assert p[row].sum() >= top_p  # enough,
            assert p[row].sum() - p[row].min() < top_p  # not one too many,
            assert p[row].min() >= p[~row].max(initial=0)  # and the likeliest ones
    for min_p in (0.01, 0.1, 0.5):
        stays = np.asarray(filter_logits(logits, min_p=min_p)) != np.float32(EXCLUDED)
        np.testing.assert_array_equal(stays, probability >= min_p * probability.max(axis=1, keepdims=True))
    for top_k in (1, 5, 17):
        stays = np.asarray(filter_logits(logits, top_k=top_k)) != np.float32(EXCLUDED)
        rank = np.argsort(np.argsort(-logits, axis=1), axis=1)
        np.testing.assert_array_equal(stays, rank < top_k)
