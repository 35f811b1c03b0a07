"""Hugging Face folders: parity with transformers' Qwen2, bit-equal round trips, and every way a folder can be wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dynamo_jax.config import ArchitectureConfig, MeshConfig
from dynamo_jax.policy import DecoderConfig, abstract_policy, hf, load_hf, read_architecture, save_hf
from dynamo_jax.sharding import make_mesh

TINY = ArchitectureConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, vocab_size=64,
    rope_theta=1000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip


def decoder_config(dtype: str = "float32", mesh: Any = None, **shape: Any) -> DecoderConfig:
    return DecoderConfig(dataclasses.replace(TINY, **shape), param_dtype=dtype, mesh=mesh)


def random_params(config: DecoderConfig, seed: int = 0) -> Any:
    """Parameters of which none is constant: norms and biases are random too."""
    rng = np.random.default_rng(seed)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = x.shape[-1] == config.shape.hidden_size and x.shape[:-1] in ((), (config.shape.num_layers,))
        center, scale = (1.0, 0.1) if is_norm else (0.0, 0.2)
        return jnp.asarray(rng.normal(center, scale, x.shape).astype(x.dtype))

    return jax.tree.map(fill, abstract_policy(config)[1])


def assert_same(a: Any, b: Any) -> None:
    """Equal trees, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def logits_of(params: Any, config: DecoderConfig, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    graph = abstract_policy(config)[0]

    def run(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return jax.vmap(model.logits)(model(tokens, valid))

    return np.asarray(jax.jit(run)(params, tokens.astype(np.int32), valid))


def padded_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Five rows: padded left, right, on both sides, one token alone, and full."""
    tokens = np.random.default_rng(0).integers(0, 64, (5, 9))
    valid = np.zeros((5, 9), bool)
    for row, (start, stop) in enumerate([(4, 9), (0, 3), (2, 7), (8, 9), (0, 9)]):
        valid[row, start:stop] = True
    return tokens, valid


def torch_qwen2(tmp_path: Path, *, tied: bool, kv_heads: int, **kwargs: Any) -> Any:
    """A tiny random Qwen2 of transformers, saved in `tmp_path`, with biases and norms that are not constant."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path, **kwargs)
    return model


def torch_logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    import torch

    position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(position),
        )
    return out.logits.float().numpy()


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path: Path, tied: bool, kv_heads: int) -> None:
    theirs = torch_qwen2(tmp_path, tied=tied, kv_heads=kv_heads)
    shape = read_architecture(tmp_path)
    assert shape == dataclasses.replace(TINY, tie_word_embeddings=tied, num_kv_heads=kv_heads)
    config = DecoderConfig(shape)
    params = load_hf(tmp_path, config)
    tokens, valid = padded_tokens()
    expected = torch_logits(theirs, tokens, valid)
    assert np.ptp(expected[valid]) > 5  # the model is far from constant
    np.testing.assert_allclose(logits_of(params, config, tokens, valid)[valid], expected[valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_transformers_loads_what_we_save(tmp_path: Path, tied: bool, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    config = decoder_config(tie_word_embeddings=tied, head_dim=head_dim)
    params = random_params(config)
    save_hf(tmp_path / "out", params, config)
    model, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    tokens, valid = padded_tokens()
    expected = torch_logits(model.eval(), tokens, valid)
    np.testing.assert_allclose(logits_of(params, config, tokens, valid)[valid], expected[valid], atol=1e-4, rtol=0)


def test_without_biases_exports_zeros(tmp_path: Path) -> None:
    config = decoder_config(qkv_bias=False)
    params = random_params(config)
    save_hf(tmp_path / "out", params, config)
    loaded_config = DecoderConfig(read_architecture(tmp_path / "out"))
    tokens, valid = padded_tokens()
    loaded = load_hf(tmp_path / "out", loaded_config)
    np.testing.assert_array_equal(
        logits_of(params, config, tokens, valid)[valid], logits_of(loaded, loaded_config, tokens, valid)[valid]
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_are_bit_equal(tmp_path: Path, dtype: str, tied: bool) -> None:
    config = decoder_config(dtype, tie_word_embeddings=tied)
    params = random_params(config)
    save_hf(tmp_path / "a", params, config)
    assert read_architecture(tmp_path / "a") == config.shape
    assert json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == dtype
    loaded = load_hf(tmp_path / "a", config)
    assert_same(params, loaded)
    save_hf(tmp_path / "b", loaded, config)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert ("lm_head.weight" in load_file(tmp_path / "a/model.safetensors")) is not tied


def test_a_file_of_transformers_comes_back_bit_equal(tmp_path: Path) -> None:
    theirs = torch_qwen2(tmp_path / "theirs", tied=True, kv_heads=2)
    theirs.bfloat16().save_pretrained(tmp_path / "bf16")
    for folder, dtype in (("theirs", "float32"), ("bf16", "bfloat16")):
        config = DecoderConfig(read_architecture(tmp_path / folder), param_dtype=dtype)
        save_hf(tmp_path / "ours" / folder, load_hf(tmp_path / folder, config), config)
        want, got = (load_file(tmp_path / f / "model.safetensors") for f in (folder, f"ours/{folder}"))
        assert want.keys() == got.keys()
        for name in want:
            assert want[name].dtype == got[name].dtype == np.dtype(dtype)
            assert want[name].tobytes() == got[name].tobytes(), name


def test_bfloat16_files_load_as_float32_and_back(tmp_path: Path) -> None:
    half, full = decoder_config("bfloat16"), decoder_config("float32")
    params = random_params(half)
    save_hf(tmp_path / "a", params, half)
    wide = load_hf(tmp_path / "a", full)
    assert_same(jax.tree.map(lambda x: x.astype(jnp.float32), params), wide)
    save_hf(tmp_path / "b", wide, full)
    assert_same(params, load_hf(tmp_path / "b", half))


def test_mesh_and_single_device_agree(tmp_path: Path) -> None:
    plain = decoder_config()
    meshed = decoder_config(mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    params = random_params(plain)
    save_hf(tmp_path / "plain", params, plain)
    loaded = load_hf(tmp_path / "plain", meshed)
    assert_same(params, loaded)
    wanted = jax.tree.map(lambda x: x.sharding, abstract_policy(meshed)[1])
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, loaded)) == jax.tree.leaves(wanted)
    assert loaded["embedding"][...].addressable_shards[0].data.shape == (32, 16)
    save_hf(tmp_path / "meshed", loaded, meshed)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "meshed/model.safetensors").read_bytes()


def test_files_are_split_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_MAX_FILE_BYTES", 20_000)
    config = decoder_config()
    params = random_params(config)
    save_hf(tmp_path / "out", params, config)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors = {name: x for file in files for name, x in load_file(tmp_path / "out" / file).items()}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        assert sum(x.nbytes for x in load_file(tmp_path / "out" / file).values()) <= 20_000
    assert_same(params, load_hf(tmp_path / "out", config))

    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), tensors[name])


def test_split_files_of_transformers_load(tmp_path: Path) -> None:
    theirs = torch_qwen2(tmp_path, tied=False, kv_heads=2, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    config = DecoderConfig(read_architecture(tmp_path))
    tokens, valid = padded_tokens()
    got = logits_of(load_hf(tmp_path, config), config, tokens, valid)
    np.testing.assert_allclose(got[valid], torch_logits(theirs, tokens, valid)[valid], atol=1e-4, rtol=0)


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / "config.json").write_text(
        json.dumps({"eos_token_id": 7, "max_position_embeddings": 99, "hidden_size": 1})
    )
    config = decoder_config()
    save_hf(tmp_path / "deep/er/out", random_params(config), config, tokenizer_folder=source)
    assert sorted(path.name for path in (tmp_path / "deep/er/out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    written = json.loads((tmp_path / "deep/er/out/config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"], written["hidden_size"]) == (7, 99, 32)
    modes = {path.stat().st_mode for path in (tmp_path / "deep/er/out").iterdir()}
    assert len(modes) == 1  # whoever may read config.json may read the weights


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config()
    params = random_params(config)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/left_over").write_text("of a killed export")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            save_hf(tmp_path / "out", params, config)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty folder may be filled
    save_hf(tmp_path / "out", params, config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        save_hf(tmp_path / "out", random_params(config, 5), config)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_save_refuses_what_does_not_belong(tmp_path: Path) -> None:
    config = decoder_config()
    params = random_params(config)
    tied = decoder_config(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head has shape \(64, 32\), but the config needs None"):
        save_hf(tmp_path / "out", params, tied)
    with pytest.raises(ValueError, match=r"down has shape \(3, 48, 32\), but the config needs \(3, 40, 32\)"):
        save_hf(tmp_path / "out", params, decoder_config(intermediate_size=40))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer files"):
        save_hf(tmp_path / "out", params, config, tokenizer_folder=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = decoder_config()
    save_hf(tmp_path / "saved", random_params(config), config)
    return tmp_path / "saved"


def rewrite(folder: Path, drop: tuple[str, ...] = (), **add: np.ndarray) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if name not in drop}
    save_file(tensors | add, folder / "model.safetensors")


def test_missing_and_unknown_tensors_are_refused(saved: Path) -> None:
    rewrite(saved, drop=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"2 missing tensors.*: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm"):
        load_hf(saved, decoder_config())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: name.replace(".mlp.", "._orig_mod.mlp.") if "layers.1" in name else name,
    ],
)
@pytest.mark.parametrize("files", [1, 3])
def test_weights_under_a_wrappers_prefix_are_read(saved: Path, files: int, wrapped: Any) -> None:
    """In one file or in several with an index, bit for bit."""
    expected = load_hf(saved, decoder_config())
    tensors = {wrapped(name): x for name, x in load_file(saved / "model.safetensors").items()}
    if files == 1:
        save_file(tensors, saved / "model.safetensors")
    else:
        (saved / "model.safetensors").unlink()
        where = {name: f"{i % files}.safetensors" for i, name in enumerate(tensors)}
        for file in set(where.values()):
            save_file({name: x for name, x in tensors.items() if where[name] == file}, saved / file)
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same(load_hf(saved, decoder_config()), expected)


def test_errors_of_wrapped_tensors_name_them_as_they_are_stored(saved: Path) -> None:
    tensors = {f"module.{name}": x for name, x in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor module\.model\.layers\.0\.mlp\.\w+\.weight has shape .*needs"):
        load_hf(saved, decoder_config(intermediate_size=40))
    with pytest.raises(ValueError, match=r"12 unknown tensors.*module\.model\.layers\.2.*prefix module\. of a wrapper"):
        load_hf(saved, decoder_config(num_layers=2))
    rewrite(saved, **{"module.model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(ValueError, match=r"tensor module\.model\.norm\.weight has type I8"):
        load_hf(saved, decoder_config())


def test_an_adapter_is_no_model(saved: Path) -> None:
    rewrite(saved, **{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(ValueError, match=r"1 tensors of a LoRA adapter.*lora_A.*not merged"):
        load_hf(saved, decoder_config())
    (saved / "adapter_config.json").write_text("{}")
    (saved / "model.safetensors").rename(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds a LoRA adapter .*not a model"):
        load_hf(saved, decoder_config())
    assert read_architecture(saved) == TINY  # of the model beside it
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds a LoRA adapter .*not a model"):
        read_architecture(saved)


def test_a_config_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"12 unknown tensors.*model\.layers\.2.*, \.\.\..* config\.json"):
        load_hf(saved, decoder_config(num_layers=2))
    with pytest.raises(ValueError, match=r"12 missing tensors.*model\.layers\.3"):
        load_hf(saved, decoder_config(num_layers=4))
    with pytest.raises(ValueError, match=r"9 unknown tensors.*k_proj\.bias"):
        load_hf(saved, decoder_config(qkv_bias=False))
    shapes = r"mlp\.down_proj\.weight has shape \(32, 48\), but the policy needs \(32, 40\)"
    with pytest.raises(ValueError, match=shapes) as caught:
        load_hf(saved, decoder_config(intermediate_size=40))
    assert str(saved / "model.safetensors") in str(caught.value)
    # As many numbers in another shape must not be reshaped silently.
    rewrite(saved, **{"model.embed_tokens.weight": np.ones((32, 64), np.float32)})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(32, 64\), but the policy needs \(64, 32\)"):
        load_hf(saved, decoder_config())


def test_repeated_head_and_rotary_frequencies_are_ignored(saved: Path) -> None:
    rewrite(saved, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert "lm_head" in load_hf(saved, decoder_config())
    assert "lm_head" not in load_hf(saved, decoder_config(tie_word_embeddings=True))


def test_quantised_weights_are_refused(saved: Path) -> None:
    rewrite(saved, **{"model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has type I8.*before quantisation"):
        load_hf(saved, decoder_config())


@pytest.mark.parametrize("keep", [0, 5, 200, -8])
def test_truncated_files_are_refused(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .*Download it again") as caught:
        load_hf(saved, decoder_config())
    assert str(path) in str(caught.value)


def test_folders_without_safetensors_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .* pickled weights .* are not read"):
        load_hf(saved, decoder_config())
    index = saved / "model.safetensors.index.json"
    for text, message in (
        ("{", "broken JSON"),
        ("{}", "weight_map = None"),
        ('{"weight_map": {"a": 1}}', "does not map tensors to files"),
        ('{"weight_map": {"model.norm.weight": "gone.safetensors"}}', r"gone\.safetensors: cannot be read"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_hf(saved, decoder_config())
