"""Tests that compare values with float64, with plain code or with other devices' forms, run on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts.common import emit, gpu

ROOT = Path(__file__).resolve().parents[2]
FILES = ["tests/kernels/test_attention.py", "tests/kernels/test_token_stats.py"]
# These need eight devices, look at another platform's kernel, or count what only a CPU runs.
LEFT_OUT = ["mesh", "spread", "pallas_tpu", "follows", "mosaic"]


def main(small: bool) -> None:
    emit(device=gpu(small))
    platform = "cpu" if small else "cuda"
    chosen = [*FILES, "-k", " and ".join(f"not {word}" for word in LEFT_OUT)] if not small else FILES[:1]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen]
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DYNAMO_JAX_TEST_PLATFORM": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    row = {"platform": platform, **counts, "seconds": round(time.perf_counter() - began, 1)}
    emit(**row, **({"wrong": failed or done.stdout[-2000:] + done.stderr[-500:]} if done.returncode else {}))
