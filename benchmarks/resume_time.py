"""How soon a run steps: from the start of the command to the end of its first step, cold and after a kill.

    python benchmarks/resume_time.py [--kills 3] [--override ...]

Needs 2 CPU cores and about 4 minutes: the cold start of the built-in task includes its whole warm-up, as a user waits
for it, and is given without it, too. A resumed run finds its compiled programs in the run's folder
(`trainer.compilation_cache`); the last start is resumed without them, for comparison.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Seconds to the first step, cold and resumed.")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arithmetic_cpu.yaml")
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resume_time_") as folder:
        run = Path(folder) / "run"
        overrides = ["checkpoint.every=1", "eval.every=0", "logging.progress=false", *arguments.override]
        command = [sys.executable, "-m", "dynamo_jax", "train", str(arguments.config.resolve()), *overrides]
        cold = start_until_step([*command, f"run_dir={run}"], run)
        print(f"cold, with the warm-up: {cold:.1f} s", flush=True)
        other = Path(folder) / "other"
        bare = start_until_step([*command, "warmup.steps=1", f"run_dir={other}"], other)
        print(f"cold, one step of warm-up: {bare:.1f} s", flush=True)
        warm = [start_until_step([*command, f"run_dir={run}"], run) for _ in range(arguments.kills)]
        print(f"resumed: {', '.join(f'{x:.1f}' for x in warm)} s, {sorted(warm)[len(warm) // 2] / cold:.3f} of cold, "
              f"{sorted(warm)[len(warm) // 2] / bare:.3f} without the warm-up", flush=True)  # fmt: skip
        shutil.rmtree(run / "xla_cache")
        again = start_until_step([*command, f"run_dir={run}"], run)
        print(f"resumed with an empty cache: {again:.1f} s")
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", "import dynamo_jax.trainer, tensorboardX, grain, orbax"], cwd=ROOT, check=True
        )
        print(f"of which importing takes {time.monotonic() - began:.1f} s")
    return 0


def start_until_step(command: list[str], run: Path) -> float:
    """Seconds until the line of a step is written that was not there; the process is then killed after its save."""
    before = steps(run)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while steps(run) <= max(before, 0):
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    while steps(run) <= max(before, 0) + 2:  # let the checkpoint of the first step be committed
        time.sleep(0.01)
    process.kill()
    process.wait()
    return seconds


def steps(run: Path) -> int:
    try:
        whole = (run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return -1
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else -1


if __name__ == "__main__":
    sys.exit(main())
