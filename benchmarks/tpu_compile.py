"""Plan the recipes on the TPU slices that they name: do they fit, what does a step cost. Needs no TPU.

    pip install -e ".[tpu]"
    python benchmarks/tpu_compile.py                  # all, at mean lengths of 150 and 900; about 25 minutes on 2 cores
    python benchmarks/tpu_compile.py 1.5b             # those whose name contains it
    python benchmarks/tpu_compile.py --out benchmarks/plans    # keep what is printed, and the figures as JSON
    python benchmarks/tpu_compile.py --hlo /tmp/hlo 1.5b       # and the programs' texts

Neither weights nor a tokenizer are needed: of a model that a recipe loads only `config.json` matters, and those of
Qwen2.5-Math are written to a temporary folder. Exit status 1 if a program does not fit.
"""

import argparse
import contextlib
import io
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
LENGTHS = {"arithmetic_cpu": "prompt=10,response=5"}  # of all others: mean tokens of prompts and responses as below
USUAL = "prompt=150,response=900"
RUNS = [
    ("arithmetic_cpu", "v5e:2x2", ["device=tpu", "mesh.fsdp=2", "mesh.tensor=2"]),
    ("qwen2.5_math_1.5b", "v5e:4x4", []),
    ("qwen2.5_math_7b", "v5e:8x8", []),
    ("qwen2.5_math_7b", "v5p:2x2x4", ["mesh.tensor=1"]),
]


class Both(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def main(arguments: argparse.Namespace) -> int:
    fits = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, topology, overrides in RUNS:
            if arguments.names and not any(word in f"{name} {topology}" for word in arguments.names):
                continue
            load = []
            if name in SHAPES:
                (Path(scratch) / name).mkdir(exist_ok=True)
                (Path(scratch) / name / "config.json").write_text(json.dumps(SHAPES[name]))
                load = [f"policy.load={Path(scratch) / name}"]
            config = load_config(CONFIGS / f"{name}.yaml", [*overrides, *arguments.set, *load])
            file = f"{name}_{topology.replace(':', '_')}"
            json_file = arguments.out / f"{file}.json" if arguments.out else None
            hlo = arguments.hlo / file if arguments.hlo else None
            with contextlib.redirect_stdout(Both()) as printed:
                print(f"dynamo-jax plan configs/{name}.yaml --topology {topology}", *overrides, *arguments.set)
                lengths = arguments.lengths or LENGTHS.get(name, USUAL)
                fits &= plan_command(config, topology, lengths=lengths, json_file=json_file, hlo=hlo)
                print()
            if arguments.out:
                (arguments.out / f"{file}.txt").write_text(printed.getvalue())
    return 0 if fits else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of recipes and topologies; default: all")
    parser.add_argument("--lengths", help=f"as of dynamo-jax plan; default {USUAL}")
    parser.add_argument("--out", type=Path, help="folder that gets the text and the JSON of each plan")
    parser.add_argument("--hlo", type=Path, help="folder that gets the compiled texts")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of all recipes")
    sys.exit(main(parser.parse_args()))
