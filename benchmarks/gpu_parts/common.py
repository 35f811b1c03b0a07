"""Rows and times, in jax and in torch."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

PEAK = 989.4e12  # FLOP/s of an H100 or H200 (SXM) in bfloat16 without sparsity, NVIDIA's data sheets
QWEN_1_5B = {
    "hidden_size": 1536,
    "num_layers": 28,
    "num_heads": 12,
    "num_kv_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
}
QWEN_0_5B = {**QWEN_1_5B, "hidden_size": 896, "num_layers": 24, "num_heads": 14, "intermediate_size": 4864}
TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def emit(**row: Any) -> None:
    """One row."""
    print(json.dumps(row), flush=True)


def gpu(small: bool) -> str:
    """The name of the device. Raises RuntimeError where there is no GPU and sizes are not small."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not small:
        raise RuntimeError(f"there is no GPU here but {device.device_kind}; --small tries the script out")
    return f"{device.device_kind}, jax {jax.__version__}"


def measured(compiled: Any, arguments: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Median seconds of a compiled program, and the bytes that it needs beside its arguments and results."""
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "extra_bytes": compiled.memory_analysis().temp_size_in_bytes}


def torch_on(small: bool) -> tuple[Any, Any] | None:
    """torch and its device; None, with a row that says why, where it cannot be measured."""
    try:
        import torch
    except ImportError as error:
        emit(skipped=str(error))
        return None
    if not small and not torch.cuda.is_available():
        emit(skipped="torch has no CUDA here")
        return None
    emit(device="cpu" if small else torch.cuda.get_device_name(), torch=torch.__version__)
    return torch, torch.device("cpu" if small else "cuda")


def torch_measured(torch: Any, run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds of a call, and the most bytes beyond those held before it, its results among them."""
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    run()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    extra = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {"seconds": statistics.median(seconds), "extra_bytes": extra}


def flops(shape: dict[str, int], tokens: int, S: int) -> float:
    """Of the forward pass in matrix products, rows of S tokens; causal attention counted half."""
    D, F, V = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = D // shape["num_heads"] * shape["num_kv_heads"]
    layer = 2 * D * (2 * D + 2 * keys) + 6 * D * F + 2 * S * D
    return float(tokens) * (shape["num_layers"] * layer + 2 * D * V)
