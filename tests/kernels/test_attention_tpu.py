"""Splash attention with segments, interpreted, against float64: forward and backward, several query heads a key's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.kernels import attention_tpu
from dynamo_jax.kernels.attention import segment_attention

S, A, K, H = 256, 4, 2, 128


def segments() -> np.ndarray:
    """Two rows: three segments and padding, and one that is longer than half of the row."""
    return np.stack([np.repeat([0, 1, 2, 7], [70, 101, 60, 25]), np.repeat([3, 7], [180, 76])]).astype(np.int32)


def inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, S, heads, H)), jnp.float32) for heads in (A, K, K))


def exact(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys of the query's segment up to it, written out."""
    k, v = (jnp.repeat(x, A // K, axis=2) for x in (k, v))
    seen = (segment[:, :, None] == segment[:, None, :]) & jnp.tril(jnp.ones((S, S), bool))
    scores = jnp.einsum("gqah,gsah->gaqs", q, k) / H**0.5
    return jnp.einsum("gaqs,gsah->gqah", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize(("dtype", "near"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_kernel_against_float64(dtype: jnp.dtype, near: float) -> None:
    segment, q_k_v = segments(), tuple(x.astype(dtype) for x in inputs())
    weight = np.random.default_rng(1).normal(size=(2, S, A, H)) * (segment != 7)[..., None, None]

    def value(f, wide, *q_k_v):  # type: ignore[no-untyped-def]
        out = f(*q_k_v, jnp.asarray(segment))
        return jnp.sum(out.astype(wide) * jnp.asarray(weight, wide)), out

    def run(f, wide, *q_k_v):  # type: ignore[no-untyped-def]
        return jax.jit(jax.value_and_grad(lambda *x: value(f, wide, *x), argnums=(0, 1, 2), has_aux=True))(*q_k_v)

    (_, out), grads = run(lambda *x: attention_tpu.segment_attention(*x, interpret=True), jnp.float32, *q_k_v)
    with jax.enable_x64(True):
        (_, out_64), grads_64 = run(exact, jnp.float64, *(jnp.asarray(x, jnp.float64) for x in q_k_v))
    assert out.dtype == dtype
    assert out_64.dtype == jnp.float64
    real = segment != 7
    for got, expected in zip((out, *grads), (out_64, *grads_64), strict=True):
        got, expected = np.asarray(got, np.float64)[real], np.asarray(expected)[real]
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < near
    np.testing.assert_array_equal(np.isfinite(np.asarray(out, np.float32)), True)


def test_what_the_kernel_takes() -> None:
    """bfloat16 in tiles of 128; all else goes another way, and so does everything on a CPU."""
    q = jax.ShapeDtypeStruct((2, S, A, H), jnp.bfloat16)
    assert attention_tpu.takes(q)
    assert not attention_tpu.takes(jax.ShapeDtypeStruct(q.shape, jnp.float32))
    assert not attention_tpu.takes(jax.ShapeDtypeStruct((2, S + 8, A, H), jnp.bfloat16))
    assert not attention_tpu.takes(jax.ShapeDtypeStruct((2, S, A, 64), jnp.bfloat16))
    shapes = (q, *[jax.ShapeDtypeStruct((2, S, K, H), jnp.bfloat16)] * 2, jax.ShapeDtypeStruct((2, S), jnp.int32))
    assert "pallas_call" not in str(jax.make_jaxpr(segment_attention)(*shapes))
