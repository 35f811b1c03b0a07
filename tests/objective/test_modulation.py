"""Entropy change and the two modulation factors: by hand, against exact float64 values, against the released code."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.kernels import token_stats
from dynamo_jax.objective import Clip, entropy_change, log_ratio, modulate

CLIP = Clip(0.2, 0.2)
DTYPES = [pytest.param(True, id="float64"), pytest.param(False, id="float32")]


def golden(shared, name):
    """(case, {array name: array}) for each case of a keyed golden file."""
    cases = json.loads((shared / "golden" / "manifest.json").read_text())["files"][name]["cases"]
    with np.load(shared / "golden" / name) as arrays:
        for case in cases:
            prefix = f"{case['case']:03d}/"
            yield case, {key[len(prefix) :]: arrays[key] for key in arrays.files if key.startswith(prefix)}


def padded(array, shape, dtype):
    """At the top left of zeros: one shape for all cases, so that each program compiles once."""
    out = np.zeros(shape, dtype)
    out[tuple(slice(n) for n in array.shape)] = array
    return out


def released_settings(case):
    """The released code's names: mu_max = 1 + alpha; its second mode ties lambda_min = 1 - alpha."""
    params = case["params"]
    if case["mode"] == "decay6_linearnorm":
        mu_max, lambda_min = params.get("mu_max", 1.2), params.get("lambda_min", 0.6)
        return {"alpha": mu_max - 1, "lambda_min": lambda_min, "gamma": 50.0, "tau": 0.99}
    assert case["mode"] == "decay5_linearnorm"
    assert not params
    return {"alpha": 0.4, "lambda_min": 0.6, "gamma": 50.0, "tau": 0.9}


def test_modulate_by_hand():
    entropy = jnp.array([[0.0, 1.0, 4.0, 99.0]])
    change = jnp.array([[0.5, -2.0, 0.0, 77.0]])
    advantages, mask = jnp.array([[1.0]]), jnp.array([[1, 1, 1, 0]])
    out, comp, stab = modulate(advantages, entropy, change, mask, alpha=0.2, lambda_min=0.6, gamma=2.0, tau=0.5)
    # comp = 1 + 0.2 (4 - H) / 4: 1.2, 1.15, 1. Xi / max = 0.25, 1, 0: stab = 0.6 + 0.4 / (1 + exp(2 (x - 0.5))).
    np.testing.assert_allclose(comp, [[1.2, 1.15, 1.0, 1.0]], rtol=1e-6)
    expected = 0.6 + 0.4 / (1 + np.exp(2 * (np.array([0.25, 1.0, 0.0]) - 0.5)))
    np.testing.assert_allclose(stab, [[*expected, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(out, comp * stab, rtol=1e-6)

    # A negative advantage is not compensated; each factor can be left out.
    settings = {"alpha": 0.2, "lambda_min": 0.6, "gamma": 2.0, "tau": 0.5}
    _, comp, _ = modulate(-advantages, entropy, change, mask, **settings)
    np.testing.assert_array_equal(comp, np.ones((1, 4)))
    _, comp, stab = modulate(advantages, entropy, change, mask, compensation=False, stabilisation=False, **settings)
    np.testing.assert_array_equal(comp, np.ones((1, 4)))
    np.testing.assert_array_equal(stab, np.ones((1, 4)))


def test_entropy_change_by_hand():
    # pi = (1/2, 1/4, 1/4): H = 1.5 log 2. Lam(0) = log(1/2) + H = 0.5 log 2; Lam(1) = Lam(2) = -0.5 log 2.
    # E[pi Lam] = 1/4 * 0.5 log 2 - 2 * 1/16 * 0.5 log 2 = log 2 / 16.
    log2 = np.log(2.0)
    p = np.array([[0.5, 0.25, 0.5, 0.5, 0.5, 0.5]])
    ratio = np.array([[1.0, 1.1, 1.3, 0.7, 12.0, 1.0]])
    advantages = np.array([[1.0, -2.0, 1.0, -1.0, -1.0, 1.0]])
    shape = (1, 6)
    args = (np.log(p), np.log(p / ratio), np.full(shape, 1.5 * log2), np.full(shape, log2 / 16), advantages)
    mask = np.array([[1, 1, 1, 1, 1, 0]])
    # Token 0: -(1 * 1)(1/2 * 0.5 log 2 - log 2 / 16). Token 1: 2.2 (1/4 * -0.5 log 2 - log 2 / 16). Tokens 2 and 3 are
    # clipped. Token 4: 12 (...) unless the dual clip takes it. Token 5 is padding.
    at_top = log2 / 4 - log2 / 16
    expected = np.array([[-at_top, 2.2 * (-log2 / 8 - log2 / 16), 0.0, 0.0, 12 * at_top, 0.0]])
    args = tuple(jnp.asarray(x, jnp.float32) for x in args)
    np.testing.assert_allclose(entropy_change(*args, mask, CLIP), expected, rtol=1e-5)
    expected[0, 4] = 0.0
    np.testing.assert_allclose(entropy_change(*args, mask, Clip(0.2, 0.2, 10.0)), expected, rtol=1e-5)


def test_entropy_change_with_the_mean_over_the_sequence_by_hand():
    # pi Lam of the tokens that count: 1/2 (log 1/2 + 1), 1/4 (log 1/4 + 2); the third is padding. All ratios are 1.
    p, entropy = np.array([[0.5, 0.25, 0.9]]), np.array([[1.0, 2.0, 5.0]])
    value = p * (np.log(p) + entropy)
    mean = (value[0, 0] + value[0, 1]) / 2
    logp, mask = jnp.log(jnp.asarray(p, jnp.float32)), jnp.array([[1, 1, 0]])
    args = (logp, logp, jnp.float32(entropy), jnp.full((1, 3), jnp.nan), jnp.array([[3.0]]), mask)
    expected = [[-3 * (value[0, 0] - mean), -3 * (value[0, 1] - mean), 0.0]]
    np.testing.assert_allclose(entropy_change(*args, CLIP, baseline="sequence_mean"), expected, rtol=1e-5)
    empty = entropy_change(*args[:-1], mask * 0, CLIP, baseline="sequence_mean")
    np.testing.assert_array_equal(empty, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"'mean'.*exact, sequence_mean"):
        entropy_change(*args, CLIP, baseline="mean")


def test_entropy_change_under_another_ratio_and_without_a_clip():
    rng = np.random.default_rng(0)
    logp, entropy, old_logp = (jnp.float32(x) for x in rng.uniform(0.1, 2.0, (3, 2, 4)) * [[[-1]], [[1]], [[-1]]])
    args = (entropy, -entropy, jnp.array([[1.0], [-2.0]]), jnp.ones((2, 4)))
    own = log_ratio(logp, old_logp, args[-1], "token")
    clip, off = Clip(0.2, 0.3), Clip(None, None)
    expected = entropy_change(logp, old_logp, *args, clip)
    np.testing.assert_array_equal(entropy_change(logp, logp * 0, *args, clip, log_ratio=own), expected)
    # Without a clip every token of nonzero advantage changes the entropy, in proportion to its ratio.
    change = entropy_change(logp, old_logp, *args, off)
    np.testing.assert_allclose(change, entropy_change(logp, logp, *args, off) * jnp.exp(own), rtol=1e-5)
    assert np.all(np.asarray(change) != 0)
    assert 0 < np.count_nonzero(expected) < 8


SETTINGS = {"alpha": 0.2, "lambda_min": 0.6, "gamma": 50.0, "tau": 0.9}


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_degenerate_batches_are_finite(fill):
    ones, padding = jnp.ones((2, 3)), jnp.full((2, 3), fill)
    for entropy, change, mask in [
        (ones * 0.7, ones * 0, ones),  # all entropies equal, no change
        (ones * 0.7, ones * 0.1, ones),
        (ones * 0, ones * 0, ones),
        (padding, padding, ones * 0),  # nothing in the mask
    ]:
        out, comp, stab = modulate(ones[:, :1], entropy, change, mask, **SETTINGS)
        np.testing.assert_array_equal(comp, np.ones((2, 3)))
        assert np.isfinite(out).all()
        assert ((np.asarray(stab) >= 0.6) & (np.asarray(stab) <= 1.0)).all()
    np.testing.assert_array_equal(stab, np.ones((2, 3)))
    change = entropy_change(padding, padding, padding, padding, ones, ones * 0, Clip(0.2, 0.2, 10.0))
    np.testing.assert_array_equal(change, np.zeros((2, 3)))


def test_no_gradient_and_float32():
    shape = (2, 4)
    logp = jax.random.uniform(jax.random.key(0), shape, minval=-3.0, maxval=-0.1)

    def f(logp, advantages):
        change = entropy_change(logp, logp, -logp, logp, advantages, jnp.ones(shape), CLIP)
        return sum(jnp.sum(x) for x in (change, *modulate(advantages, -logp, change, jnp.ones(shape), **SETTINGS)))

    for grad in jax.grad(f, argnums=(0, 1))(logp, jnp.ones((2, 1))):
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))
    low = logp.astype(jnp.bfloat16)
    assert entropy_change(low, low, low, low, low, jnp.ones(shape), CLIP).dtype == jnp.float32
    assert {x.dtype for x in modulate(low, low, low, jnp.ones(shape), **SETTINGS)} == {jnp.dtype("float32")}


@pytest.mark.shared
@pytest.mark.parametrize("x64", DTYPES)
def test_golden_factors(shared, x64):
    """The released estimator's Xi goes in, its factors and advantages come out."""
    dtype, tolerance, decay_tolerance = (np.float64, 1e-7, 1e-6) if x64 else (np.float32, 2e-5, 2e-5)
    modulated = jax.jit(modulate)
    with jax.enable_x64(x64):
        for case, arrays in golden(shared, "modulation.npz"):
            inputs = (padded(arrays[k], (8, 64), dtype) for k in ("advantages", "entropy", "Xi"))
            mask = padded(arrays["mask"], (8, 64), bool)
            out, comp, stab = modulated(*inputs, mask, **released_settings(case))
            assert out.dtype == dtype
            for ours, name, limit in (
                (comp, "boost", tolerance),
                (stab, "decay", decay_tolerance),
                (out, "mod_advantages", tolerance),
            ):
                message = f"{name} of case {case['case']}"
                expected = arrays[name][arrays["mask"] > 0]
                np.testing.assert_allclose(np.asarray(ours)[mask], expected, limit, limit, err_msg=message)


@pytest.mark.shared
@pytest.mark.parametrize("x64", DTYPES)
@pytest.mark.parametrize("name", ["modulation.npz", "modulation_multi.npz"])
def test_golden_released_estimate(shared, name, x64):
    """With the mean over the sequence and without the dual clip, |dH| is the released Xi, however rows are packed."""
    dtype, tolerance = (np.float64, 1e-7) if x64 else (np.float32, 2e-5)
    estimate = jax.jit(partial(entropy_change, baseline="sequence_mean"))
    with jax.enable_x64(x64):
        for case, arrays in golden(shared, name):
            inputs = ("log_prob", "old_log_prob", "entropy", "advantages")
            logp, old_logp, entropy, advantages = (padded(arrays[k], (12, 64), dtype) for k in inputs)
            mask = padded(arrays["mask"], (12, 64), bool)
            clip = Clip(case["clip_effective"]["low"], case["clip_effective"]["high"])
            change = estimate(logp, old_logp, entropy, entropy * np.nan, advantages, mask, clip)
            assert change.dtype == dtype
            expected = arrays["Xi"][arrays["mask"] > 0]
            message = f"case {case['case']}"
            np.testing.assert_allclose(np.abs(change)[mask], expected, tolerance, tolerance, err_msg=message)


@pytest.mark.shared
@pytest.mark.parametrize("x64", DTYPES)
def test_golden_factors_of_micro_batches(shared, x64):
    """The released code takes its extremes over a micro-batch: ours match when given one micro-batch at a time."""
    dtype, tolerance = (np.float64, 1e-7) if x64 else (np.float32, 2e-5)
    modulated = jax.jit(modulate)
    with jax.enable_x64(x64):
        for case, arrays in golden(shared, "modulation_multi.npz"):
            for micro in np.unique(arrays["micro_batch_of_row"]):
                rows = arrays["micro_batch_of_row"] == micro
                inputs = (padded(arrays[k][rows], (8, 32), dtype) for k in ("advantages", "entropy", "Xi"))
                mask = padded(arrays["mask"][rows], (8, 32), bool)
                out, _, _ = modulated(*inputs, mask, **released_settings(case))
                expected = arrays["mod_advantages"][rows][arrays["mask"][rows] > 0]
                np.testing.assert_allclose(np.asarray(out)[mask], expected, tolerance, tolerance)


@partial(jax.jit, static_argnames=("impl", "clip"))
def from_logits(logits_MCV, token_MC, old_logp, advantages, mask, impl, clip):
    """Everything between logits and modulated advantages, by the names of the golden file."""
    M, C, V = logits_MCV.shape
    # With the identity as the head, hidden states are the logits.
    hidden, head = logits_MCV.reshape(-1, V), jnp.eye(V, dtype=logits_MCV.dtype)
    logp, entropy, lambda_mean = (x.reshape(M, C) for x in token_stats(hidden, head, token_MC.reshape(-1), impl=impl))
    change = entropy_change(logp, old_logp, entropy, lambda_mean, advantages, mask, clip)
    out = {"log_prob": logp, "entropy": entropy, "E_pi_Lambda": lambda_mean, "delta_H": change}
    for mode, alpha, tau in ((6, 0.2, 0.99), (5, 0.4, 0.9)):
        settings = {"alpha": alpha, "lambda_min": 0.6, "gamma": 50.0, "tau": tau}
        out[f"mod_adv{mode}_exact"], _, out[f"decay{mode}_exact"] = modulate(
            advantages, entropy, change, mask, **settings
        )
    return out


@pytest.mark.shared
@pytest.mark.parametrize("x64", DTYPES)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_golden_exact_entropy_change(shared, impl, x64):
    """From logits to modulated advantages, against float64 numpy: 1e-9, or 1e-4 of the largest value in float32."""
    dtype, tolerance = (np.float64, 1e-9) if x64 else (np.float32, 1e-4)
    with jax.enable_x64(x64):
        for case, arrays in golden(shared, "exact_entropy.npz"):
            shape = (6, 20)
            mask = padded(arrays["mask"], shape, bool)
            inputs = (
                padded(arrays["logits"], (*shape, arrays["logits"].shape[-1]), dtype),
                padded(arrays["token"], shape, np.int32),
                padded(arrays["old_log_prob"], shape, dtype),
                padded(arrays["advantages"], shape, dtype),
            )
            for name, ours in from_logits(*inputs, mask, impl, Clip(case["eps_low"], case["eps_high"])).items():
                assert ours.dtype == dtype
                expected = arrays[name][arrays["mask"] > 0]
                # Uniform logits: changes of 1e-32 there, of one rounding here.
                limit = tolerance * (1.0 if x64 else max(np.abs(expected).max(), 1e-3))
                message = f"{name} of case {case['case']}"
                np.testing.assert_allclose(np.asarray(ours)[mask], expected, rtol=0, atol=limit, err_msg=message)
