"""Selected tokens: against a sort, by hand, on any mesh and in any order; the released losses that are made of them."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamo_jax.config import MeshConfig
from dynamo_jax.objective import (
    Clip,
    TokenTerms,
    clip_cov_tokens,
    covariance,
    fork_tokens,
    kl_cov_tokens,
    largest,
    policy_loss,
    token_priority,
)
from dynamo_jax.objective.selection import _fraction, _part
from dynamo_jax.sharding import make_mesh, sharding

CLIP_COV = {"clip": Clip(0.2, 0.2), "fraction": 0.2, "low": 0.1, "high": 0.6}
run_largest = jax.jit(largest)
SETTINGS = ("clip", "fraction", "low", "high")
run_clip_cov = jax.jit(clip_cov_tokens, static_argnames=SETTINGS)
run_kl_cov = jax.jit(kl_cov_tokens, static_argnames="fraction")


def random_batch(M=16, C=12, seed=0):
    """logp, old_logp, advantages, mask, rollout, entropy. Every third rollout repeats the context of the first."""
    rng = np.random.default_rng(seed)
    logp = rng.uniform(-3, -0.1, (M, C)).astype(np.float32)
    logp[::3, : C // 2] = logp[0, : C // 2]
    old_logp = (logp + rng.normal(0, 0.2, (M, C))).astype(np.float32)
    advantages = rng.choice(np.float32([-1.2, -0.4, 0.5, 1.5]), (M, 1))
    mask = np.arange(C) < rng.integers(1, C + 1, (M, 1))
    return logp, old_logp, advantages, mask, rng.permutation(M).astype(np.int32), (-logp * 0.7).astype(np.float32)


def oracle(values, mask, count, priority):
    """Sorted by value without its lowest bits, then by priority, then by position; the first `count`."""
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    magnitude = (bits & 0x7FFFFFFF) >> 10
    rank = np.where(bits < 0, -magnitude - 1, magnitude)
    order = np.lexsort((np.asarray(priority).ravel(), -rank.ravel()))  # stable: then by position
    order = order[np.asarray(mask).ravel()[order]]
    chosen = np.zeros(mask.size, bool)
    chosen[order[: max(count, 0)]] = True
    return chosen.reshape(mask.shape)


AWKWARD = [0.0, -0.0, 1.0, -1.0, 1.00001, 0.99999, -1.00001, 1e-40, -1e-40, 3e38, -3e38, np.inf, -np.inf]
SHAPE = (4, 6)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.sampled_from(AWKWARD) | st.floats(width=32, allow_nan=False), min_size=24, max_size=24),
    mask=st.lists(st.booleans(), min_size=24, max_size=24),
    priority=st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), min_size=24, max_size=24),
    count=st.integers(-1, 30),
)
@example(values=[0.5] * 24, mask=[True] * 24, priority=[2**32 - 1] * 24, count=24)
@example(values=[0.5] * 24, mask=[True] * 24, priority=[0] * 24, count=7)
@example(values=[-2.0] * 24, mask=[False] * 24, priority=[0] * 24, count=7)
def test_largest_is_what_a_sort_would_take(values, mask, priority, count):
    values, mask = np.array(values, np.float32).reshape(SHAPE), np.array(mask).reshape(SHAPE)
    values[np.abs(values) < 1.2e-38] = 0.0  # XLA on CPU flushes subnormal numbers
    priority = np.array(priority, np.uint32).reshape(SHAPE)
    chosen = np.asarray(run_largest(values, mask, jnp.int32(count), priority))
    np.testing.assert_array_equal(chosen, oracle(values, mask, count, priority))
    assert chosen.sum() == min(max(count, 0), mask.sum())


def test_values_that_differ_by_a_rounding_are_ties():
    rng = np.random.default_rng(0)
    # In the middle of the range of patterns that tie, so that no noise leads out of it.
    bits = (rng.uniform(-2, 2, 40).astype(np.float32).view(np.int32) & ~0x3FF) | 0x200
    exact = rng.choice(bits.view(np.float32), (16, 32))
    mask, priority = np.ones((16, 32)), rng.integers(0, 2**32, (16, 32), dtype=np.uint32)
    expected = run_largest(exact, mask, 200, priority)
    for _ in range(5):
        noisy = (exact.view(np.int32) + rng.integers(-200, 200, exact.shape, dtype=np.int32)).view(np.float32)
        np.testing.assert_array_equal(run_largest(noisy, mask, 200, priority), expected)


def test_priority_depends_on_the_rollout_and_the_position_only():
    key, rollout = jax.random.key(3), np.array([5, 0, 2**31, 7], np.uint32)
    priority = np.asarray(token_priority(key, rollout, 40))
    assert (priority.shape, priority.dtype) == ((4, 40), np.uint32)
    np.testing.assert_array_equal(token_priority(key, rollout[[2, 0]], 17), priority[[2, 0], :17])
    assert len(np.unique(priority)) == 160
    assert not np.any(priority == np.asarray(token_priority(jax.random.key(4), rollout, 40)))
    assert abs(priority.mean() / 2**32 - 0.5) < 0.1


def select(logp, old_logp, advantages, mask, rollout, entropy):
    """All that is selected, from the rows of a mini-batch."""
    priority = token_priority(jax.random.key(1), rollout, logp.shape[1])
    return {
        "largest": largest(jnp.round(entropy * 4), mask, 37, priority),
        "fork": fork_tokens(entropy, mask, 0.2)[0],
        "threshold": fork_tokens(entropy, mask, 0.2)[1],
        "clip_cov": clip_cov_tokens(logp, old_logp, advantages, mask, priority, **CLIP_COV),
        "kl_cov": kl_cov_tokens(logp, advantages, mask, priority, fraction=0.1),
    }


run_select = jax.jit(select)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_rows_does_not_matter(seed):
    batch = random_batch(seed=seed)
    strided = np.arange(16).reshape(4, 4).T.ravel()  # as the update splits into micro-batches
    expected = run_select(*batch)
    for order in (np.random.default_rng(seed).permutation(16), strided):
        got = run_select(*(x[order] for x in batch))
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value if name == "threshold" else value[order], err_msg=name)
    assert all(np.any(x) and not np.all(x) for name, x in expected.items() if name != "threshold")


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4)])
def test_one_device_and_eight_select_the_same(mesh):
    rows = sharding(make_mesh(mesh), "batch")
    for seed in range(3):
        batch = random_batch(seed=seed)
        sharded = run_select(*(jax.device_put(x, rows) for x in batch))
        jax.tree.map(np.testing.assert_array_equal, sharded, run_select(*batch))


def test_no_sort_and_no_gather():
    operations = set(re.findall(r" = (\w+)", str(jax.make_jaxpr(select)(*random_batch()))))
    assert {"lt", "reduce_sum", "bitcast_convert_type"} <= operations  # the names are found
    assert not operations & {"sort", "gather", "cumsum", "top_k", "argmax"}


@pytest.mark.parametrize("fraction", [0.2, 0.0002, 0.002, 0.1, 0.25, 0.8, 1.0])
def test_counts_are_those_of_exact_arithmetic(fraction):
    rng = np.random.default_rng(0)
    step = round(1 / fraction)
    near_whole = step * rng.integers(0, 2**24 // step, 10_000)[:, None] + np.array([-1, 0, 1])
    tokens = np.concatenate([np.arange(70_000), near_whole.ravel().clip(0), rng.integers(0, 2**31 - 1, 10_000)])
    ours = jax.jit(lambda n: _part(_fraction("", fraction), n))(tokens.astype(np.int32))
    np.testing.assert_array_equal(ours, [int(fraction * n) for n in tokens.tolist()])


def test_counts_of_other_fractions():
    # What is written as 0.29 is 29 of 100, where int(0.29 * 100) is 28.
    for fraction, tokens, count in [(0.29, 100, 29), (0.123456, 10**6, 123456), (1 / 3, 3000, 1000), (1e-12, 10**9, 0)]:
        assert int(_part(_fraction("", fraction), jnp.int32(tokens))) == count
    for fraction in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"kl_cov_tokens: fraction = .*\(0, 1\]"):
            kl_cov_tokens(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), fraction=fraction)


def test_fork_tokens_by_hand():
    entropy = jnp.array([[0.125, 2.0, 0.5], [2.0, 9.0, 1.0], [-1e-7, 0.0, jnp.nan]])
    mask = jnp.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]])
    # Seven tokens: 2, 2, 1, 0.5, 0.125, 0, -1e-7. The ceil(7 f)-th of them is the threshold.
    for fraction, threshold, count in [(0.01, 2.0, 2), (2 / 7, 2.0, 2), (0.3, 1.0, 3), (0.5, 0.5, 4), (0.86, -1e-7, 7)]:
        keep, tau = fork_tokens(entropy, mask, fraction)
        np.testing.assert_allclose(tau, threshold, rtol=2e-4)
        np.testing.assert_array_equal(keep, (np.asarray(entropy) >= tau) & (np.asarray(mask) > 0))
        assert np.sum(keep) == count
    keep, tau = fork_tokens(entropy, mask * 0, 0.2)
    assert not np.any(keep)
    assert tau == 0.0
    with pytest.raises(ValueError, match=r"fork_tokens: fraction = 0"):
        fork_tokens(entropy, mask, 0.0)


def test_fork_tokens_take_in_what_ties_with_the_last():
    rng = np.random.default_rng(0)
    entropy = rng.uniform(0, 3, (64, 32)).astype(np.float32)
    mask = rng.random((64, 32)) < 0.7
    keep, tau = fork_tokens(entropy, mask, 0.2)
    count, top = -(-mask.sum() // 5), np.sort(entropy[mask])[::-1]
    assert top[count - 1] * (1 - 2**-13) <= tau <= top[count - 1]
    np.testing.assert_array_equal(keep, (entropy >= tau) & mask)


def test_covariance_by_hand():
    # Tokens with (A, logp): (1, -1), (1, -3), (-2, -2); means 0 and -2: products 1, -1, 0. The fourth is padding.
    logp = jnp.array([[-1.0, -3.0], [-2.0, jnp.nan]])
    advantages, mask = jnp.array([[1.0], [-2.0]]), jnp.array([[1, 1], [1, 0]])
    np.testing.assert_allclose(covariance(logp, advantages, mask), [[1, -1], [0, 0]], atol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(covariance(x, advantages, mask)))(logp)
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))
    np.testing.assert_array_equal(covariance(logp, advantages, mask * 0), np.zeros((2, 2)))
    with jax.enable_x64(True):
        assert covariance(np.zeros((2, 2)), np.zeros((2, 2)), mask).dtype == jnp.float64


def test_kl_cov_and_clip_cov_by_hand():
    # All advantages but the last are 1, so the covariances rise with logp = -3 .. 2 (mean -1/2), and A - mean A = 1/3:
    # -5/6, -1/2, -1/6, 1/6, 1/2; the last is (-1 - 2/3) * 5/2 < 0.
    logp = jnp.arange(-3.0, 3.0).reshape(2, 3)
    advantages, mask = jnp.array([[1.0, 1, 1], [1, 1, -1]]), jnp.ones((2, 3))
    priority = jnp.array([[0, 1, 2], [9, 3, 4]], jnp.uint32)
    # floor(0.4 * 6) = 2 tokens; 0.1 of them is none, but one is taken.
    taken = run_kl_cov(logp, advantages, mask, priority, fraction=0.4)
    np.testing.assert_array_equal(taken, [[0, 0, 0], [1, 1, 0]])
    taken = run_kl_cov(logp, advantages, mask, priority, fraction=0.1)
    np.testing.assert_array_equal(taken, [[0, 0, 0], [0, 1, 0]])
    clip = partial(run_clip_cov, clip=Clip(0.2, 0.2), low=-0.6, high=0.4)
    # Between -0.6 and 0.4: the tokens 1, 2 and 3, of priorities 1, 2 and 9. Ratios are 1, but then token 1 is clipped.
    for old, expected in [(logp, [[0, 1, 1], [0, 0, 0]]), (logp.at[0, 1].add(-1.0), [[0, 0, 1], [1, 0, 0]])]:
        taken = clip(logp, old, advantages, mask, priority, fraction=0.4)
        np.testing.assert_array_equal(taken, expected)
    # A token whose ratio is low has a gradient while its advantage is positive; no clip, nothing is clipped.
    taken = clip(logp, logp.at[0, 1].add(1.0), advantages, mask, priority, fraction=0.1)
    np.testing.assert_array_equal(taken, [[0, 1, 0], [0, 0, 0]])
    off = partial(run_clip_cov, clip=Clip(None, None), low=-0.6, high=0.4)
    np.testing.assert_array_equal(off(logp, logp - 1, advantages, mask, priority, fraction=0.1), taken)
    for taken in (
        clip(logp, logp, advantages, mask * 0, priority, fraction=1.0),
        clip_cov_tokens(logp, logp, advantages, mask, priority, Clip(0, 0), fraction=1.0, low=5, high=9),
        kl_cov_tokens(logp, advantages, mask * 0, priority, fraction=1.0),
    ):
        assert not np.any(taken)


def released(case, inputs, mask, priority):
    """(clip and terms of policy_loss, what the released function returns next to the loss) for one golden case."""
    params, (logp, old_logp, advantages) = case["params"], inputs
    method = params.get("loss_method") or case["loss"]
    cov = covariance(logp, advantages, mask)
    ppo = ("objective/clip_fraction", "objective/kl_old_new", "objective/dual_clip_fraction")
    if case["loss"] == "vanilla":  # the authors' integration: both clips stay on, constants instead of settings
        clip = Clip(params["cliprange_low"], params["cliprange_high"], params["clip_ratio_c"])
        if method == "clip_cov":  # a share of the candidates, which may be clipped already
            candidates = mask & (cov > 1.0) & (cov < 5.0)
            count = max(1, int(0.0002 * int(candidates.sum())))
            return clip, TokenTerms(keep=~run_largest(jnp.zeros_like(cov), candidates, count, priority)), ppo
        if method == "kl_cov":  # by absolute covariance
            count = max(1, int(0.0002 * int(mask.sum())))
            return clip, TokenTerms(kl_coef=1.0 * run_largest(jnp.abs(cov), mask, count, priority)), ppo
        assert method == "entro_loss"  # -logp of the taken token in place of the entropy
        return clip, TokenTerms(bonus=-0.001 * logp), ppo
    if method == "clip_cov":
        clip = Clip(*(params.get(f"clip_ratio_{side}", params["clip_ratio"]) for side in ("low", "high")))
        bounds = {"fraction": params["clip_cov_ratio"], "low": params["clip_cov_lb"], "high": params["clip_cov_ub"]}
        detached = run_clip_cov(logp, old_logp, advantages, mask, priority, clip, **bounds)
        return clip, TokenTerms(keep=~detached), (float(detached.sum() / mask.sum()), "objective/kl_old_new", 0.0)
    assert method == "kl_cov"
    chosen = run_kl_cov(logp, advantages, mask, priority, fraction=params["kl_cov_ratio"])
    return Clip(None, None), TokenTerms(kl_coef=params["ppo_kl_coef"] * chosen), (0.0, "objective/kl_abs", 0.0)


@pytest.mark.shared
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-7), (False, 2e-5)])
def test_golden_losses_of_selected_tokens(shared, x64, tolerance):
    """Released losses, metrics and gradients. Their random choice is the first in row-major order.

    `seq-mean-token-sum-norm` is a sum over rows there, in spite of its name, and a mean here.
    """
    cases = json.loads((shared / "golden" / "manifest.json").read_text())["files"]["policy_loss.npz"]["cases"]
    checked = []
    with np.load(shared / "golden" / "policy_loss.npz") as arrays, jax.enable_x64(x64):
        for case in cases:
            if case["loss"] == "gpg" or (case["loss"] == "vanilla" and not case["params"].get("loss_method")):
                continue
            read = {name: arrays[f"{case['case']:03d}/{name}"] for name in ("out", "grad_log_prob", "mask")}
            names = ("log_prob", "old_log_prob", "advantages")
            dtype = np.float64 if x64 else np.float32
            inputs = [jnp.asarray(arrays[f"{case['case']:03d}/{k}"], dtype) for k in names]
            mask = jnp.asarray(read["mask"] > 0)
            priority = jnp.arange(mask.size, dtype=jnp.uint32).reshape(mask.shape)

            clip, terms, returned = released(case, inputs, mask, priority)

            def f(logp, case=case, inputs=inputs, mask=mask, clip=clip, terms=terms, returned=returned):
                if terms.bonus is not None:  # its gradient flows
                    terms = terms._replace(bonus=-0.001 * logp)
                loss, metrics = policy_loss(logp, *inputs[1:], mask, clip, aggregation=case["agg"], terms=terms)
                return loss, [metrics[x] if isinstance(x, str) else x for x in returned]

            (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(inputs[0])
            out, expected_grad, message = read["out"], read["grad_log_prob"], f"case {case['case']}"
            if case["agg"] == "seq-mean-token-sum-norm":
                out, expected_grad = np.array([out[0] / len(mask), *out[1:]]), expected_grad / len(mask)
            np.testing.assert_allclose([loss, *metrics], out, tolerance, tolerance, err_msg=message)
            np.testing.assert_allclose(grad, expected_grad, tolerance, tolerance, err_msg=message)
            checked.append((case["loss"], case["params"].get("loss_method"), case["agg"]))
    assert len(set(checked)) == len(checked) == 20
