"""Attention through cuDNN without a GPU: what it is told, what its program is, and what it refuses."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dynamo_jax.kernels import attention, attention_gpu, attention_tpu
from dynamo_jax.kernels.attention_gpu import segment_attention
from dynamo_jax.update.packing import fitted

G, S, A, K, H = 3, 40, 4, 2, 16


def card(capability):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.fixture
def hopper(monkeypatch):
    """As if this process had one."""
    monkeypatch.setattr(jax, "local_devices", lambda backend: [card("9.0")])
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: float(least) <= 9.0)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda other: other == "9.0")


def inputs(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(G, S, heads, H)), dtype) for heads in (A, K, K))
    segments = np.full((G, S), 9, np.int32)  # 9: padding
    segments[0, :17], segments[0, 17:18], segments[0, 18:35] = 4, 0, 2
    segments[1, :] = 1
    return q, k, v, jnp.asarray(segments)


def expected(q, k, v, segments):
    """float64, by the mask."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v, segments = np.repeat(k, A // K, 2), np.repeat(v, A // K, 2), np.asarray(segments)
    z = np.einsum("gqah,gsah->gaqs", q, k) / np.sqrt(H)
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(S, dtype=bool)
    p = np.exp(np.where(seen[:, None], z, -np.inf))
    return np.einsum("gaqs,gsah->gqah", p / p.sum(-1, keepdims=True), v)


def as_cudnn_would(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """Each segment on its own, found where jax tells cuDNN that it lies: in elements from the start of the array."""
    assert mask_type == cudnn.MaskType.PADDING_CAUSAL
    lengths, key_lengths, starts, key_starts = (
        np.asarray(x).ravel() for x in cudnn._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
    )
    np.testing.assert_array_equal(lengths, key_lengths)
    flat_q, flat_k, flat_v = (np.asarray(x, np.float64).ravel() for x in (q, k, v))
    out = np.full(q.size, np.nan)  # what no segment holds stays unwritten
    for start, key_start, length in zip(starts, key_starts, lengths, strict=False):
        if not length:
            continue
        q_sah = flat_q[start : start + length * A * H].reshape(length, A, H)
        k_sah, v_sah = (x[key_start : key_start + length * A * H].reshape(length, A, H) for x in (flat_k, flat_v))
        z = np.where(np.tri(length, dtype=bool), np.einsum("qah,sah->aqs", q_sah, k_sah) * scale, -np.inf)
        p = np.exp(z)
        part = np.einsum("aqs,sah->qah", p / p.sum(-1, keepdims=True), v_sah)
        out[start : start + length * A * H] = part.ravel()
    return jnp.asarray(out.reshape(q.shape), jnp.float32)


def test_segments_are_where_cudnn_is_told(monkeypatch, hopper):
    """Every token is written, padding too, from the keys of its own segment."""
    monkeypatch.setattr(cudnn, "dot_product_attention", as_cudnn_would)
    arguments = inputs()
    np.testing.assert_allclose(segment_attention(*arguments), expected(*arguments), atol=1e-5)


def test_a_row_with_too_many_segments_is_nan_and_no_other(monkeypatch, hopper):
    monkeypatch.setattr(cudnn, "dot_product_attention", as_cudnn_would)
    out = np.asarray(segment_attention(*inputs(), most=3))
    assert np.isnan(out[0]).all()  # 3 rollouts and the padding
    assert np.isfinite(out[1:]).all()


def test_the_program_calls_cudnn_forward_and_backward(hopper):
    """At the size of a row of the 1.5B recipe: no array of [S, S], and keys with as many heads as queries."""
    S, A, K, H = 4096, 12, 2, 128
    q, k = (jax.ShapeDtypeStruct((2, S, heads, H), jnp.bfloat16) for heads in (A, K))
    segments = jax.ShapeDtypeStruct((2, S), jnp.int32)

    def loss(q, k, v, segments):
        return jnp.sum(segment_attention(q, k, v, segments).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'custom_call @(__cudnn\$\w+)\(.*?backend_config = "(.*?)"[,}].*? : \((.*?)\) ->', text)
    assert [name for name, *_ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, config, taken in calls:
        settings = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert settings["mask_type"] == "PADDING_CAUSAL"
        assert settings["max_seg_per_batch"] == 64
        assert settings["fmha_scale"] == pytest.approx(128**-0.5)
        assert taken.startswith("tensor<2x4096x12x128xbf16>, tensor<2x4096x12x128xbf16>, tensor<2x4096x12x128xbf16>")
        assert taken.endswith("tensor<2x64xi32>, tensor<2x64xi32>, tensor<2x65xi32>, tensor<2x65xi32>")
    assert "4096x4096" not in re.sub(r"custom_call.*", "", text)


@pytest.mark.parametrize(
    ("dtype", "head", "capability", "message"),
    [
        (jnp.float32, 16, "9.0", "bfloat16 or float16, not float32"),
        (jnp.bfloat16, 12, "9.0", "heads of 12; cuDNN takes multiples of 8 up to 256"),
        (jnp.bfloat16, 16, "8.0", r"compute capability 8.0 .* 9.0 \(Hopper\) and later"),
        (jnp.bfloat16, 16, "gfx942", "compute capability gfx942"),
    ],
)
def test_what_cudnn_cannot_do_is_refused(monkeypatch, hopper, dtype, head, capability, message):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [card(capability)])
    q = jnp.zeros((1, 8, 2, head), dtype)
    with pytest.raises(ValueError, match=message):
        segment_attention(q, q, q, jnp.zeros((1, 8), jnp.int32))
    assert not attention_gpu.takes(q, card(capability))


def test_one_segment_a_row_is_no_packing(hopper):
    with pytest.raises(ValueError, match="most = 1 segments a row; give at least 2"):
        segment_attention(*inputs(), most=1)


def test_without_a_gpu_there_is_none():
    with pytest.raises(RuntimeError, match="gpu"):
        segment_attention(*inputs())


def test_the_door_leads_to_it_on_a_mesh(monkeypatch, hopper):
    """Each of four devices gets its rows and heads."""
    monkeypatch.setattr(attention, "_kernel_of", lambda device, q: attention_gpu.segment_attention)
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    q, k = (jax.ShapeDtypeStruct((4, 64, heads, 16), jnp.bfloat16) for heads in (4, 2))
    f = jax.jit(lambda q, k, v, segments: attention.segment_attention(q, k, v, segments, mesh=mesh))
    traced = f.trace(q, k, k, jax.ShapeDtypeStruct((4, 64), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"custom_call @__cudnn\$fmhaSoftmax\(.*\(tensor<2x64x2x16xbf16>", text)


def test_each_device_has_its_kernel(hopper):
    q = jnp.zeros((1, 128, 2, 128), jnp.bfloat16)
    for device, kernel in (
        (card("9.0"), attention_gpu.segment_attention),
        (card("8.0"), None),
        (types.SimpleNamespace(platform="tpu"), attention_tpu.segment_attention),
        (types.SimpleNamespace(platform="cpu"), None),
    ):
        assert attention._kernel_of(device, q) is kernel


def test_packing_gives_no_row_more_segments_than_cudnn_is_told_of():
    rows = fitted([2] * 100 + [60], 64)
    assert sorted(i for row in rows for i in row) == list(range(101))
    assert max(map(len, rows)) == attention_gpu.most_segments(64) - 1  # and the padding
