"""token_stats: reference and chunked against float64 numpy, values and gradients; nothing of size [T, V] in chunked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynamo_jax.kernels import token_stats

D = 16


def inputs(T, V, dtype, scale=10.0, seed=0):
    """Hidden states, head, targets, cotangents for logp and entropy. `scale` is the size of the largest logit."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    hidden *= scale / np.abs(hidden @ head.T).max()
    hidden, head = jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    targets = jnp.asarray(rng.integers(0, V, T), jnp.int32)
    g_logp, g_entropy = rng.normal(size=(2, T)).astype(np.float32)
    return hidden, head, targets, g_logp, g_entropy


def in_float64(hidden, head, targets, g_logp, g_entropy, temperature):
    """Values and gradients by the textbook: logp, entropy, lambda_mean, d_hidden, d_head."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    z = hidden @ head.T / temperature
    u = z - z.max(-1, keepdims=True)
    logp = u - np.log(np.exp(u).sum(-1, keepdims=True))
    p = np.exp(logp)
    H = -(p * logp).sum(-1)
    rows = np.arange(len(targets))
    one_hot = np.zeros_like(p)
    one_hot[rows, targets] = 1.0
    # d logp / dz = one_hot - p; dH / dz = -p (log p + H).
    dz = (g_logp[:, None] * (one_hot - p) - g_entropy[:, None] * p * (logp + H[:, None])) / temperature
    return logp[rows, targets], H, (p**2 * (logp + H[:, None])).sum(-1), dz @ head, dz.T @ hidden


def value_and_gradients(hidden, head, targets, g_logp, g_entropy, temperature, **options):
    def f(hidden, head):
        stats = token_stats(hidden, head, targets, temperature, **options)
        # lambda_mean is in the sum to show that its gradient is none.
        return jnp.sum(g_logp * stats.logp + g_entropy * stats.entropy + 7.0 * stats.lambda_mean), stats

    (_, stats), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, head)
    return (*stats, *grads)


IMPLEMENTATIONS = [
    pytest.param({"impl": "reference"}, id="reference"),
    pytest.param({"impl": "chunked"}, id="chunked, one chunk"),
    pytest.param({"impl": "chunked", "blocks": (8, 4096)}, id="chunked, 8 tokens at a time"),
    pytest.param({"impl": "auto", "blocks": (21, 100)}, id="chunked, 100 columns"),
]


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize("V", [1, 11, 151, 2051])
@pytest.mark.parametrize(("temperature", "scale"), [(0.7, 10.0), (1.0, 50.0)])
def test_float32_against_float64(options, V, temperature, scale):
    args = inputs(21, V, jnp.float32, scale)  # 21: not a multiple of any chunk but one
    names = ("logp", "entropy", "lambda_mean", "d_hidden", "d_head")
    # Of the largest value of the array, at least of 1.
    limits = {"logp": 1e-5, "entropy": 1e-5, "lambda_mean": 5e-6, "d_hidden": 3e-6, "d_head": 3e-6}
    ours, expected = value_and_gradients(*args, temperature, **options), in_float64(*args, temperature)
    for name, x, y in zip(names, ours, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=limits[name] * max(1.0, np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize("V", [11, 2051])
def test_bfloat16_against_float64(options, V):
    args = inputs(21, V, jnp.bfloat16)
    *stats, d_hidden, d_head = value_and_gradients(*args, 0.7, **options)
    *expected, expected_d_hidden, expected_d_head = in_float64(*args, 0.7)
    # Products of bfloat16 are exact in float32, so values are as good as with float32 inputs.
    for x, y in zip(stats, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))
    for x, y in ((d_hidden, expected_d_hidden), (d_head, expected_d_head)):
        assert x.dtype == jnp.bfloat16
        # Two roundings to bfloat16, each up to 2^-9 of a value: of the logits' gradient (chunked) and of the result.
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 2**-8 * np.linalg.norm(y)


def test_jit_and_empty():
    hidden, head, targets, *_ = inputs(21, 151, jnp.float32)
    f = jax.jit(token_stats, static_argnames=("temperature", "impl", "blocks"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        f(hidden, head, targets, blocks=(4, 100)),
        f(hidden, head, targets, impl="reference"),
    )
    assert f(hidden[:0], head, targets[:0]).logp.shape == (0,)


AXES = (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 2, 2)], ids=str)
def test_on_a_mesh(shape, masked):
    """Tokens and vocabulary over devices: values and gradients as on one, results where the tokens are."""
    args = inputs(64, 152, jnp.float32)
    mask = jnp.arange(64) % 3 != 0 if masked else None
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=AXES)
    by_token, by_column = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("data", "fsdp"), "tensor"))
    placed = [jax.device_put(x, by_column if x is args[1] else by_token) for x in args]
    options = {"mask": mask, "blocks": (4, 64)}
    ours = jax.jit(lambda *args: value_and_gradients(*args, 0.7, mesh=mesh, **options))(*placed)
    for x, y in zip(ours, value_and_gradients(*args, 0.7, mask=mask), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert ours[0].sharding.is_equivalent_to(by_token, 1)


def test_tokens_spread_over_devices_by_xla():
    """The same without a mesh, as long as the tokens are one block."""
    args = inputs(64, 151, jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=AXES[:1])
    by_token, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(x, everywhere if x is args[1] else by_token) for x in args]
    f = jax.jit(lambda *args: value_and_gradients(*args, 1.0, impl="chunked", blocks=(64, 64)))
    ours = f(*placed)
    for x, y in zip(ours, f(*args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert ours[0].sharding.is_equivalent_to(by_token, 1)


def sizes(jaxpr):
    """The number of elements of every array in a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size"))
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_chunked_never_holds_tokens_times_vocabulary():
    T, V = 256, 2051

    def largest(**options):
        hidden, head, targets, g_logp, g_entropy = inputs(T, V, jnp.float32)

        def f(hidden, head):
            return value_and_gradients(hidden, head, targets, g_logp, g_entropy, 1.0, **options)

        return max(sizes(jax.make_jaxpr(f)(hidden, head).jaxpr))

    assert largest(impl="reference") >= T * V
    assert largest(impl="chunked", blocks=(32, 512)) <= V * D


def test_bad_arguments_are_refused():
    hidden, head, targets, *_ = inputs(4, 11, jnp.float32)
    with pytest.raises(ValueError, match=r"'triton'.*auto, reference, chunked"):
        token_stats(hidden, head, targets, impl="triton")
    with pytest.raises(ValueError, match=r"\(4, 16\).*\(16, 11\).*transpose"):
        token_stats(hidden, head.T, targets)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        token_stats(hidden, head, targets[:3])
    with pytest.raises(ValueError, match="float32"):
        token_stats(hidden, head, targets.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"temperature = 0.0"):
        token_stats(hidden, head, targets, 0.0)
    with pytest.raises(ValueError, match=r"blocks = \(0, 8\)"):
        token_stats(hidden, head, targets, blocks=(0, 8))
