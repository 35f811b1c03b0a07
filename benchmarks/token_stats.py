"""Token statistics: ours against plain code, chunks of tokens and other projects' kernels, in memory and time.

    python benchmarks/token_stats.py cpu        # measured, on this machine's processor; 2 minutes
    python benchmarks/token_stats.py tpu        # compiled for a v5e and estimated; needs libtpu, no TPU; 5 minutes
    python benchmarks/token_stats.py ceilings   # compiled for v5e, v5p, v6e, v4; status 1 if one needs too much HBM
    python benchmarks/token_stats.py gpu        # measured, where there is a GPU; NOT YET RUN

Value and gradient of logp and H, except where a form gives logp alone. Every ratio is to `naive` in the same run: the
definitions written down, with the platform's default matrix products.

The estimate for TPUs is the compiler's own: the `estimated_cycles` of each fusion, loops times their turns. Of the
Pallas kernel it says nothing; its time is that of its matrix products at the peak rate, times the length of its inner
loop's schedule (VLIW bundles) with the sums over that without.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from dynamo_jax.kernels.token_stats import pallas_tpu, token_stats  # noqa: E402

MODELS = {"1.5B": (1536, 151936), "7B": (3584, 152064)}
CEILING_MB = {"1.5B": 128, "7B": 256}  # of extra HBM at T = 8192
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v4": "v4:2x2x1"}
FLOPS_A_CYCLE = 4 * 128 * 128 * 2  # of a v5e, 197e12 / 1.5e9


def naive(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    z = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(z, axis=-1)
    p = jnp.exp(logp)
    entropy = -jnp.sum(p * logp, axis=-1)
    lambda_mean = jnp.sum(p * p * (logp + entropy[:, None]), axis=-1)
    return jnp.take_along_axis(logp, targets[:, None], 1)[:, 0], entropy, jax.lax.stop_gradient(lambda_mean)


def token_chunks(hidden: jax.Array, head: jax.Array, targets: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Chunks of tokens, each computed again in the backward pass."""
    split = [x.reshape(-1, size, *x.shape[1:]) for x in (hidden, targets)]
    stats = jax.lax.map(lambda x: jax.checkpoint(naive)(x[0], head, x[1]), tuple(split))
    return tuple(x.reshape(-1) for x in stats)


def optax_logp(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    import optax

    z = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    return (-optax.softmax_cross_entropy_with_integer_labels(z, targets),)


def tokamax_logp(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    import tokamax

    # Its sum; the gradient is that of equal weights.
    return (-tokamax.linear_softmax_cross_entropy_loss(hidden, targets, head.T, reduction="sum")[None],)


def forms(chunk: int) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "naive": naive,
        "ours": lambda *a: tuple(token_stats(*a)),
        "ours, chunked": lambda *a: tuple(token_stats(*a, impl="chunked")),
        f"{chunk} tokens a chunk": partial(token_chunks, size=chunk),
    }
    if importlib.util.find_spec("optax"):
        found["optax (logp only)"] = optax_logp
    if importlib.util.find_spec("tokamax"):
        found["tokamax (logp only)"] = tokamax_logp
    return found


def with_gradient(form: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: tuple[jax.Array, jax.Array]) -> Any:
        def loss(hidden: jax.Array, head: jax.Array) -> Any:
            stats = form(hidden, head, targets)
            return sum(jnp.sum(g * x) for g, x in zip(weights, stats, strict=False)), stats

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    return run


def measure(T: int, D: int, V: int, dtype: Any, chunk: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Print and return seconds (median) and extra bytes of each form, the forms in turn, so that all see one load."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s) * D**-0.25, dtype) for s in ((T, D), (V, D)))
    targets = jnp.asarray(rng.integers(0, V, T), jnp.int32)
    weights = tuple(jnp.asarray(rng.normal(size=T), jnp.float32) for _ in range(2))
    arguments = (hidden, head, targets, weights)
    compiled, results = {}, {}
    for name, form in forms(chunk).items():
        try:
            compiled[name] = jax.jit(with_gradient(form)).lower(*arguments).compile()
            jax.block_until_ready(compiled[name](*arguments))
        except Exception as error:  # another project's kernel that does not run here
            if name.startswith("ours"):
                raise
            print(f"{name}: {str(error).splitlines()[0][:100]}")
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, f in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            seconds[name].append(time.perf_counter() - began)
    print(f"\nT = {T}, D = {D}, V = {V}, {jnp.dtype(dtype).name}, {jax.devices()[0].device_kind}, {rounds} rounds")
    print(f"{'':24s}{'seconds':>9s}{'/ naive':>9s}{'extra MB':>10s}{'/ naive':>9s}")
    plain = compiled["naive"].memory_analysis().temp_size_in_bytes
    for name, f in compiled.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["naive"], strict=True))
        extra = f.memory_analysis().temp_size_in_bytes
        results[name] = (statistics.median(seconds[name]), extra)
        print(f"{name:24s}{results[name][0]:9.3f}{ratio:9.2f}{extra / 1e6:10.1f}{extra / plain:9.3f}")
    return results


def skipping(T: int, D: int, V: int, rounds: int) -> None:
    """The time if only some tokens count."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s) * D**-0.25, jnp.float32) for s in ((T, D), (V, D)))
    targets, one = jnp.asarray(rng.integers(0, V, T), jnp.int32), (jnp.ones(T),) * 2
    f = jax.jit(lambda h, w, mask: with_gradient(lambda *a: tuple(token_stats(*a, mask=mask)))(h, w, targets, one))
    order = rng.permutation(T)
    masks = {share: jnp.asarray(order < share * T) for share in (1.0, 0.5, 0.25)}
    seconds: dict[float, list[float]] = {share: [] for share in masks}
    for _ in range(rounds + 1):
        for share, mask in masks.items():
            began = time.perf_counter()
            jax.block_until_ready(f(hidden, head, mask))
            seconds[share].append(time.perf_counter() - began)
    for share in masks:
        ratio = statistics.median(a / b for a, b in zip(seconds[share][1:], seconds[1.0][1:], strict=True))
        print(f"{share:.0%} of the tokens count: {ratio:.2f} of the time")


def abstract(topology: str, T: int, D: int, V: int, tensor: int = 1) -> tuple[Mesh, tuple[Any, ...]]:
    """A mesh of devices that need not exist, and the arguments of `with_gradient(...)` on it, in bfloat16."""
    from dynamo_jax.plan import topology_devices

    devices = np.asarray(topology_devices(topology)[:tensor]).reshape(1, 1, tensor)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))

    def array(shape: tuple[int, ...], dtype: Any, *spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    weights = (array((T,), jnp.float32),) * 2
    return mesh, (
        array((T, D), jnp.bfloat16),
        array((V, D), jnp.bfloat16, "tensor"),
        array((T,), jnp.int32),
        weights,
    )


def ceilings() -> int:
    """Extra HBM on every TPU generation, at T = 32768, and with the head over four chips. 1 if above its ceiling."""
    cases = [(chip, model, 8192, 1) for chip in TOPOLOGIES for model in MODELS]
    cases += [("v5e", "7B", 32768, 1), ("v5e", "1.5B", 8192, 4), ("v5e", "7B", 8192, 4)]
    failed = False
    for chip, model, T, tensor in cases:
        D, V = MODELS[model]
        mesh, arguments = abstract(TOPOLOGIES[chip], T, D, V, tensor)
        f = jax.jit(with_gradient(lambda *a, mesh=mesh: tuple(token_stats(*a, mesh=mesh))))
        compiled = f.lower(*arguments).compile()
        extra = compiled.memory_analysis().temp_size_in_bytes / 1e6
        shard = rf"bf16\[{V // tensor},{D}\]"
        copies = len(re.findall(rf"= {shard}\S* (?:copy|all-gather|pad)\(", compiled.as_text()))
        bad = copies > 0 or (T == 8192 and extra > CEILING_MB[model])
        failed |= bad
        where = f"{chip} {model} T {T} tensor {tensor}"
        print(f"{where:28s}{extra:8.1f} MB, {copies} copies of the head{'  TOO MUCH' if bad else ''}", flush=True)
    return int(failed)


def tpu() -> None:
    """Memory and estimated time on a v5e."""
    for model, (D, V) in MODELS.items():
        T = 8192
        mesh, arguments = abstract(TOPOLOGIES["v5e"], T, D, V)
        matrix = 2 * T * D * V / FLOPS_A_CYCLE
        full, made = kernel_bundles(mesh, arguments)
        logp_only, _ = kernel_bundles(mesh, arguments, take_logp_only)
        kernel = matrix * full / made
        total: dict[str, float] = {}
        print(f"\n{model}: T = {T}, D = {D}, V = {V}, bfloat16. Million cycles of 1.5 GHz, ratio, extra HBM;")
        print(f"8 T D V at the peak rate take {4 * matrix / 1e6:.1f}")
        for name, form in forms(2048).items():
            if name == "ours":
                form = lambda *a, mesh=mesh: tuple(token_stats(*a, mesh=mesh))  # noqa: E731
            compiled = jax.jit(with_gradient(form)).lower(*arguments).compile()
            text = compiled.as_text()
            total[name] = cycles(text) + (kernel if "tpu_custom_call" in text else 0.0)
            extra = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"{name:24s}{total[name] / 1e6:8.1f}{total[name] / total['naive']:6.2f}{extra / 1e6:10.1f} MB",
                flush=True,
            )
        scan = jax.jit(partial(token_stats, impl="chunked")).lower(*arguments[:3]).compile()
        scanned = cycles(scan.as_text())
        print(f"forward alone: kernel {kernel / 1e6:.1f}, XLA scan {scanned / 1e6:.1f}, ratio {kernel / scanned:.2f}")
        print(
            f"inner loop: {made} bundles for the logits, {logp_only} with logp, {full} with H and S2: "
            f"{(full - logp_only) / logp_only:.1%} of the forward pass, "
            f"{(full - logp_only) / made * matrix / total['ours']:.1%} of value and gradient"
        )


def take_logp_only(z_ref: Any, place_ref: Any, sum_refs: Any, rows: Any, first: Any) -> None:
    """Instead of `pallas_tpu._take_rows`: what a kernel for the log-prob alone would do."""
    lanes = pallas_tpu.LANES
    top_ref, a_ref, *_, target_ref = sum_refs
    z = [z_ref[rows, c : c + lanes] for c in range(0, z_ref.shape[1], lanes)]
    old = top = top_ref[rows, :]
    for x in z:
        top = jnp.maximum(top, x)
    e_sum, target, place = jnp.zeros_like(top), target_ref[rows, :], place_ref[rows, :] - first
    for c, x in enumerate(z):
        e_sum = e_sum + jnp.exp(x - top)
        target = jnp.where(place == c * lanes, x, target)
    q = jnp.exp(old - top)
    top_ref[rows, :], a_ref[rows, :], target_ref[rows, :] = top, q * a_ref[rows, :] + (e_sum - (1.0 - q)), target


def kernel_bundles(mesh: Mesh, arguments: tuple[Any, ...], take: Callable[..., None] | None = None) -> tuple[int, int]:
    """Bundles of the kernel's inner loop: with the sums, and where it only makes logits (its first step)."""
    dump, kept = Path(os.environ["TOKEN_STATS_DUMP"]), pallas_tpu._take_rows
    for file in dump.iterdir():
        file.unlink()
    pallas_tpu._take_rows = take or kept
    try:
        jax.jit(partial(token_stats, impl="pallas_tpu", mesh=mesh)).lower(*arguments[:3]).compile()
    finally:
        pallas_tpu._take_rows = kept
    (bundles,) = (f for f in glob.glob(f"{dump}/*token_stats_forward*final_bundles.txt") if "schedule" not in f)
    (usage,) = glob.glob(f"{dump}/*token_stats_forward*-final_hlo-static-per-bundle-utilization.txt")
    rows = [line.split() for line in Path(usage).read_text().split("UTILIZATION:")[1].splitlines() if line.strip()]
    starts = re.findall(r"^\s*0x([0-9a-f]+)\s*LB:", Path(bundles).read_text(), re.MULTILINE)
    edges = [int(x, 16) for x in starts] + [len(rows)]
    # Loops that use the matrix unit: make; make and take, for each parity.
    loops = [b - a for a, b in itertools.pairwise(edges) if any(int(r[0]) for r in rows[a:b])]
    return loops[1], loops[0]


def cycles(text: str) -> float:
    """The compiler's `estimated_cycles` of a module, loops as often as they turn."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif line.startswith(" ") and name:
            computations[name].append(line)

    def total(name: str) -> float:
        found = 0.0
        for line in computations[name]:
            if match := re.search(r'"estimated_cycles":"(\d+)"', line):
                found += int(match[1])
            if match := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                (turns,) = (int(x) for x in re.findall(r" constant\((\d+)\)", "\n".join(computations[match[1]])))
                found += turns * total(match[2])
        return found

    return total(entry)


def gpu() -> None:
    """ours, its kernel, and what torch users have, on one GPU."""
    for D, V in MODELS.values():
        measure(8192, D, V, jnp.bfloat16, 2048, 10)
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for D, V in MODELS.values():
        hidden, head = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8192, V))
        targets = torch.randint(V, (8192,), device="cuda")

        def plain(hidden: Any, head: Any, targets: Any) -> Any:
            logp = torch.log_softmax((hidden @ head.T).float(), -1)
            return logp.gather(1, targets[:, None]).sum() - (logp.exp() * logp).sum()

        rivals = {"torch, naive": plain, "torch.compile": torch.compile(plain)}
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            rivals["Liger (logp only)"] = lambda hidden, head, targets, loss=loss: loss(head, hidden, targets)
        for name, f in rivals.items():
            seconds = []
            for _ in range(6):
                hidden.grad = head.grad = None
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
                began = time.perf_counter()
                f(hidden, head, targets).backward()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            extra = torch.cuda.max_memory_allocated() - before
            print(f"{name:24s}{statistics.median(seconds[1:]):9.3f} s{extra / 1e6:10.1f} MB (gradients included)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmark the token statistics.")
    parser.add_argument("what", choices=["cpu", "tpu", "ceilings", "gpu"])
    what = parser.parse_args().what
    if what == "cpu":
        measure(4096, 256, 8192, jnp.float32, 512, 7)
        skipping(4096, 256, 8192, 5)
    elif what == "gpu":
        gpu()
    elif what == "ceilings":
        sys.exit(ceilings())
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TOKEN_STATS_DUMP"] = folder
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
            )
            tpu()
