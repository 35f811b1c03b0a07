"""The clipped loss: by hand, against the released code with gradients, in micro-batches, on degenerate masks."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.config.choices import Aggregation
from dynamo_jax.objective import Clip, denominators, policy_loss
from dynamo_jax.objective.policy_loss import aggregate

AGGREGATIONS = get_args(Aggregation)

METRICS = ("objective/clip_fraction", "objective/kl_old_new", "objective/dual_clip_fraction")
CLIP = Clip(0.2, 0.2)


def random_batch(M=8, C=6, seed=0):
    rng = np.random.default_rng(seed)
    logp = rng.uniform(-3, -0.1, (M, C)).astype(np.float32)
    old_logp = (logp + rng.normal(0, 0.4, (M, C))).astype(np.float32)
    advantages = rng.normal(0, 1, (M, 1)).astype(np.float32)
    mask = np.arange(C) < rng.integers(1, C + 1, (M, 1))
    return tuple(jnp.asarray(x) for x in (logp, old_logp, advantages, mask))


def test_by_hand():
    ratio = np.array([[1.0, 1.5, 0.5, 1.1], [1.0, 0.5, 1.5, 12.0]])
    logp = jnp.asarray(np.log(ratio), jnp.float32)
    advantages = jnp.array([[2.0], [-1.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    # A = 2:  -2, then 1.5 is clipped to 1.2: -2.4, then max(-1, -1.6) = -1 (the clip does not decide), then padding.
    # A = -1: 1, then max(0.5, 0.8) = 0.8 (clipped), then max(1.5, 1.2) = 1.5, then 12 is dual-clipped to 10.
    losses = np.array([[-2.0, -2.4, -1.0, 0.0], [1.0, 0.8, 1.5, 10.0]])
    expected = {
        "token-mean": losses.sum() / 7,
        "seq-mean-token-sum": losses.sum() / 2,
        "seq-mean-token-mean": (losses[0].sum() / 3 + losses[1].sum() / 4) / 2,
        "seq-mean-token-sum-norm": losses.sum() / 4 / 2,
    }
    # The gradient to logp is -A r where nothing is clipped.
    slope = np.array([[-2.0, 0.0, -1.0, 0.0], [1.0, 0.0, 1.5, 0.0]])
    for aggregation, value in expected.items():

        def f(logp, aggregation=aggregation):
            zero = jnp.zeros_like(logp)
            return policy_loss(logp, zero, advantages, mask, Clip(0.2, 0.2, 10.0), aggregation=aggregation)

        (loss, metrics), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(logp)
        np.testing.assert_allclose(loss, value, rtol=1e-6)
        if aggregation == "token-mean":
            np.testing.assert_allclose(grad, slope / 7, rtol=1e-6)
        np.testing.assert_allclose(metrics["objective/clip_fraction"], 2 / 7, rtol=1e-6)
        np.testing.assert_allclose(metrics["objective/dual_clip_fraction"], 1 / 7, rtol=1e-6)
        # Of the counted tokens: -(log 1.5 + log 0.5 + log 0.5 + log 1.5 + log 12) / 7.
        np.testing.assert_allclose(metrics["objective/kl_old_new"], -np.log(1.5**2 * 0.5**2 * 12) / 7, rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(aggregation):
    batch = random_batch()
    batch = (*batch[:3], batch[3].at[jnp.array([1, 3, 6])].set(False))  # one micro-batch is empty

    def f(logp, rest, whole):
        return policy_loss(logp, *rest, Clip(0.2, 0.2, 3.0), aggregation=aggregation, denominators=whole)

    value_and_grad = jax.jit(jax.value_and_grad(f, has_aux=True))
    whole, whole_grad = value_and_grad(batch[0], batch[1:], None)
    of_whole = denominators(batch[3], aggregation)
    parts = [[x[rows] for x in batch] for rows in (slice(0, 3), slice(3, 4), slice(4, 8))]
    outputs = [value_and_grad(part[0], part[1:], of_whole) for part in parts]
    total = jax.tree.map(lambda *xs: sum(xs), *[value for value, _ in outputs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), total, whole)
    np.testing.assert_allclose(jnp.concatenate([grad for _, grad in outputs]), whole_grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_neither_more_of_the_same_rows_nor_empty_ones_change_the_loss(aggregation):
    batch = random_batch()

    @jax.jit
    def run(logp, *rest):
        def f(logp):
            return policy_loss(logp, *rest, CLIP, aggregation=aggregation)

        (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(logp)
        return loss, metrics, grad

    def compare(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

    loss, metrics, grad = run(*batch)
    for times in (2, 8):
        more = run(*(jnp.tile(x, (times, 1)) for x in batch))
        jax.tree.map(compare, more[:2], (loss, metrics))
        compare(more[2], np.tile(grad / times, (times, 1)))
    # Six of eight rows, as when dynamic sampling finds too few groups to train on.
    two = run(*(x[:2] for x in batch))
    padded = run(*batch[:3], batch[3].at[2:].set(False))
    jax.tree.map(compare, padded[:2], two[:2])
    compare(padded[2][:2], two[2])
    np.testing.assert_array_equal(padded[2][2:], 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_is_never_read(aggregation):
    logp, old_logp, advantages, mask = random_batch()
    mask = mask.at[2].set(False)
    advantages = jnp.broadcast_to(advantages, logp.shape)

    def f(logp, old_logp, advantages):
        return policy_loss(logp, old_logp, advantages, mask, Clip(0.2, 0.2, 3.0), aggregation=aggregation)

    run = jax.jit(jax.value_and_grad(f, has_aux=True))
    clean = run(logp, old_logp, advantages)
    for bad in (jnp.nan, -jnp.inf, 1e30):
        dirty = run(*(jnp.where(mask, x, bad) for x in (logp, old_logp, advantages)))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.isfinite(clean[0][0])
    np.testing.assert_array_equal(clean[1][~mask], 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_mask_and_extreme_ratios_are_finite(aggregation):
    logp, old_logp, advantages, mask = random_batch()

    def f(logp, old_logp, mask):
        return policy_loss(logp, old_logp, advantages, mask, CLIP, aggregation=aggregation)

    run = jax.jit(jax.value_and_grad(f, has_aux=True))
    empty = run(logp, old_logp, mask & False)
    assert all(np.all(np.asarray(x) == 0.0) for x in jax.tree.leaves(empty))
    for old in (old_logp - 500, old_logp + 500):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(logp, old, mask)))


def test_gradient_flows_through_logp_only():
    logp, old_logp, advantages, mask = random_batch()
    f = jax.grad(lambda *args: policy_loss(*args, mask, CLIP)[0], argnums=(0, 1, 2))
    to_logp, *others = f(logp, old_logp, advantages)
    assert np.abs(to_logp).max() > 0
    for grad in others:
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))
    low = logp.astype(jnp.bfloat16)
    loss, metrics = policy_loss(low, low, low, mask, CLIP)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype("float32")}


def test_bad_arguments_are_refused():
    batch = random_batch()
    with pytest.raises(ValueError, match=r"'mean'.*token-mean, seq-mean-token-sum"):
        policy_loss(*batch, CLIP, aggregation="mean")
    with pytest.raises(ValueError, match="'mean'"):
        denominators(batch[3], "mean")
    with pytest.raises(ValueError, match=r"advantages \(8,\)"):
        policy_loss(batch[0], batch[1], batch[2][:, 0], batch[3], CLIP)


def golden(shared, name, x64):
    """(case, {array name: array}) of each case; floating inputs in the dtype of the run."""
    cases = json.loads((shared / "golden" / "manifest.json").read_text())["files"][name]["cases"]
    with np.load(shared / "golden" / name) as arrays, jax.enable_x64(x64):
        for case in cases:
            prefix = f"{case['case']:03d}/"
            yield case, {key[len(prefix) :]: arrays[key] for key in arrays.files if key.startswith(prefix)}


@pytest.mark.shared
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-7), (False, 2e-5)])
def test_golden_loss(shared, x64, tolerance):
    """Released loss, metrics and gradient for each plain clipped case, but for two things that are mended here:

    `seq-mean-token-sum-norm` is a sum over rows there, in spite of its name, and a mean here; and a row without tokens
    makes the loss nan there, where here it does not count.
    """
    dtype = np.float64 if x64 else np.float32
    aggregations, guarded = set(), 0
    for case, arrays in golden(shared, "policy_loss.npz", x64):
        params = case["params"]
        if case["loss"] != "vanilla" or params.get("loss_method"):
            continue
        inputs = [jnp.asarray(arrays[k], dtype) for k in ("log_prob", "old_log_prob", "advantages")]
        mask = arrays["mask"].astype(bool)

        def f(logp, inputs=inputs, mask=mask, params=params, case=case):
            low, high = (params.get(f"cliprange_{side}", params["cliprange"]) for side in ("low", "high"))
            clip = Clip(low, high, params["clip_ratio_c"])
            return policy_loss(logp, *inputs[1:], jnp.asarray(mask), clip, aggregation=case["agg"])

        (loss, metrics), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(inputs[0])
        assert loss.dtype == dtype
        out, expected_grad = arrays["out"], arrays["grad_log_prob"]
        if case["agg"] == "seq-mean-token-sum-norm":
            out, expected_grad = np.array([out[0] / len(mask), *out[1:]]), expected_grad / len(mask)
        if case["official_loss_is_nan"]:
            # Gradients of rows with tokens are defined there too, but over all rows.
            rows = mask.any(-1)
            means = [arrays["loss_mat"][r][mask[r]].mean() for r in np.flatnonzero(rows)]
            out = np.array([np.mean(means), *out[1:]])
            grad, expected_grad = np.asarray(grad)[rows], expected_grad[rows] * len(rows) / rows.sum()
            guarded += 1
        message = f"case {case['case']}"
        ours = [loss, *(metrics[m] for m in METRICS)]
        np.testing.assert_allclose(ours, out, tolerance, tolerance, err_msg=message)
        np.testing.assert_allclose(grad, expected_grad, tolerance, tolerance, err_msg=message)
        aggregations.add(case["agg"])
    assert aggregations == set(AGGREGATIONS)
    assert guarded == 1


@pytest.mark.shared
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-7), (False, 2e-5)])
def test_golden_aggregation(shared, x64, tolerance):
    for case, arrays in golden(shared, "agg_kl.npz", x64):
        values = jnp.asarray(arrays["loss_mat"], np.float64 if x64 else np.float32)
        mask = jnp.asarray(arrays["mask"])
        out, grad = jax.jit(jax.value_and_grad(aggregate), static_argnums=2)(values, mask, case["agg"])
        np.testing.assert_allclose(out, arrays["out"], tolerance, tolerance)
        np.testing.assert_allclose(grad, arrays["grad"], tolerance, tolerance)


@pytest.mark.shared
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-7), (False, 2e-5)])
def test_golden_loss_of_modulated_advantages(shared, x64, tolerance):
    """The loss of the released actor with its modulated advantages, and the gradient that reaches the log-probs."""
    dtype = np.float64 if x64 else np.float32

    @jax.jit
    def run(logp, old_logp, advantages, mask, clip_low, clip_high):
        def f(logp):
            return policy_loss(logp, old_logp, advantages, mask, Clip(clip_low, clip_high, 10.0))

        return jax.value_and_grad(f, has_aux=True)(logp)

    for case, arrays in golden(shared, "modulation.npz", x64):
        assert (case["clip_ratio_c"], case["agg"]) == (10.0, "token-mean")
        # One shape for all cases, so that the program compiles once; token-mean does not see padding.
        inside = tuple(slice(n) for n in arrays["mask"].shape)
        inputs = [np.zeros((8, 64), dtype) for _ in range(4)]
        for x, name in zip(inputs, ("log_prob", "old_log_prob", "mod_advantages", "mask"), strict=True):
            x[inside] = arrays[name]
        (loss, metrics), grad = run(*inputs, *(case["clip_effective"][side] for side in ("low", "high")))
        message = f"case {case['case']}"
        ours = [loss, *(metrics[m] for m in METRICS)]
        np.testing.assert_allclose(ours, arrays["loss"], tolerance, tolerance, err_msg=message)
        np.testing.assert_allclose(grad[inside], arrays["grad_log_prob"], tolerance, tolerance, err_msg=message)
