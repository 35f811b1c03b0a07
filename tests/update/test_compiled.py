"""What the TPU compiler makes of score and update on a slice, read from its text. Needs libtpu, and no TPU."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is missing: pip install dynamo_jax[tpu]"
)

ROOT = Path(__file__).resolve().parents[2]
ROWS, SLOTS, DEVICES, VOCABULARY, WIDTH, HEAD = 16, 256, 4, 8192, 512, 128
SHAPE = {
    "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": HEAD,
    "intermediate_size": 1024, "vocab_size": VOCABULARY,
}  # fmt: skip
OVERRIDES = [
    f"policy.architecture={json.dumps(SHAPE)}", "policy.param_dtype=bfloat16", "policy.compute_dtype=bfloat16",
    "policy.remat=full", f"task.max_prompt_tokens={SLOTS // 2}", f"rollout.max_tokens={SLOTS // 2}",
    "rollout.prompts=8", "rollout.per_prompt=4", "rollout.batch=16",
    f"trainer.micro_batch={ROWS}", f"mesh.fsdp={DEVICES}", "modulation.enabled=true",
]  # fmt: skip
COMPILE = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from dynamo_jax.config import load_config
from dynamo_jax.plan import run_jobs, topology_devices
from dynamo_jax.sharding import make_mesh, sharding

folder, recipe, *overrides = sys.argv[1:]
config = load_config(recipe, overrides)
mesh = make_mesh(config.mesh, topology_devices("v5e:2x2"))
for job in run_jobs(config, mesh):
    if job.name in ("score", "update"):
        Path(folder, f"{job.name}.txt").write_text(job.function.lower(*job.arguments).compile().as_text())

# The gradient of a weight that every device gets whole, which the tests below must be able to find.
x = jax.ShapeDtypeStruct((16, 256, 512), jnp.bfloat16, sharding=sharding(mesh, "batch"))
whole = jax.jit(lambda x: jnp.einsum("bqd,bqf->df", x, x), out_shardings=sharding(mesh))
Path(folder, "whole.txt").write_text(whole.lower(x).compile().as_text())
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In a process of its own: libtpu takes a lock, and jax here runs on eight CPU devices already."""
    folder = tmp_path_factory.mktemp("compiled")
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    recipe = str(ROOT / "configs" / "arithmetic_cpu.yaml")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder), recipe, *OVERRIDES],
        cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def sizes(text: str) -> list[int]:
    """The number of elements of every array, on one device."""
    return [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b(?:bf16|f32|s32|pred)\[([\d,]+)\]", text)]


def reduced(text: str) -> list[int]:
    """Of the results of all-reduces."""
    lines = re.findall(r"= (\S+|\(.*?\)) all-reduce(?:-start)?\(", text)
    return [size for line in lines for size in sizes(line)]


def test_no_product_is_split_along_what_it_sums_over(texts: dict[str, str]) -> None:
    """Such partial products are a loop in which parts of the weight go from device to device. Weights are gathered."""
    for name in ("score", "update"):
        assert " all-gather" in texts[name]
        assert not re.findall("windowed_dot_general|collective-permute", texts[name])


def test_no_array_of_tokens_by_vocabulary(texts: dict[str, str]) -> None:
    logits = ROWS * SLOTS // DEVICES * VOCABULARY
    for name in ("score", "update"):
        assert VOCABULARY * WIDTH <= max(sizes(texts[name])) < logits


def test_no_gradient_of_a_whole_weight_is_summed_over_all_devices(texts: dict[str, str]) -> None:
    """Scattered while it is made, or once an update; what is left to be summed whole are norms, biases and metrics."""
    smallest = WIDTH * 2 * HEAD  # of keys or values; far smaller ones the compiler sums whole, as it is quicker
    assert max(reduced(texts["whole"])) >= smallest  # the search is able to find it
    for name in ("score", "update"):
        assert max(reduced(texts[name]), default=0) < smallest
