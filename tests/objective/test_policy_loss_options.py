"""The options of the policy loss: by hand, in micro-batches of unequal groups, and blind to the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policy_loss import CLIP, random_batch

from dynamo_jax.objective import (
    Clip,
    TokenTerms,
    clip_cov_tokens,
    denominators,
    fork_tokens,
    group_weight,
    kl_cov_tokens,
    log_ratio,
    policy_loss,
    token_priority,
)

NO_CLIP = Clip(None, None)


def priority(mask):
    return token_priority(jax.random.key(0), jnp.arange(mask.shape[0]), mask.shape[1])


# Every option of the loss, made from (logp, old_logp, advantages, mask, entropy) of the whole mini-batch.
OPTIONS = {
    "gspo": lambda *b: {"ratio": "sequence"},
    "fork": lambda *b: {"keep": fork_tokens(b[4], b[3], 0.2)[0]},
    "clip_cov": lambda *b: {"keep": ~clip_cov_tokens(*b[:4], priority(b[3]), CLIP, fraction=0.1, low=0, high=2)},
    "kl_cov": lambda *b: {
        "kl_coef": 0.7 * kl_cov_tokens(b[0], b[2], b[3], priority(b[3]), fraction=0.2),
        "clip": NO_CLIP,
    },
    "group_weight": lambda *b: {"weight": group_weight(jnp.array([0, 0, 0, 0, 1, 1, 2, 3]), 3, "prompt")[:, None]},
    "entropy": lambda *b: {"bonus": 0.3 * b[4]},
}
OPTIONS["all"] = lambda *b: {k: v for name in OPTIONS if name != "all" for k, v in OPTIONS[name](*b).items()}


def micro_batches(tree, rows):
    """Row i to micro-batch i modulo their number."""
    return jax.tree.map(lambda x: jnp.stack([x[i :: len(x) // rows] for i in range(len(x) // rows)]), tree)


def loss_of(logp, entropy, rest, arrays, settings, aggregation, whole=None):
    if "bonus" in arrays:
        arrays = arrays | {"bonus": 0.3 * entropy}
    settings = {"aggregation": aggregation, "denominators": whole, "clip": CLIP} | settings
    return policy_loss(logp, *rest, **settings, terms=TokenTerms(**arrays))


@pytest.mark.parametrize(
    ("option", "aggregation"), [*((o, "token-mean") for o in OPTIONS), ("all", "seq-mean-token-mean")]
)
def test_micro_batches_of_every_option_add_up_to_the_whole(option, aggregation):
    logp, *rest = random_batch()
    entropy = -0.6 * logp
    options = OPTIONS[option](logp, *rest, entropy)
    arrays = {k: v for k, v in options.items() if k in TokenTerms._fields}
    settings = {k: v for k, v in options.items() if k not in TokenTerms._fields}

    @jax.jit
    def run(logp, entropy, rest, arrays, whole):
        f = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        return f(logp, entropy, rest, arrays, settings, aggregation, whole)

    whole, whole_grads = run(logp, entropy, rest, arrays, None)
    assert np.abs(whole_grads[0]).max() > 0
    of_whole = denominators(rest[2], aggregation)
    micro = micro_batches((logp, entropy, rest, arrays), 2)
    outputs = [run(*jax.tree.map(lambda x, i=i: x[i], micro), of_whole) for i in range(4)]
    total = jax.tree.map(lambda *xs: sum(xs), *[value for value, _ in outputs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), total, whole)
    for i, (_, grads) in enumerate(outputs):
        for grad, expected in zip(grads, micro_batches(whole_grads, 2), strict=True):
            np.testing.assert_allclose(grad, expected[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", OPTIONS)
def test_padding_is_never_read_by_any_option(option):
    logp, old_logp, advantages, mask = random_batch()
    mask = mask.at[2].set(False)
    advantages = jnp.broadcast_to(advantages, logp.shape)
    options = OPTIONS[option](logp, old_logp, advantages, mask, -0.6 * logp)
    arrays = {k: jnp.broadcast_to(v, logp.shape) for k, v in options.items() if k in TokenTerms._fields}
    settings = {k: v for k, v in options.items() if k not in TokenTerms._fields}

    @jax.jit
    def run(logp, entropy, rest, arrays):
        f = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        return f(logp, entropy, (*rest, mask), arrays, settings, "token-mean")

    clean = run(logp, -0.6 * logp, (old_logp, advantages), arrays)
    for bad in (jnp.nan, 1e30):
        batch = (logp, -0.6 * logp, (old_logp, advantages), arrays)
        dirty = run(*jax.tree.map(lambda x, bad=bad: jnp.where(mask, x, bad).astype(x.dtype), batch))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))


def test_sequence_ratio_by_hand():
    # Row 0: log ratios 0.2, -0.6, 0.1 (mean -0.1), A = 2. Row 1: 0.5, 0.3 (mean 0.4, above log 1.2), A = 1: clipped.
    difference = jnp.array([[0.2, -0.6, 0.1], [0.5, 0.3, 9.0]])
    old_logp, advantages = jnp.full((2, 3), -1.0), jnp.array([[2.0], [1.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])

    def f(logp, aggregation="seq-mean-token-mean"):
        return policy_loss(logp, old_logp, advantages, mask, CLIP, ratio="sequence", aggregation=aggregation)

    (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(old_logp + difference)
    s = np.exp(-0.1)
    np.testing.assert_allclose(loss, (-2 * s - 1.2) / 2, rtol=1e-6)
    # d/dlogp_t of -2 s / 2, s = exp(mean): each of the three tokens gets -s / 3. The clipped row gets nothing.
    np.testing.assert_allclose(grad, [[-s / 3] * 3, [0.0] * 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/clip_fraction"], 2 / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl_old_new"], (0.3 - 0.8) / 5, rtol=1e-6)
    np.testing.assert_allclose(f(old_logp + difference, "token-mean")[0], (-6 * s - 2.4) / 5, rtol=1e-6)

    np.testing.assert_allclose(
        log_ratio(old_logp + difference, old_logp, mask, "sequence"), [[-0.1] * 3, [0.4, 0.4, 0.0]], rtol=1e-5
    )
    np.testing.assert_array_equal(log_ratio(old_logp * 100, old_logp, mask, "sequence")[0], np.full(3, -20.0))
    np.testing.assert_allclose(log_ratio(old_logp + difference, old_logp, mask, "token"), difference * mask, rtol=1e-5)


def test_sequence_ratio_has_the_gradient_of_its_definition():
    logp, old_logp, advantages, mask = random_batch()

    def direct(logp):  # GSPO, Eq. 5 and 7: one clipped term a sequence
        length = jnp.sum(mask, axis=-1)
        s = jnp.exp(jnp.sum((logp - old_logp) * mask, axis=-1) / length)
        terms = jnp.minimum(s * advantages[:, 0], jnp.clip(s, 0.8, 1.2) * advantages[:, 0])
        return -jnp.mean(terms)

    def ours(logp):
        rest = (old_logp, advantages, mask)
        return policy_loss(logp, *rest, CLIP, ratio="sequence", aggregation="seq-mean-token-mean")[0]

    for a, b in zip(jax.value_and_grad(ours)(logp), jax.value_and_grad(direct)(logp), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_options_by_hand():
    # Ratios 1, 1.1, 0.9, 1; A = 1: losses -1, -1.1, -0.9, -1, and their gradients are the same numbers, over 4 tokens.
    ratio = np.array([[1.0, 1.1], [0.9, 1.0]])
    logp = jnp.asarray(np.log(ratio), jnp.float32)
    ones, mask = jnp.ones((2, 2)), jnp.ones((2, 2))
    zero, entropy = jnp.zeros((2, 2)), jnp.array([[0.5, 1.0], [1.5, 2.0]])

    def run(coefficient=None, **terms):
        def f(logp, entropy):
            bonus = None if coefficient is None else coefficient * entropy
            return policy_loss(logp, zero, ones, mask, CLIP, terms=TokenTerms(**terms, bonus=bonus))

        (loss, metrics), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(logp, entropy)
        return loss, metrics, *grads

    plain, metrics, grad, _ = run()
    np.testing.assert_allclose(plain, -1.0, rtol=1e-6)
    assert {name.split("/")[1] for name in metrics} == {"clip_fraction", "dual_clip_fraction", "kl_old_new"}

    keep = np.array([[True, False], [True, True]])
    loss, kept, grad_kept, _ = run(keep=jnp.asarray(keep))
    np.testing.assert_allclose(loss, -2.9 / 4, rtol=1e-6)  # still over 4 tokens
    np.testing.assert_allclose(grad_kept, np.where(keep, grad, 0.0), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, metrics)

    loss, _, grad_weighted, _ = run(weight=jnp.array([[2.0], [0.5]]))
    np.testing.assert_allclose(loss, -(2 * 2.1 + 0.5 * 1.9) / 4, rtol=1e-6)
    np.testing.assert_allclose(grad_weighted, grad * np.array([[2.0], [0.5]]), rtol=1e-6)

    # 0.5 |log r| on the first row: nothing at a ratio of exactly 1, not even a gradient.
    loss, metrics, grad_kl, _ = run(kl_coef=jnp.array([[0.5, 0.5], [0.0, 0.0]]))
    np.testing.assert_allclose(loss, (-4 + 0.5 * np.log(1.1)) / 4, rtol=1e-6)
    np.testing.assert_allclose(grad_kl, grad + np.array([[0, 0.5], [0, 0]]) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl_abs"], (np.log(1.1) - np.log(0.9)) / 4, rtol=1e-6)

    # The bonus also counts where the policy loss does not.
    loss, metrics, grad_logp, grad_entropy = run(0.1, keep=jnp.asarray(keep))
    np.testing.assert_allclose(loss, (-2.9 - 0.1 * 5.0) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/entropy_bonus"], 0.1 * 5.0 / 4, rtol=1e-6)
    np.testing.assert_allclose(grad_logp, grad_kept, rtol=1e-6)
    np.testing.assert_allclose(grad_entropy, np.full((2, 2), -0.1 / 4), rtol=1e-6)

    # No clip: a ratio of 3 costs what it is.
    f = jax.value_and_grad(lambda x: policy_loss(x, zero, ones, mask, NO_CLIP), has_aux=True)
    (loss, metrics), grad = f(jnp.full((2, 2), np.log(3.0), jnp.float32))
    np.testing.assert_allclose(loss, -3.0, rtol=1e-6)
    np.testing.assert_allclose(grad, np.full((2, 2), -0.75), rtol=1e-6)
    assert metrics["objective/clip_fraction"] == 0.0


def test_bad_options_are_refused():
    batch = random_batch()
    for options, message in [
        ({"ratio": "row"}, "'row'; choose one of token, sequence"),
        ({"terms": TokenTerms(keep=batch[3][0])}, r"keep has shape \(6,\)"),
        ({"terms": TokenTerms(bonus=batch[0][:, :1])}, r"bonus has shape \(8, 1\); give \(8, 6\)"),
        ({"terms": TokenTerms(weight=jnp.ones(8))}, r"weight has shape \(8,\); give \(8, 6\) or \(8, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy_loss(*batch, CLIP, **options)
