"""Compile all programs of the recipes for the TPU slices that they name, and print the tables. Needs no TPU.

    pip install -e ".[tpu]"
    python benchmarks/tpu_compile.py          # all; takes about 12 minutes on 2 cores
    python benchmarks/tpu_compile.py 1.5b     # those whose name contains it

Neither weights nor a tokenizer are needed: of a model that a recipe loads only `config.json` matters, and those of
Qwen2.5-Math are written to a temporary folder. Exit status 1 if a program does not fit.
"""

import json
import sys
import tempfile
from pathlib import Path

from dynamo_jax.config import load_config
from dynamo_jax.plan import plan_command

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# https://huggingface.co/Qwen/Qwen2.5-Math-1.5B and -7B, config.json, as far as a decoder's shape depends on it.
QWEN = {"model_type": "qwen2", "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 10000}
SHAPES = {
    "qwen2.5_math_1.5b": QWEN
    | {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
    | {"vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5_math_7b": QWEN
    | {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
    | {"vocab_size": 152064, "tie_word_embeddings": False},
}
RUNS = [
    ("arithmetic_cpu", "v5e:2x2", ["device=tpu", "mesh.fsdp=2", "mesh.tensor=2"]),
    ("qwen2.5_math_1.5b", "v5e:4x4", []),
    ("qwen2.5_math_7b", "v5e:8x8", []),
]


def main(wanted: list[str]) -> int:
    fits = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, topology, overrides in RUNS:
            if wanted and not any(word in name for word in wanted):
                continue
            if name in SHAPES:
                (Path(scratch) / name).mkdir()
                (Path(scratch) / name / "config.json").write_text(json.dumps(SHAPES[name]))
                overrides = [*overrides, f"policy.load={Path(scratch) / name}"]
            print(f"\n{name}: ", end="", flush=True)
            fits &= plan_command(load_config(CONFIGS / f"{name}.yaml", overrides), topology)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
