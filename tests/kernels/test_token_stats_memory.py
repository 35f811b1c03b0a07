"""What the compiled token statistics need of a TPU's memory, on every generation. Needs libtpu, no TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is missing: pip install dynamo_jax[tpu]"
)
def test_extra_memory_stays_under_its_ceilings():
    """At most 128 MB (1.5B) and 256 MB (7B) at T = 8192; T = 32768 compiles; a sharded head is never copied."""
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "benchmarks/token_stats.py", "ceilings"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 11, done.stdout
