"""The table of parameters: one entry is all that initial values, shardings and Hugging Face files need."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dynamo_jax.config import ArchitectureConfig, MeshConfig
from dynamo_jax.policy import DecoderConfig, abstract_policy, init_policy, load_hf, save_hf
from dynamo_jax.policy.params import PARAMS, Param, axis_sizes, param_name
from dynamo_jax.sharding import make_mesh

SHAPE = ArchitectureConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=48,
    tie_word_embeddings=False,
)  # fmt: skip
# The first and the last initial value with key 3, as they were before there was a table: runs are compared with runs of
# earlier versions, and checkpoints find their parameters by these paths.
INITIAL = {
    "['blocks']['attention_norm'].value": (1.0, 1.0),
    "['blocks']['down'].value": (-0.032399688, -0.0031096311),
    "['blocks']['gate'].value": (-0.086673066, 0.11134915),
    "['blocks']['k'].value": (-0.14694534, -0.4042501),
    "['blocks']['k_bias'].value": (0.0, 0.0),
    "['blocks']['mlp_norm'].value": (1.0, 1.0),
    "['blocks']['o'].value": (0.40548226, -0.3915424),
    "['blocks']['q'].value": (-0.4858054, 0.007808011),
    "['blocks']['q_bias'].value": (0.0, 0.0),
    "['blocks']['up'].value": (-0.22082394, -0.08834445),
    "['blocks']['v'].value": (-0.1505073, 0.09271489),
    "['blocks']['v_bias'].value": (0.0, 0.0),
    "['embedding'].value": (-0.59458494, 0.079183966),
    "['final_norm'].value": (1.0, 1.0),
    "['lm_head'].value": (0.39928454, 0.15353277),
}
SPLIT = {
    "embedding": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "final_norm": (None,),
    "attention_norm": (None, None),
    "q": (None, "embed", "heads", None),
    "v": (None, "embed", "kv_heads", None),
    "q_bias": (None, "heads", None),
    "o": (None, "heads", None, "embed"),
    "gate": (None, "embed", "mlp"),
    "down": (None, "mlp", "embed"),
}


@cache
def initial(shape: ArchitectureConfig) -> dict[str, np.ndarray]:
    params = init_policy(DecoderConfig(shape), jax.random.key(3))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def test_initial_values_and_paths_stay() -> None:
    values = initial(SHAPE)
    assert values.keys() == INITIAL.keys()
    for path, x in values.items():
        np.testing.assert_allclose((x.flat[0], x.flat[-1]), INITIAL[path], rtol=1e-6, err_msg=path)
    # The others are the same without a head and without biases: what takes no key moves no other's.
    fewer = initial(dataclasses.replace(SHAPE, tie_word_embeddings=True, qkv_bias=False))
    assert values.keys() - fewer.keys() == {path for path in values if "bias" in path or "lm_head" in path}
    for path, x in fewer.items():
        np.testing.assert_array_equal(x, values[path], err_msg=path)


def test_how_parameters_are_split() -> None:
    assert {name: PARAMS[name].logical_axes for name in SPLIT} == SPLIT


def test_norms_and_biases_do_not_decay() -> None:
    params = abstract_policy(DecoderConfig(SHAPE))[1]
    names = [param_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert {name: PARAMS[name].decays for name in names} == {
        name: not name.endswith(("norm", "bias")) for name in PARAMS
    }


@pytest.mark.parametrize(
    ("param", "scale", "shape", "stored"),
    [
        (Param("ZH", "model.layers.{Z}.new.weight", "ones"), 1.0, (2, 4), (4,)),
        (Param("ZFHD", "model.layers.{Z}.new.weight", "normal", "FH"), 96**-0.5, (2, 24, 4, 16), (16, 96)),
        (Param("DKH", "new.weight", "normal", "D"), 16**-0.5, (16, 2, 4), (8, 16)),
    ],
    ids=["norm of a head", "matrix of a layer", "matrix"],
)
def test_one_entry_is_a_parameter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    param: Param,
    scale: float,
    shape: tuple[int, ...],
    stored: tuple[int, ...],
) -> None:
    before = initial(SHAPE)
    monkeypatch.setitem(PARAMS, "new", param)
    config = DecoderConfig(SHAPE, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    params = init_policy(config, jax.random.key(3))
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, x in before.items():
        np.testing.assert_array_equal(flat.pop(path), x)
    [(path, new)] = flat.items()
    assert path == ("['blocks']['new'].value" if param.per_layer else "['new'].value")
    assert new.shape == shape
    assert np.sqrt(np.mean(np.square(new))) == pytest.approx(scale, rel=0.15)

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    save_hf(tmp_path / "out", params, config)
    tensors = {k: x for k, x in load_file(tmp_path / "out/model.safetensors").items() if "new" in k}
    names = ["model.layers.0.new.weight", "model.layers.1.new.weight"] if param.per_layer else ["new.weight"]
    assert sorted(tensors) == names
    assert {x.shape for x in tensors.values()} == {stored}
    loaded = load_hf(tmp_path / "out", config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), loaded, params)


def test_a_matrix_is_stored_as_torch_multiplies() -> None:
    """y = W x with W [outputs, inputs], the heads of an output or an input side by side."""
    sizes = axis_sizes(SHAPE)
    rng = np.random.default_rng(1)
    q_DAH, o_AHD = (rng.normal(size=PARAMS[name].shape(sizes)[1:]) for name in ("q", "o"))
    x_D, y_AH = rng.normal(size=16), rng.normal(size=(4, 4))
    q, o = PARAMS["q"].to_hf(q_DAH, sizes), PARAMS["o"].to_hf(o_AHD, sizes)
    np.testing.assert_allclose(q @ x_D, np.einsum("d,dah->ah", x_D, q_DAH).reshape(-1))
    np.testing.assert_allclose(o @ y_AH.reshape(-1), np.einsum("ah,ahd->d", y_AH, o_AHD))
    assert q.flags.c_contiguous
    assert o.flags.c_contiguous


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="needs a vocab_size"):
        abstract_policy(DecoderConfig(dataclasses.replace(SHAPE, vocab_size=None)))
