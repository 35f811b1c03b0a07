"""The kernel for Hopper without one: interpreted against float64, and lowered for CUDA."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

from dynamo_jax.kernels import token_stats
from dynamo_jax.kernels.token_stats import dispatch, pallas_gpu
from dynamo_jax.kernels.token_stats.pallas_gpu import BLOCKS, GpuBlocks
from dynamo_jax.kernels.token_stats.sums import finish


@pytest.fixture
def interpreted(monkeypatch):
    """Mosaic GPU's interpreter: its memory, its barriers and a thread for each warpgroup."""
    if jax.__version_info__ < (0, 11):  # there it multiplies by no transposed operand. The kernel's second always is.
        kept = gpu_callbacks._remove_noop_transforms

        def untransposed(transforms):
            return tuple(t for t in kept(transforms) if type(t).__name__ != "TransposeTransform")

        monkeypatch.setattr(gpu_callbacks, "_remove_noop_transforms", untransposed)
        numpy = types.SimpleNamespace(**vars(np))
        numpy.matmul = lambda a, b, dtype: np.matmul(a, b.T, dtype=dtype)
        monkeypatch.setattr(gpu_callbacks, "np", numpy)
    monkeypatch.setattr(pallas_gpu, "MULTIPROCESSORS", 2)  # few parts, so that each has several blocks of columns
    with params.force_gpu_interpret_mode(params.InterpretGPUParams()):
        yield


def inputs(T, D, V, scale=10.0, dtype=jnp.bfloat16):
    """`scale` is the size of the largest logit. Some targets are of no column, as those of other shards are."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    hidden *= scale / np.abs(hidden @ head.T).max()
    targets = rng.integers(0, V, T)
    targets[:2], targets[2] = (-1, V), V - 1
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets, jnp.int32)


def in_float64(hidden, head, targets, temperature):
    """logp (that of a target without a column means nothing), entropy, lambda_mean."""
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    u = z - z.max(-1, keepdims=True)
    logp = u - np.log(np.exp(u).sum(-1, keepdims=True))
    p = np.exp(logp)
    H = -(p * logp).sum(-1)
    rows = np.arange(len(targets))
    return logp[rows, np.clip(targets, 0, len(head) - 1)], H, (p**2 * (logp + H[:, None])).sum(-1)


# Blocks that are larger than V, divide it, and do not; a V that is no multiple of 8, whose head is padded; a D of one
# piece and of more than are in flight; two blocks of tokens; parts of one and of two blocks of columns.
CASES = [
    (5, 16, 1, 1.0, (128, 16)),
    (130, 250, 32, 0.7, (128, 16)),
    (21, 64, 75, 0.7, (256, 32)),
]


@pytest.mark.parametrize(("T", "D", "V", "temperature", "blocks"), CASES)
def test_against_float64(interpreted, T, D, V, temperature, blocks):
    arguments = inputs(T, D, V, 30.0)
    sums = pallas_gpu.forward(*arguments, None, temperature, GpuBlocks(*blocks, stages=3))
    found, expected = finish(sums)[0], in_float64(*arguments, temperature)
    for x, y in zip(found, expected, strict=True):
        of = slice(2, None) if y is expected[0] else slice(None)
        np.testing.assert_allclose(x[of], y[of], rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))
    np.testing.assert_array_equal(sums.target[:2], 0.0)


def test_tokens_that_nobody_wants(interpreted):
    """Their blocks are skipped; the others are as if alone. Values and gradients of the public door."""
    hidden, head, targets = inputs(140, 64, 24)
    targets = jnp.clip(targets, 0, 23)
    mask = jnp.arange(140) % 28 == 0

    def total(hidden, head, impl):
        stats = token_stats(hidden, head, targets, mask=mask, impl=impl, blocks=(128, 16))
        return jnp.sum(stats.logp - 0.1 * stats.entropy), stats

    ours, theirs = (
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head, impl)
        for impl in ("pallas_gpu", "chunked")
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [BLOCKS, GpuBlocks(256, 128, 4)])
def test_lowers_for_hopper_without_one(blocks):
    """At the size of the 1.5B model: one kernel, and no copy of the head."""
    hidden, head = (jax.ShapeDtypeStruct((n, 1536), jnp.bfloat16) for n in (1024, 151936))
    f = jax.jit(lambda hidden, head, targets: pallas_gpu.forward(hidden, head, targets, None, 0.7, blocks))
    traced = f.trace(hidden, head, jax.ShapeDtypeStruct((1024,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert "stablehlo.pad" not in text


def test_parts_keep_the_multiprocessors_busy():
    """No part is empty, and hardly a multiprocessor idle from 16 blocks of tokens on (2,048 tokens)."""
    for token_blocks, vocab_blocks in itertools.product((1, 2, 16, 32, 50, 64, 100, 133, 256), (1, 3, 75, 594)):
        parts = pallas_gpu._parts(token_blocks, vocab_blocks)
        each = -(-vocab_blocks // parts)
        assert (parts - 1) * each < vocab_blocks <= parts * each
        rounds = -(-token_blocks * parts // pallas_gpu.MULTIPROCESSORS)
        used = token_blocks * vocab_blocks / (rounds * each * pallas_gpu.MULTIPROCESSORS)
        assert used > 0.8 or token_blocks < 16 or vocab_blocks < 75


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="multiplies bfloat16, not float32 and float32; impl = 'chunked'"):
        pallas_gpu.forward(*inputs(4, 16, 8, dtype=jnp.float32), None, 1.0)
    for blocks in ((64, 256), (128, 12), (256, 256)):
        with pytest.raises(ValueError, match=rf"blocks = \({blocks[0]}, {blocks[1]}\); .* at most 32768 logits"):
            token_stats(*inputs(4, 16, 8), impl="pallas_gpu", blocks=blocks)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "impl"),
    [
        ("gpu", "9.0", jnp.bfloat16, "pallas_gpu"),
        ("gpu", "9.0", jnp.float32, "chunked"),
        ("gpu", "8.0", jnp.bfloat16, "chunked"),
        ("gpu", "10.0", jnp.bfloat16, "chunked"),  # Blackwell has other instructions
        ("tpu", None, jnp.float32, "pallas_tpu"),
        ("cpu", None, jnp.bfloat16, "pallas_tpu"),
    ],
)
def test_the_kernel_for_a_device(platform, capability, dtype, impl):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert dispatch.kernel_of(device, dtype) == impl
