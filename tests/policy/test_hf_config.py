"""Which `config.json` files are read, and how the others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_jax.config import ArchitectureConfig
from dynamo_jax.policy import read_architecture

TINY = ArchitectureConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, vocab_size=64,
    rope_theta=1000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip


def write_config(folder: Path, **changes: Any) -> None:
    """A plain config.json with some keys changed; a key set to `...` is left out."""
    data: dict[str, Any] = {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, "rope_theta": 1000,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    data = {key: value for key, value in (data | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1000.0}},  # transformers 5 reads the newer one
        {"rope_scaling": None, "use_sliding_window": False, "sliding_window": 4096, "head_dim": 8},
        {"rope_scaling": {"type": "default"}, "layer_types": ["full_attention"] * 3, "hidden_act": "silu"},
    ],
)
def test_both_spellings_of_a_config_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_config(tmp_path, **changes)
    assert read_architecture(tmp_path) == TINY


def test_missing_keys_mean_what_transformers_means(tmp_path: Path) -> None:
    write_config(tmp_path, rope_theta=..., rms_norm_eps=..., tie_word_embeddings=...)
    shape = read_architecture(tmp_path)
    assert (shape.rope_theta, shape.rms_norm_eps, shape.tie_word_embeddings) == (10000.0, 1e-6, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r'model_type = "llama": only "qwen2" is supported\. Choose'),
        ({"model_type": ...}, "model_type = null"),
        ({"use_sliding_window": True}, "use_sliding_window = true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling = .*yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters = .*linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters = .*full_attention"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3': .*integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4: is not a multiple of num_kv_heads = 3"),
        ({"hidden_size": 30}, "hidden_size = 30: is not a multiple of num_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7: .*even"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{broken", "broken JSON: .*line 1"),
        ("", "broken JSON"),
        ("[1]", "holds a list, not a JSON object"),
    ],
)
def test_unreadable_configs_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
