"""Names of stored tensors: under wrappers' prefixes, twice, of adapters, and none that fits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_jax.config import ArchitectureConfig
from dynamo_jax.policy import DecoderConfig
from dynamo_jax.policy.params import axis_sizes, params_of
from dynamo_jax.policy.tensor_names import locate, refuse_adapter

SHAPE = ArchitectureConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=64,
    tie_word_embeddings=False,
)  # fmt: skip
FILE = Path("folder/model.safetensors")
NAMES = [name for param in params_of(SHAPE).values() for name in param.hf_names(axis_sizes(SHAPE))]


def located(names: list[str], **shape: object) -> dict[str, str]:
    """Name that the policy asks for -> name in the file."""
    config = DecoderConfig(dataclasses.replace(SHAPE, **shape))
    return {tensor: name for tensor, (_, name) in locate(FILE.parent, [(FILE, n) for n in names], config).items()}


def in_layers(part: str) -> Callable[[str], str]:
    return lambda name: name.replace(".self_attn.", f".{part}self_attn.").replace("layers.1.", f"layers.1.{part}")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: name,
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "base_model.model." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "_orig_mod.module." + name,
        lambda name: "module.module." + name,
        lambda name: "base_model.model._orig_mod." + name,
        lambda name: "module.base_model.model." + name,
        lambda name: "_fsdp_wrapped_module._orig_mod." + name,
        # Wrapped in part: the decoder without its head, each layer, one layer, the blocks in them.
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: name if name == "lm_head.weight" else "module." + name,
        lambda name: name if "norm" in name else "_orig_mod." + name,
        in_layers("_orig_mod."),
        in_layers("_fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda name: "module." + in_layers("_orig_mod.")(name),
    ],
)  # fmt: skip
def test_prefixes_are_taken_off_where_the_rest_fits(wrapped: Callable[[str], str]) -> None:
    assert located([wrapped(name) for name in NAMES]) == {name: wrapped(name) for name in NAMES}
    tied = [wrapped(name) for name in [*NAMES, "model.layers.0.self_attn.rotary_emb.inv_freq"]]
    assert located(tied, tie_word_embeddings=True).keys() >= set(NAMES) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        # The rest does not fit.
        (["module." + n.removeprefix("model.") for n in NAMES], [
            "38 missing tensors", "model.embed_tokens.weight, ", "The prefix module. of a wrapper",
            "module.embed_tokens.weight fits neither with it nor without"]),
        (["_orig_mod.transformer." + n for n in NAMES], ["39 missing", "The prefix _orig_mod. of a", "neither"]),
        (["base_model.model." + n for n in NAMES[1:]], [
            "1 missing", "model.embed_tokens.weight. The prefix base_model.model. of a wrapper was taken off where the "
            "rest fits. Use the config.json"]),
        (["module._orig_mod." + n for n in [*NAMES, "v_head.weight"]], [
            "1 unknown", "module._orig_mod.v_head.weight", "The prefix module._orig_mod. of a wrapper"]),
        (["module." + n for n in [*NAMES, "model.layers.3.mlp.up_proj.weight"]], ["1 unknown", "module.model.layers"]),
        ([*NAMES, "_orig_mod.step"], ["1 unknown tensors in the safetensors: _orig_mod.step. The prefix _orig_mod."]),
        (["_orig_mod." + n if "norm" in n else "module." + n for n in NAMES[1:]], ["1 missing", "_orig_mod., module."]),
        # One tensor twice.
        ([*NAMES, "module.model.norm.weight"], [
            "model.norm.weight in model.safetensors and module.model.norm.weight in model.safetensors are both",
            "the tensor model.norm.weight"]),
        (["_orig_mod." + n for n in NAMES] + ["module." + n for n in NAMES], [
            "_orig_mod.model.embed_tokens.weight in", "and module.model.embed_tokens.weight in", "Take the one out"]),
        ([*NAMES, "model.norm._orig_mod.weight"], ["model.norm._orig_mod.weight in", "are both"]),
        ([*NAMES, NAMES[3]], [f"{NAMES[3]} in model.safetensors and {NAMES[3]} in model.safetensors are both"]),
        # Adapters.
        ([f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(3) for x in "AB"], [
            "6 tensors of a LoRA adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ",
            "not merged here", "merge_and_unload"]),
        ([*NAMES, "base_model.model.model.embed_tokens.lora_embedding_A.default"], ["1 tensors of a LoRA adapter"]),
        ([*NAMES, "model.layers.0.self_attn.v_proj.lora_magnitude_vector.default.weight"], ["of a LoRA adapter"]),
        ([n.replace("q_proj.", "q_proj.base_layer.") for n in NAMES] + ["model.layers.2.mlp.up_proj.lora_B.default"],
            ["1 tensors of a LoRA adapter", "lora_B.default."]),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_told_as_they_are_stored(names: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^folder: ") as caught:
        located(names)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["my_module." + n for n in NAMES], "39 missing tensors in the safetensors: lm_head.weight, model.embed"),
        (["modules." + n for n in NAMES], "39 missing tensors in the safetensors: lm_head.weight, model.embed"),
        (["model." + n for n in NAMES], "39 missing tensors in the safetensors: lm_head.weight, model.embed"),
        ([n.removeprefix("model.") for n in NAMES], "38 missing tensors in the safetensors: model.embed"),
        ([*NAMES, "value_head.weight"], "1 unknown tensors in the safetensors: value_head.weight. Use"),
        ([*NAMES, "model.layers.3.module"], "1 unknown tensors in the safetensors: model.layers.3.module. Use"),
        ([], "39 missing tensors in the safetensors: lm_head.weight, model.embed"),
    ],
)
def test_names_without_a_wrapper_are_told_of_as_ever(names: list[str], found: str) -> None:
    with pytest.raises(ValueError, match=r"^folder: ") as caught:
        located(names)
    assert str(caught.value).startswith(f"folder: {found}")
    assert str(caught.value).endswith("these weights (layers, tied head, biases), or download them again.")
    assert "wrapper" not in str(caught.value)


def test_the_same_name_in_two_files_is_an_error() -> None:
    first, second = Path("folder/1.safetensors"), Path("folder/2.safetensors")
    stored = [(first, name) for name in NAMES] + [(second, "module.model.norm.weight")]
    with pytest.raises(
        ValueError, match=r"norm\.weight in 1\.safetensors and module.* in 2\.safetensors are both the tensor"
    ):
        locate(FILE.parent, stored, DecoderConfig(SHAPE))


def test_a_hostile_name_is_read_in_a_moment() -> None:
    """Names come from the file: long ones of many wrappers cost no more than their length."""
    with pytest.raises(ValueError, match="1 unknown tensors"):
        located([*NAMES, "module." * 100_000 + "_orig_mod" * 100_000])


def test_an_adapters_folder_says_what_it_is(tmp_path: Path) -> None:
    refuse_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds a LoRA adapter \(adapter_config\.json\), not a model\. .*merge_and_unload"
    ):
        refuse_adapter(tmp_path)
