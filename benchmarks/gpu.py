"""What only a GPU can tell: the token statistics' forms and kernel there, and a short run there against one on the CPU.

    python benchmarks/gpu.py --out gpu.json           # where there is a CUDA GPU; under 4 minutes on an H100
    python benchmarks/gpu.py --small --out gpu.json   # anywhere, tiny: whether the script works

Each form is compared with float64, values and gradients. `naive` is the definitions written down, with the platform's
default products. Extra memory is what the compiled program needs beside its arguments and results. The runs go on from
one checkpoint, made on the CPU, so their first step starts from equal weights. Exit status 1 if a form fails or errs by
more than its bound, or if a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the run shares the GPU with this process
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from token_stats import naive, with_gradient  # noqa: E402 - the benchmark beside this one

from dynamo_jax.kernels.token_stats import token_stats  # noqa: E402

FORMS: dict[str, Callable[..., Any]] = {
    "naive": naive,
    "chunked": lambda *a: tuple(token_stats(*a, impl="chunked")),
    "pallas_gpu": lambda *a: tuple(token_stats(*a, impl="pallas_gpu")),
}
BLOCKS = [(64, 128), (128, 64), (128, 256)]  # of the kernel, beside its own (128, 128)
VALUES = ("logp", "entropy", "lambda_mean")
# Largest error of a value; of a gradient, in the norm. Gradients of bfloat16 are rounded to it. Not held to: naive.
BOUNDS = {"float32": (2e-5, 1e-5), "bfloat16": (2e-4, 6e-3)}
CHUNK = 256  # tokens of the float64 reference at a time


def inputs(T: int, D: int, V: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Logits of standard deviation 3, the largest about 15. Weights of logp and entropy as a loss would have them."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, head = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, ((T, D), (V, D)), strict=False))
    targets = jax.random.randint(keys[2], (T,), 0, V, jnp.int32)
    weights = tuple(jax.random.normal(k, (T,), jnp.float32) for k in keys[3:])
    return (3 * D**-0.5 * hidden).astype(dtype), head.astype(dtype), targets, weights


def in_float64(arguments: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """logp, entropy, lambda_mean, d_hidden, d_head."""
    jax.config.update("jax_enable_x64", True)
    try:
        hidden, head, targets, weights = jax.device_put(jax.device_get(arguments))
        head = head.astype(jnp.float64)

        @jax.jit
        def some(hidden_tD: Any, head: Any, targets_t: Any, weights_t: Any, d_head_VD: Any) -> Any:
            hidden_tD = hidden_tD.astype(jnp.float64)
            z = hidden_tD @ head.T
            logp = jax.nn.log_softmax(z, axis=-1)
            p, at = jnp.exp(logp), jnp.arange(len(targets_t))
            entropy = -jnp.sum(p * logp, axis=-1)
            surprise = logp + entropy[:, None]
            dz = -p * (weights_t[0][:, None] + weights_t[1][:, None] * surprise)
            dz = dz.at[at, targets_t].add(weights_t[0])
            values = logp[at, targets_t], entropy, jnp.sum(p * p * surprise, axis=-1)
            return (*values, dz @ head), d_head_VD + dz.T @ hidden_tD

        d_head, parts = jnp.zeros(head.shape, jnp.float64), []
        for first in range(0, len(targets), CHUNK):
            rows = slice(first, first + CHUNK)
            part, d_head = some(hidden[rows], head, targets[rows], tuple(w[rows] for w in weights), d_head)
            parts.append(jax.device_get(part))
        return (*(np.concatenate(x) for x in zip(*parts, strict=True)), np.asarray(d_head))
    finally:
        jax.config.update("jax_enable_x64", False)


def timed(f: Callable[..., Any], arguments: tuple[Any, ...], rounds: int) -> tuple[Any, dict[str, float]]:
    """The result; seconds (median) and extra bytes."""
    compiled = jax.jit(f).lower(*arguments).compile()
    result = jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    return result, {"seconds": statistics.median(seconds), "extra": compiled.memory_analysis().temp_size_in_bytes}


def measured(form: Callable[..., Any], arguments: tuple[Any, ...], expected: Any, rounds: int) -> dict[str, Any]:
    """Errors, time and memory of a form: its forward pass alone, and value and gradient."""
    values, forward = timed(form, arguments[:3], rounds)
    ((_, again), gradients), both = timed(with_gradient(form), arguments, rounds)
    errors = {}
    for name, x, y, z in zip(VALUES, values, again, expected, strict=False):
        errors[name] = max(float(np.abs(np.asarray(v, np.float64) - z).max()) for v in (x, y))
    for name, x, y in zip(("d_hidden", "d_head"), gradients, expected[3:], strict=True):
        errors[name] = float(np.linalg.norm(np.asarray(x.astype(jnp.float32)) - y) / np.linalg.norm(y))
    return {"forward": forward, "value and gradient": both, "errors": errors}


def kernels(small: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure and print every form; what went wrong."""
    cases = [(4096, 1536, 151936, jnp.bfloat16, 10), (512, 256, 32003, jnp.float32, 10)]
    if small:
        cases = [(48, 32, 700, jnp.bfloat16, 1), (21, 16, 151, jnp.float32, 1)]
    results, wrong = [], []
    for T, D, V, dtype, rounds in cases:
        name = jnp.dtype(dtype).name
        arguments = inputs(T, D, V, dtype)
        expected = in_float64(arguments)
        print(f"\nT = {T}, D = {D}, V = {V}, {name}, {jax.devices()[0].device_kind}, median of {rounds}")
        print(f"{'':24s}{'forward':>10s}{'TFLOP/s':>9s}{'extra MB':>10s}{'and grad':>10s}{'extra MB':>10s}   errors")
        for form, f in FORMS.items():
            case: dict[str, Any] = {"T": T, "D": D, "V": V, "dtype": name, "form": form}
            results.append(case)
            try:
                case |= measured(f, arguments, expected, rounds)
            except Exception as error:  # a kernel that the card refuses must not hide what the others do
                case["failed"] = str(error)
                wrong.append(f"{form}, {name}: {str(error)[:2000]}")
                continue
            one, two = case["forward"], case["value and gradient"]
            print(
                f"{form:24s}{one['seconds']:10.4f}{2e-12 * T * D * V / one['seconds']:9.1f}{one['extra'] / 1e6:10.1f}"
                f"{two['seconds']:10.4f}{two['extra'] / 1e6:10.1f}   "
                + "  ".join(f"{key} {error:.1e}" for key, error in case["errors"].items()),
                flush=True,
            )
            for key, error in case["errors"].items():
                bound = BOUNDS[name][key not in VALUES]
                if form != "naive" and not error <= bound:
                    wrong.append(f"{form}, {name}: {key} errs by {error:.1e}, more than {bound:.0e}")
        for blocks in [] if small else BLOCKS:
            case = {"T": T, "D": D, "V": V, "dtype": name, "form": f"pallas_gpu, blocks {blocks}"}
            results.append(case)
            try:
                f = partial(token_stats, impl="pallas_gpu", blocks=blocks)
                _, case["forward"] = timed(f, arguments[:3], rounds)
                print(f"{case['form']:24s}{case['forward']['seconds']:10.4f}", flush=True)
            except Exception as error:  # too much for the card: not an error, but a finding
                case["failed"] = str(error)
                print(f"{case['form']:24s} {str(error).splitlines()[0][:90]}", flush=True)
    return results, wrong


class Run:
    """One `dynamo-jax train` of the built-in task, in a process of its own."""

    def __init__(self, folder: Path, device: str, steps: int, small: bool) -> None:
        self.folder, self.device = folder, device
        overrides = [f"run_dir={folder}", f"device={device}", f"trainer.steps={steps}", "eval.every=0"]
        overrides += ["checkpoint.every=1", "logging.progress=false", "logging.rollouts_per_step=512"]
        overrides += ["warmup.steps=5", "rollout.prompts=8"] if small else ["warmup.steps=300"]
        command = [sys.executable, "-m", "dynamo_jax", "train", str(ROOT / "configs" / "arithmetic_cpu.yaml")]
        self.log = folder.with_suffix(".log").open("w+")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen([*command, *overrides], stdout=self.log, stderr=self.log, env=environment)

    def finish(self, seconds: float) -> str | None:
        """Why it failed, if it did."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.log.seek(0)
        return f"the run on {self.device} ended with {status}: {self.log.read()[-2000:]}" if status else None

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def rollouts(self, step: int) -> list[str]:
        return (self.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()


def compared(base: Run, small: bool) -> dict[str, Any] | str:
    """Five steps on each device, from the checkpoint that `base` ends with. A string: why there is nothing to say."""
    seconds = 900 if small else 120  # a lent GPU must not be waited away; a busy machine of 2 cores is slow
    if failure := base.finish(seconds):
        return failure
    first = base.metrics()[-1]["step"]
    runs = {}
    for name, device in (("cpu", "cpu"), ("gpu", "cpu" if small else "gpu")):
        folder = base.folder.with_name(name)
        shutil.copytree(base.folder, folder)
        runs[name] = Run(folder, device, first + (2 if small else 5), small)
    failures = [failure for run in runs.values() if (failure := run.finish(seconds))]
    if failures:
        return "\n".join(failures)
    cpu, gpu = runs["cpu"], runs["gpu"]
    kept = ("objective/loss", "objective/grad_norm", "reward/mean", "rollout/tokens_per_second")
    steps = []
    print(f"\n{'step':>4s}{'rollouts equal':>18s}{'loss apart':>12s}", end="")
    print("".join(f"{f'{what}, {name}':>19s}" for what in ("gradient", "seconds", "tokens/s") for name in runs))
    for x, y in zip(cpu.metrics()[first + 1 :], gpu.metrics()[first + 1 :], strict=True):
        pairs = list(zip(cpu.rollouts(x["step"]), gpu.rollouts(x["step"]), strict=True))
        step = {"step": x["step"], "rollouts": len(pairs), "equal": sum(a == b for a, b in pairs)}
        for name, line in (("cpu", x), ("gpu", y)):
            step[name] = {key: line[key] for key in kept}
            step[name]["seconds"] = sum(value for key, value in line.items() if key.startswith("time/"))
        steps.append(step)
        apart = abs(x["objective/loss"] - y["objective/loss"])
        print(f"{step['step']:4d}{step['equal']:11d} of {step['rollouts']:3d}{apart:12.1e}", end="")
        columns = (("objective/grad_norm", 6), ("seconds", 2), ("rollout/tokens_per_second", 0))
        print("".join(f"{step[name][key]:19.{digits}f}" for key, digits in columns for name in runs))
    return {"config": "configs/arithmetic_cpu.yaml", "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure on a GPU.")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    arguments = parser.parse_args()
    if arguments.small:
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    if device.platform != "gpu" and not arguments.small:
        parser.error(f"there is no GPU here but {device.device_kind}; --small tries the script out")
    report: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        base = Run(Path(folder, "base"), "cpu", 1, arguments.small)  # meanwhile the GPU is measured
        report["kernels"], wrong = kernels(arguments.small)
        report["run"] = compared(base, arguments.small)
    if isinstance(report["run"], str):
        wrong.append(report["run"])
    report["wrong"] = wrong
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(["", *wrong]) if wrong else "\nall within their bounds")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
