"""What only a GPU can tell: kernels, attention, score and update, sampling, tests and a short run, beside torch's.

    python benchmarks/gpu.py --out gpu.jsonl           # where there is a CUDA GPU: at most 8 minutes on an H100 or H200
    python benchmarks/gpu.py --small --out gpu.jsonl   # anywhere, on the CPU with tiny sizes: whether the script works
    python benchmarks/gpu.py --skip update_torch run   # without these parts; --list says which there are

Each part is a process of its own, so that its memory and its failures are its own, and has its seconds, after which it
is cut. Rows are JSON, one a line, written as they come: a call that is cut off keeps what was done. torch and Liger are
measured where they are installed (pip install liger-kernel[cutedsl] transformers), in the same call, on the same card.
Exit status 1 if something failed, erred by more than its bound, or was cut.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
# Part: seconds it may take on a card. Together 8 minutes.
BUDGETS = {
    "kernels": 90,
    "attention": 40,
    "update": 110,
    "kernels_torch": 45,
    "attention_torch": 20,
    "update_torch": 50,
    "sampling": 35,
    "tests": 30,
    "run": 60,
}
SMALL_BUDGET = 600  # a busy machine of 2 cores is slow


def run_part(part: str, small: bool, seconds: float, out: TextIO | None) -> bool:
    """Its rows to the screen and to `out` as they come; whether all is well."""
    command = [sys.executable, __file__, "--part", part, *(["--small"] if small else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if small:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # Programs run once or twice: compiling them well would take longer.
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    began, well = time.monotonic(), True
    # A session of its own: what is cut takes the processes along that it started.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    cut = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))
    cut.start()

    def write(row: dict[str, Any]) -> None:
        line = json.dumps({"part": part, **row})
        print(line, flush=True)
        if out is not None:
            out.write(line + "\n")
            out.flush()

    assert child.stdout is not None
    for line in child.stdout:
        row = json.loads(line)
        well &= "wrong" not in row
        write(row)
    status, took = child.wait(), time.monotonic() - began
    cut.cancel()
    if status:
        over = took >= seconds
        write({"wrong": f"cut after its {seconds:g} s" if over else f"ended with status {status}; see its output"})
    write({"took": round(took, 1)})
    return well and not status


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure on a GPU.")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--skip", nargs="+", choices=BUDGETS, default=[], metavar="PART")
    parser.add_argument("--list", action="store_true", help="the parts and their seconds")
    parser.add_argument("--out", type=Path, help="write the rows there too")
    parser.add_argument("--part", choices=BUDGETS, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{part:16s}{seconds:4d} s" for part, seconds in BUDGETS.items()))
        return 0
    if arguments.part:
        importlib.import_module(f"gpu_parts.{arguments.part}").main(arguments.small)
        return 0
    well = True
    out = arguments.out.open("w") if arguments.out else None
    for part, seconds in BUDGETS.items():
        if part not in arguments.skip:
            well &= run_part(part, arguments.small, SMALL_BUDGET if arguments.small else seconds, out)
    if out is not None:
        out.close()
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
