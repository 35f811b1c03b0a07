"""Importance weights for the sampler's mismatch: by hand, against the exact gradient, and never silent."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.batch import Tokens, TokenStats
from dynamo_jax.config import Config, ModulationConfig, ObjectiveConfig
from dynamo_jax.config.methods import CorrectionConfig
from dynamo_jax.objective import Correction, importance_weight, mismatch_metrics, policy_loss
from dynamo_jax.objective.segments import Segments
from dynamo_jax.objective.terms import clip_of, token_terms

V, C = 4, 3
ROWS = np.array(list(itertools.product(range(V), repeat=C)))  # every sequence there is
PREFIXES = sum(V**t for t in range(C))
# The row of logits that each token is drawn from: prefixes in order of length, then as numbers in base V.
PREFIX_OF = np.stack(
    [sum(V**s for s in range(t)) + ROWS[:, :t] @ V ** np.arange(t)[::-1] for t in range(C)], axis=1
).astype(int)


def policy_logp(logits, temperature=1.0):
    """float32 [sequences, C]: the log-prob of each token of each sequence, under a policy that is a table."""
    return jax.nn.log_softmax(logits / temperature)[PREFIX_OF, ROWS]


@cache
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(0, 2.0, (PREFIXES, V)), jnp.float32)


REWARD = np.random.default_rng(1).normal(0, 1, len(ROWS)).astype(np.float32)


def settings(**objective):
    options = {"clip_low": None, "clip_high": None, "clip_ratio_c": None, "aggregation": "seq-mean-token-sum"}
    return Config(
        run_dir="-", modulation=ModulationConfig(enabled=False), objective=ObjectiveConfig(**(options | objective))
    )


def loss_of(config, logp, old_logp, sampled_logp, advantage, weight, mask=None):
    """What the update makes of these log-probs, from the settings on."""
    mask, of = jnp.ones_like(logp) if mask is None else mask, jnp.zeros(logp.shape, jnp.int32)
    row = of + jnp.arange(len(logp))[:, None]
    tokens = Tokens(mask, of, row, advantage[:, None] + of, weight[:, None] + of, of.astype(jnp.uint32), sampled_logp)
    old = sampled_logp if config.objective.old_logp == "sampler" else old_logp
    fixed = jax.lax.stop_gradient(logp)
    advantages, terms, metrics = token_terms(tokens, old, TokenStats(fixed, fixed, fixed), len(logp), config)
    o = config.objective
    loss, _ = policy_loss(
        logp, old, advantages, mask, clip_of(o), aggregation=o.aggregation, ratio=o.ratio, terms=terms
    )
    return loss, metrics


def corrected(kind, level="token", low=0.5, high=2.0, **objective):
    return settings(correction=CorrectionConfig(kind=kind, level=level, low=low, high=high), **objective)


@cache
def gradient_program(config):
    """The gradient of the loss, expected over rollouts from the sampler: every sequence with its probability."""

    def loss(x, sampled_logp):
        logp, probability = policy_logp(x), jnp.exp(jnp.sum(sampled_logp, axis=1))
        fixed = jax.lax.stop_gradient(logp)
        return loss_of(config, logp, fixed, sampled_logp, jnp.asarray(REWARD), probability * len(ROWS))

    return jax.jit(jax.grad(loss, has_aux=True))


def expected_gradient(config, sampled_logp):
    grad, metrics = gradient_program(config)(logits(), sampled_logp)
    return np.asarray(grad), metrics


@cache
def exact_gradient():
    """Of -E_pi[reward], by differentiating the expectation itself."""
    return np.asarray(jax.grad(lambda x: -jnp.exp(policy_logp(x).sum(1)) @ REWARD)(logits()))


def bias(config, sampled_logp):
    exact = exact_gradient()
    return float(np.linalg.norm(expected_gradient(config, sampled_logp)[0] - exact) / np.linalg.norm(exact))


WRONG = {
    "hot": lambda: policy_logp(logits(), temperature=1.05),
    "cold": lambda: policy_logp(logits(), temperature=0.95),
    "bfloat16": lambda: policy_logp(logits().astype(jnp.bfloat16).astype(jnp.float32)),
}


def test_a_sampler_that_is_right_gives_the_exact_gradient():
    for kind in ("none", "truncate", "mask"):
        assert bias(corrected(kind), policy_logp(logits())) < 1e-5


@pytest.mark.parametrize("old_logp", ["score", "sampler"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_sampler_shows_and_its_bias_is_lowered(wrong, old_logp):
    """Weights of tokens leave the order of what comes before and after; weights of whole rollouts leave nothing."""
    sampled = WRONG[wrong]()
    plain = bias(settings(), sampled)
    found = {
        (kind, level): bias(corrected(kind, level, old_logp=old_logp), sampled)
        for kind, level in itertools.product(("truncate", "mask"), ("token", "sequence"))
    }
    assert plain > (1e-3 if wrong == "bfloat16" else 0.03)
    assert all(found[kind, "token"] < 0.75 * plain for kind in ("truncate", "mask")), (plain, found)
    assert all(found[kind, "sequence"] < 1e-3 * plain for kind in ("truncate", "mask")), (plain, found)

    _, metrics = expected_gradient(corrected("truncate", old_logp=old_logp), sampled)
    _, right = expected_gradient(corrected("truncate", old_logp=old_logp), policy_logp(logits()))
    assert float(metrics["mismatch/k3"]) > (1e-7 if wrong == "bfloat16" else 1e-4)
    assert float(metrics["mismatch/weight_max"]) > (1.005 if wrong == "bfloat16" else 1.02)
    assert all(abs(float(right[f"mismatch/{name}"])) < 1e-6 for name in ("kl", "k3", "clipped_fraction"))
    assert float(right["mismatch/weight_max"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_the_first_update_of_a_step_is_the_same_by_either_old_logp(kind, level, ratio):
    """Without a clip. Many weights are outside the bounds, of rollouts more than of tokens."""
    rng = np.random.default_rng(2)
    logp, sampled = (jnp.asarray(rng.normal(-2, 0.2, (6, 5)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(np.arange(5) < np.array([5, 1, 3, 5, 2, 4])[:, None], jnp.float32)
    rest = (sampled, jnp.asarray(rng.normal(0, 1, 6), jnp.float32), jnp.ones(6), mask)

    def gradient(old_logp):
        config = corrected(kind, level, 0.7, 1.3, old_logp=old_logp, ratio=ratio)
        run = jax.jit(jax.value_and_grad(lambda x: loss_of(config, x, logp, *rest), has_aux=True))
        (_, metrics), grad = run(logp)
        return grad, metrics

    (grad, metrics), (by_sampler, of_sampler) = gradient("score"), gradient("sampler")
    np.testing.assert_allclose(by_sampler, grad, rtol=1e-5, atol=1e-7)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), metrics, of_sampler)
    assert 0.1 < float(metrics["mismatch/clipped_fraction"]) < 0.9


@pytest.mark.parametrize("old_logp", ["score", "sampler"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollouts_that_share_a_row_weigh_what_they_weigh_alone(level, old_logp):
    """Six rollouts of 1 to 5 tokens, each in a row of its own, and in two rows of 12 slots in two micro-batches."""
    rng = np.random.default_rng(3)
    length_M = np.array([5, 1, 3, 5, 2, 4])
    logp, old, sampled = rng.normal(-2, 0.2, (3, 6, 5)).astype(np.float32)
    mask = (np.arange(5) < length_M[:, None]).astype(np.float32)
    rollout = np.broadcast_to(np.arange(6)[:, None], (6, 5)).astype(np.int32)
    slots = np.concatenate([np.arange(10), 12 + np.arange(10)])  # the last two slots of a row hold nothing
    config = corrected("mask", level, 0.7, 1.3, old_logp=old_logp)

    def packed(x, empty):
        row = np.full(24, empty, x.dtype)
        row[slots] = x[mask > 0]
        return row.reshape(2, 1, 12)

    def terms(layout, mask_, rollout_, empty):
        of = [layout(x, empty) for x in (logp, sampled if old_logp == "sampler" else old, sampled)]
        ones = np.ones_like(of[0])
        tokens = Tokens(mask_, rollout_, rollout_, ones, 2 * ones, rollout_.astype(np.uint32), of[2])
        return token_terms(tokens, of[1], TokenStats(of[0], of[0], of[0]), 6, config)[1:]

    alone, metrics = terms(lambda x, _: x, mask, rollout, 0.0)
    together, of_packed = terms(packed, packed(mask, 0.0), packed(rollout, 6), 9.0)
    np.testing.assert_allclose(np.asarray(together.weight)[packed(mask, 0.0) > 0], alone.weight[mask > 0], rtol=1e-6)
    assert 0 < np.sum(alone.weight[mask > 0] == 0) < mask.sum()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), of_packed, metrics)


def test_the_clip_sees_the_mismatch_with_the_sampler_as_old():
    """Ratios pi_old / q of 1.5 and 0.6 in a first update: the clip stops what is good and too likely, and the reverse.

    With scored log-probs all tokens have their weight; what the clip leaves with the sampler's has it, too.
    """
    sampled = jnp.full((4, 1), -1.0)
    logp = sampled + jnp.log(jnp.array([[1.5], [1.5], [0.6], [0.6]]))
    advantage = np.array([1.0, -1.0, 1.0, -1.0], np.float32)

    def weights(old_logp):
        config = corrected("truncate", high=1.3, old_logp=old_logp, clip_low=0.2, clip_high=0.2)

        grad = jax.grad(lambda x: loss_of(config, x, logp, sampled, advantage, jnp.ones(4))[0])(logp)
        return np.asarray(grad)[:, 0] * -advantage * 4

    np.testing.assert_allclose(weights("score"), [1.3, 1.3, 0.6, 0.6], rtol=1e-6)
    np.testing.assert_allclose(weights("sampler"), [0.0, 1.3, 0.6, 0.0], rtol=1e-6)


def test_weights_and_metrics_by_hand():
    """Rollouts of 2 and 1 tokens, one behind the other in a row or in a row each; log-ratios 0.5, -0.1 and -1."""
    logp = np.array([[-1.0, -2.0, -3.0, 9.0]], np.float32)
    sampled = logp - np.array([[0.5, -0.1, -1.0, 7.0]], np.float32)
    mask, packed = np.array([[1, 1, 1, 0]]), Segments(np.array([[0, 0, 1, 2]], np.int32), 2)
    token = np.exp([[0.5, -0.1, -1.0]])
    sequence = np.exp([[0.4, 0.4, -1.0]])
    for level, expected in (("token", token), ("sequence", sequence)):
        weight = importance_weight(logp, sampled, mask, level, packed)
        np.testing.assert_allclose(weight[:, :3], expected, rtol=1e-6)
        assert float(weight[0, 3]) == 0.0
    rows, row_mask = [[0, 1], [2, 3]], np.array([[1, 1], [1, 0]])
    np.testing.assert_allclose(
        importance_weight(logp[0][rows], sampled[0][rows], row_mask, "sequence"),
        [[np.exp(0.4)] * 2, [np.exp(-1.0), 0.0]],
        rtol=1e-6,
    )

    low, high = 0.5, 1.45
    np.testing.assert_allclose(Correction("truncate", high=high).of(token), [[high, *token[0, 1:]]], rtol=1e-6)
    np.testing.assert_allclose(Correction("mask", low=low, high=high).of(token), [[0, token[0, 1], 0]], rtol=1e-6)
    np.testing.assert_array_equal(Correction().of(token), np.ones((1, 3)))

    metrics = mismatch_metrics(logp, sampled, mask, Correction("mask", "token", low, high), packed)
    assert float(metrics["mismatch/kl"]) == pytest.approx((-0.5 + 0.1 + 1.0) / 3, rel=1e-5)
    d = np.array([0.5, -0.1, -1.0])
    assert float(metrics["mismatch/k3"]) == pytest.approx(np.mean(np.exp(d) - 1 - d), rel=1e-5)
    assert float(metrics["mismatch/weight_mean"]) == pytest.approx(token.mean(), rel=1e-5)
    assert float(metrics["mismatch/weight_max"]) == pytest.approx(np.exp(0.5), rel=1e-5)
    assert float(metrics["mismatch/clipped_fraction"]) == pytest.approx(2 / 3, rel=1e-5)
    of_rollouts = mismatch_metrics(logp, sampled, mask, Correction("mask", "sequence", low, high), packed)
    assert float(of_rollouts["mismatch/weight_mean"]) == pytest.approx((np.exp(0.4) + np.exp(-1)) / 2, rel=1e-5)
    assert float(of_rollouts["mismatch/clipped_fraction"]) == pytest.approx(1.0, rel=1e-5)  # exp(0.4) = 1.49
    assert "mismatch/clipped_fraction" not in mismatch_metrics(logp, sampled, mask, Correction(), packed)
    empty = mismatch_metrics(logp, sampled, mask * 0, Correction("mask"), packed)
    assert all(float(x) == 0.0 for x in empty.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_log_probs_of_a_sampler_that_are_not_finite_are_seen(bad):
    """Also where the weight would be clamped, truncated or masked away; but not in the padding."""
    logp = jnp.full((3, 4), -1.0)
    mask = jnp.asarray(np.arange(4) < np.array([4, 2, 3])[:, None], jnp.float32)
    good = jnp.where(mask > 0, -1.1, bad)
    advantage = jnp.array([1.0, -1.0, 0.5])
    wrong = good.at[1, 0].set(bad)
    cases = [corrected(k, level) for k in ("truncate", "mask") for level in ("token", "sequence")]
    cases += [dataclasses.replace(c, objective=dataclasses.replace(c.objective, old_logp="sampler")) for c in cases]
    cases.append(settings(old_logp="sampler"))
    for config in cases:
        loss, metrics = loss_of(config, logp, logp, good, advantage, jnp.ones(3), mask)
        assert np.isfinite([float(loss), *map(float, metrics.values())]).all()
        loss, metrics = loss_of(config, logp, logp, wrong, advantage, jnp.ones(3), mask)
        assert np.isnan(float(loss))
        assert all(np.isnan(float(metrics[name])) for name in metrics if name in ("mismatch/kl", "mismatch/k3"))
    _, metrics = loss_of(settings(), logp, logp, wrong, advantage, jnp.ones(3), mask)  # not read, but shown
    assert np.isnan(float(metrics["mismatch/kl"]))


def test_bad_corrections_are_refused():
    for options, message in [
        ({"kind": "clip"}, "'clip'; choose one of none, truncate, mask"),
        ({"level": "row"}, "'row'; choose one of token, sequence"),
        ({"low": 1.5}, r"low = 1.5 and high = 2.0; give 0 <= low <= 1 <= high"),
        ({"high": 0.9}, r"low = 0.5 and high = 0.9"),
    ]:
        with pytest.raises(ValueError, match=message):
            Correction(**options)
