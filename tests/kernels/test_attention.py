"""Attention by blocks of queries and by segments, and float32 asks for full precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.config import MeshConfig
from dynamo_jax.kernels import attention as module
from dynamo_jax.kernels.attention import attention, segment_attention
from dynamo_jax.sharding import make_mesh


def inputs(dtype, Q, S=None, B=2, N=4, K=2, H=8):
    """Queries in the last Q of S slots; padding on the left of the first row and on the right of the last."""
    rng, S = np.random.default_rng(0), S or Q
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, heads, H)), dtype) for n, heads in ((Q, N), (S, K), (S, K)))
    valid = np.ones((B, S), bool)
    valid[0, :3], valid[-1, S - 2 :] = False, False
    return q, k, v, jnp.arange(S - Q, S), jnp.asarray(valid)


def loss_and_gradients(f, q, k, v, slot, valid):
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    seen = (valid[:, None, :] & (jnp.arange(k.shape[1]) <= slot[:, None])).any(-1)  # a query without keys means nothing
    weight = jnp.where(seen[..., None, None], weight, 0.0)

    def loss(q, k, v):
        out = f(q, k, v, slot, valid)
        return jnp.sum(out.astype(jnp.float32) * weight), out * (weight != 0)

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


def plain(q, k, v, slot, valid):
    """All queries at once."""
    seen = module.Seen(slot, jnp.ones(q.shape[:2], jnp.int32), valid.astype(jnp.int32))
    return module._plain(q, k, v, seen)


@pytest.mark.parametrize(("queries", "slots"), [(32, 32), (17, 40), (5, 12)])
def test_blocks_change_nothing(monkeypatch, queries, slots):
    """Block sizes that divide the queries, leave a tail, and are larger than they are."""
    monkeypatch.setattr(module, "BLOCK", 8)
    arguments = inputs(jnp.float32, queries, slots)
    out, gradients = loss_and_gradients(attention, *arguments)
    expected, expected_gradients = loss_and_gradients(plain, *arguments)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_bfloat16_gradients_of_blocks_are_summed_in_float32(monkeypatch):
    """Root-mean-square error against float32: 1.2 times that of all at once; summed in bfloat16, 1.5 to 1.6."""
    monkeypatch.setattr(module, "BLOCK", 4)
    arguments = inputs(jnp.bfloat16, 64)
    wide = [x.astype(jnp.float32) for x in arguments[:3]]
    exact = loss_and_gradients(plain, *wide, *arguments[3:])
    at_once = loss_and_gradients(plain, *arguments)
    blocks = loss_and_gradients(attention, *arguments)

    def error(got):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        return np.array([float(jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32) - b)))) for a, b in pairs])

    assert jax.tree.leaves(blocks)[0].dtype == jnp.bfloat16
    assert (error(blocks) < 1.3 * error(at_once)).all()


def test_no_array_of_all_scores(monkeypatch):
    """[queries, keys] appears in neither pass: a block of it does."""
    monkeypatch.setattr(module, "BLOCK", 16)
    q, k, v, slot, valid = inputs(jnp.float32, 64, N=2)
    text = jax.jit(lambda *x: loss_and_gradients(attention, *x)).lower(q, k, v, slot, valid).as_text()
    assert "x16x64xf32" in text
    assert "x64x64xf32" not in text


@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_float32_is_multiplied_as_float32(dtype, full):
    """Forward and backward; bfloat16 is left on the fast path."""
    arguments = inputs(dtype, 16)
    text = jax.jit(lambda *x: loss_and_gradients(plain, *x)).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 6
    assert all(("HIGHEST" in line) == full for line in products)


# Rows of 24 slots: three segments and padding; one alone, longer than half of the row; one and nothing else.
SEGMENTS = np.array([[0] * 7 + [1] * 9 + [2] * 5 + [9] * 3, [3] * 15 + [9] * 9, [4] * 24], np.int32)


def by_segment(q, k, v, segments):
    """float64, a loop over the segments of each row; 0 where there is none (segment 9)."""
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.asarray(x, np.float64), group, axis=2) for x in (k, v))
    for g, row in enumerate(segments):
        for segment in set(row.tolist()) - {9}:
            at = np.flatnonzero(row == segment)
            scores = np.einsum("qah,sah->aqs", np.asarray(q, np.float64)[g, at], k[g, at]) / q.shape[3] ** 0.5
            scores = np.where(np.tril(np.ones((len(at), len(at)), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[g, at] = np.einsum("aqs,sah->qah", weights / weights.sum(-1, keepdims=True), v[g, at])
    return out


@pytest.mark.parametrize("block", [512, 8])
def test_each_segment_attends_to_itself_alone(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    q, k, v, *_ = inputs(jnp.float32, SEGMENTS.shape[1], B=3)
    out = np.asarray(jax.jit(segment_attention)(q, k, v, SEGMENTS))
    assert np.isfinite(out).all()
    real = SEGMENTS != 9
    np.testing.assert_allclose(out[real], by_segment(q, k, v, SEGMENTS)[real], atol=1e-5)


@pytest.mark.parametrize("parts", [4, 5])  # of 6 slots; of 5, the last one shorter
def test_parts_of_the_queries_on_a_cpu_change_nothing(monkeypatch, parts):
    """Values and gradients, of real tokens."""
    monkeypatch.setattr(module, "CPU_MIN_SLOTS", SEGMENTS.shape[1])
    monkeypatch.setattr(module, "CPU_PARTS", parts)
    q, k, v, *_ = inputs(jnp.float32, SEGMENTS.shape[1], B=3)
    real = jnp.asarray(SEGMENTS != 9)[..., None, None]

    def run(mesh):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(segment_attention(q, k, v, SEGMENTS, mesh=mesh)) * real)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    on_mesh, alone = run(make_mesh(MeshConfig())), run(None)
    assert "concatenate" in str(jax.make_jaxpr(on_mesh)(q, k, v))
    assert "concatenate" not in str(jax.make_jaxpr(alone)(q, k, v))
    for ours, expected in zip(jax.tree.leaves(on_mesh(q, k, v)), jax.tree.leaves(alone(q, k, v)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=2e-6)
