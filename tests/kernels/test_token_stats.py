"""token_stats: reference and chunked against float64 numpy, values and gradients; nothing of size [T, V] in chunked."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynamo_jax.kernels import token_stats
from dynamo_jax.kernels.token_stats import chunked
from dynamo_jax.kernels.token_stats.reference import logits

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


def value_and_gradients(*args, mask=None, **options):
    """logp, entropy, lambda_mean, d_hidden, d_head. `args`: those of `inputs`, and the temperature."""
    *arrays, temperature = args
    return program(temperature, **options)(*arrays, mask)


@functools.cache  # a kernel takes seconds to compile
def program(temperature, **options):
    def run(hidden, head, targets, g_logp, g_entropy, mask):
        def f(hidden, head):
            stats = token_stats(hidden, head, targets, temperature, mask=mask, **options)
            # lambda_mean is in the sum to show that its gradient is none.
            return jnp.sum(g_logp * stats.logp + g_entropy * stats.entropy + 7.0 * stats.lambda_mean), stats

        (_, stats), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head)
        return (*stats, *grads)

    return jax.jit(run)


def values(hidden, head, targets, temperature, mask=None, **options):
    """logp, entropy, lambda_mean without a gradient: in float32 the kernels serve only there."""
    return forward_program(temperature, **options)(hidden, head, targets, mask)


@functools.cache
def forward_program(temperature, **options):
    return jax.jit(
        lambda hidden, head, targets, mask: token_stats(hidden, head, targets, temperature, mask=mask, **options)
    )


NAMES = ("logp", "entropy", "lambda_mean", "d_hidden", "d_head")
LIMITS = (1e-5, 1e-5, 5e-6, 3e-6, 3e-6)  # of the largest value of the array, at least of 1

# Blocks that divide V, are smaller, larger, or between V / 2 and V.
CASES = [
    *[("reference", None, V) for V in (151, 2051)],
    *[("chunked", None, V) for V in (1, 11, 151, 2051, 4096)],
    *[("chunked", (8, 4096), V) for V in (11, 2051)],
    *[("auto", (21, 100), V) for V in (1, 151, 4096)],
    ("chunked", (21, 1536), 2051),
]
# A kernel is compiled anew for each shape, in seconds.
KERNEL_CASES = [
    ("pallas_tpu", 1, 1.0, (16, 128)),
    ("pallas_tpu", 11, 0.7, (32, 256)),
    ("pallas_tpu", 151, 1.0, (16, 128)),
    ("pallas_tpu", 2051, 0.7, (16, 1152)),
    ("pallas_tpu", 4096, 1.0, (16, 256)),
]


def check(ours, expected, limits=LIMITS):
    for name, limit, x, y in zip(NAMES, limits, ours, expected, strict=False):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=limit * max(1.0, np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize(("impl", "blocks", "V"), CASES)
@pytest.mark.parametrize(("temperature", "scale"), [(0.7, 10.0), (1.0, 50.0)])
def test_float32_against_float64(impl, blocks, V, temperature, scale):
    args = inputs(21, V, jnp.float32, scale)  # 21: not a multiple of any block but one
    check(value_and_gradients(*args, temperature, impl=impl, blocks=blocks), in_float64(*args, temperature))


@pytest.mark.parametrize(("impl", "V", "temperature", "blocks"), KERNEL_CASES)
def test_kernels_against_float64(impl, V, temperature, blocks):
    for scale in (10.0, 50.0):
        args = inputs(21, V, jnp.float32, scale * temperature)
        found = values(*args[:3], temperature, impl=impl, blocks=blocks)
        check(found, in_float64(*args, temperature))


def errors(found, expected):
    """Of d_hidden and d_head, relative in the norm."""
    pairs = zip(found[3:], expected[3:], strict=True)
    return [np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y) for x, y in pairs]


@pytest.mark.parametrize("V", [11, 2051])
@pytest.mark.parametrize("impl", ["reference", "chunked", "pallas_tpu"])
def test_bfloat16_against_float64(impl, V):
    args = inputs(64, V, jnp.bfloat16)
    blocks = (32, 256) if impl == "pallas_tpu" else None
    found, expected = value_and_gradients(*args, 0.7, impl=impl, blocks=blocks), in_float64(*args, 0.7)
    # Products of bfloat16 are exact in float32, so values are as good as with float32 inputs.
    check(found[:3], expected)
    assert found[3].dtype == found[4].dtype == jnp.bfloat16
    naive = errors(value_and_gradients(*args, 0.7, impl="reference"), expected)
    for error, other in zip(errors(found, expected), naive, strict=True):
        assert error <= min(3e-3, 1.5 * other)


@pytest.mark.parametrize("V", [151, 2051])
def test_bfloat16_as_on_accelerators(V, monkeypatch):
    """There the gradient of the logits is rounded to bfloat16, before it is multiplied."""
    blocks = chunked.Blocks(64, 512)
    monkeypatch.setattr(chunked, "_by_platform", lambda f, _, *arrays: f(*arrays, blocks=blocks, fast_bfloat16=True))
    program.cache_clear()
    args = inputs(64, V, jnp.bfloat16)
    expected = in_float64(*args, 0.7)
    found, naive = (errors(value_and_gradients(*args, 0.7, impl=i), expected) for i in ("chunked", "reference"))
    program.cache_clear()
    for error, other in zip(found, naive, strict=True):
        assert error <= min(3e-3, 1.5 * other)


@pytest.mark.parametrize(("impl", "blocks"), [("chunked", None), ("pallas_tpu", (16, 2048))])
def test_a_real_vocabulary_and_rows_with_a_peak(impl, blocks):
    """V = 151936. Half of the rows give nearly all to one token: H is about 0.04 there, and right to 1e-6."""
    T, V = 8, 151936
    hidden, head, targets, *g = (np.array(x) for x in inputs(T, V, jnp.float32))
    head[:, 0] = 0.0
    head[77, 0] = 1.0
    hidden[: T // 2] *= 0.1
    hidden[: T // 2, 0] = 18.0 + 0.05 * np.arange(T // 2)
    targets[0] = 77
    args = (jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), *g)
    ours, expected = values(*args[:3], 1.0, impl=impl, blocks=blocks), in_float64(*args, 1.0)
    check(ours, expected)
    if impl == "chunked":
        check(value_and_gradients(*args, 1.0, impl=impl), expected)
    assert 0.02 < expected[1][0] < 0.08
    np.testing.assert_allclose(ours[1][: T // 2], expected[1][: T // 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked", "pallas_tpu"])
@pytest.mark.parametrize("wanted", [0, 5, 21])
def test_tokens_without_weight_are_skipped(impl, wanted):
    """Zeros for them, no gradient from them, whatever they hold; the others as if alone."""
    hidden, head, targets, g_logp, g_entropy = inputs(21, 151, jnp.float32)
    mask = np.zeros(21)
    mask[np.random.default_rng(1).permutation(21)[:wanted]] = 0.5  # a coefficient, not only a flag
    keep = mask != 0
    if impl != "reference":
        hidden = jnp.where(keep[:, None], hidden, jnp.nan)
    blocks = (4, 64) if impl == "chunked" else (16, 128)
    options = {"impl": impl, "mask": jnp.asarray(mask), "blocks": blocks}
    *stats, d_hidden, d_head = value_and_gradients(hidden, head, targets, g_logp, g_entropy, 1.0, **options)
    np.testing.assert_allclose(values(hidden, head, targets, 1.0, **options), stats, rtol=1e-5, atol=1e-5)
    alone = in_float64(hidden[keep], head, targets[keep], g_logp[keep], g_entropy[keep], 1.0)
    check([*(x[keep] for x in stats), d_hidden[keep], d_head], alone) if wanted else None
    for x in (*stats, d_hidden):
        np.testing.assert_array_equal(x[~keep], 0.0)
    assert wanted or not np.any(d_head)


def test_work_follows_the_mask():
    """The loops of the compiled program run as often as there are tiles of tokens that count."""
    hidden, head, targets, *_ = inputs(64, 151, jnp.float32)
    visited = []

    def count(hidden_tD, *rest):
        jax.debug.callback(lambda: visited.append(1))
        return logits(hidden_tD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "logits", count)
        f = jax.jit(lambda mask: token_stats(hidden, head, targets, mask=mask, impl="chunked", blocks=(8, 64)))
        for wanted, tiles in ((64, 8), (17, 3), (16, 2), (0, 0)):
            visited.clear()
            jax.block_until_ready(f(jnp.arange(64) < wanted))
            jax.effects_barrier()
            assert len(visited) == 3 * tiles  # three blocks of the vocabulary


def test_on_a_cpu_narrow_tiles_follow_the_mask():
    """Without blocks: at most an eighth of the tokens, or 128, are computed beside those that count."""
    hidden, head, targets, *_ = inputs(640, 7, jnp.float32)
    visited = []

    def count(hidden_tD, *rest):
        jax.debug.callback(lambda: visited.append(len(hidden_tD)))
        return logits(hidden_tD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "logits", count)
        jax.block_until_ready(jax.jit(lambda m: token_stats(hidden, head, targets, mask=m))(jnp.arange(640) < 512))
        jax.effects_barrier()
    assert visited == [128] * 4
    assert chunked.cpu_blocks_of_some(4096).tokens == 512
    assert chunked.cpu_blocks_of_some(10**6) == chunked.CPU_BLOCKS


def test_backward_work_follows_the_gradient():
    """Tokens that get no gradient back are skipped; a nan is no zero. Whatever is skipped, the gradients are right."""
    hidden, head, targets, g_logp, g_entropy = inputs(64, 151, jnp.float32)
    used = np.random.default_rng(3).permutation(64) < 17
    g_logp, g_entropy = g_logp * used, g_entropy * (used & (np.arange(64) % 2 == 0))
    mask = jnp.arange(64) < 60
    visited = []

    def count(hidden_tD, *rest):
        jax.debug.callback(lambda: visited.append(1))
        return logits(hidden_tD, *rest)

    def run(g_logp, g_entropy, mask):
        f = lambda *arrays: token_stats(*arrays, targets, mask=mask, impl="chunked", blocks=(8, 64))[:2]  # noqa: E731
        return jax.vjp(f, hidden, head)[1]((g_logp, g_entropy))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "logits", count)
        d_hidden, d_head = jax.jit(run)(g_logp, g_entropy, mask)
        jax.effects_barrier()
    live = int((used & np.asarray(mask)).sum())
    assert len(visited) == 3 * (-(-60 // 8) + -(-live // 8))  # three blocks of the vocabulary, forward and backward
    g_logp, g_entropy = g_logp * mask, g_entropy * mask
    expected = in_float64(hidden, head, targets, g_logp, g_entropy, 1.0)[3:]
    for ours, theirs in zip((d_hidden, d_head), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())
    assert np.isnan(jax.jit(run)(g_logp * np.nan, g_entropy, mask)[1]).any()


def test_only_the_kernel_for_gpus_needs_mosaic_gpu():
    """Which jax calls unstable."""
    code = """
import sys
sys.modules["jax.experimental.pallas.mosaic_gpu"] = None
import jax.numpy as jnp
from dynamo_jax.kernels import token_stats
x = jnp.ones((2, 4), jnp.bfloat16)
for impl in ("auto", "chunked"):
    token_stats(x, x, jnp.zeros(2, int), impl=impl)
try:
    token_stats(x, x, jnp.zeros(2, int), impl="pallas_gpu")
except ImportError:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


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


@pytest.mark.parametrize(
    ("shape", "impl", "masked"),
    [
        ((2, 4, 1), "auto", True),
        ((1, 1, 2), "auto", False),
        ((1, 1, 4), "auto", False),
        ((1, 1, 8), "auto", False),
        ((2, 2, 2), "auto", True),
        ((2, 2, 2), "pallas_tpu", True),
    ],
    ids=str,
)
def test_on_a_mesh(shape, impl, masked):
    """Tokens and vocabulary over devices: values and gradients as on one, results where the tokens are."""
    args = inputs(64, 152, jnp.float32)
    mask = jnp.arange(64) % 3 != 0 if masked else None
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=AXES)
    by_token, by_column = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("data", "fsdp"), "tensor"))
    placed = [jax.device_put(x, by_column if x is args[1] else by_token) for x in args]
    blocks = (16, 128) if "pallas" in impl else (4, 64)
    ours = value_and_gradients(*placed, 0.7, mask=mask, mesh=mesh, impl=impl, blocks=blocks)
    check(ours, value_and_gradients(*args, 0.7, mask=mask))
    if "pallas" in impl:
        check(values(*placed[:3], 0.7, mask=mask, mesh=mesh, impl=impl, blocks=blocks), ours[:3])
    assert ours[0].sharding.is_equivalent_to(by_token, 1)


def test_tokens_spread_over_devices_by_xla():
    """The same without a mesh, as long as the tokens are one block."""
    args = inputs(64, 151, jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=AXES[:1])
    by_token, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(x, everywhere if x is args[1] else by_token) for x in args]
    ours = value_and_gradients(*placed, 1.0, impl="chunked", blocks=(64, 64))
    check(ours, value_and_gradients(*args, 1.0, impl="chunked"))
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
    with pytest.raises(ValueError, match=r"'triton'.*auto, reference, chunked, pallas"):
        token_stats(hidden, head, targets, impl="triton")
    with pytest.raises(ValueError, match=r"\(4, 16\).*\(16, 11\).*transpose"):
        token_stats(hidden, head.T, targets)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        token_stats(hidden, head, targets[:3])
    with pytest.raises(ValueError, match="float32"):
        token_stats(hidden, head, targets.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"temperature = 0.0"):
        token_stats(hidden, head, targets, 0.0)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) .* \(4,\)"):
        token_stats(hidden, head, targets, mask=targets[:3])
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=AXES[:2])
    with pytest.raises(ValueError, match=r"\('data', 'tensor'\), but not 'fsdp'"):
        token_stats(hidden, head, targets, mesh=mesh)
    with pytest.raises(ValueError, match=r"V = 11 .* 4 devices of tensor"):
        token_stats(hidden, head, targets, mesh=mesh, token_axes=("data",))
    with pytest.raises(ValueError, match=r"blocks = \(0, 8\)"):
        token_stats(hidden, head, targets, blocks=(0, 8))
