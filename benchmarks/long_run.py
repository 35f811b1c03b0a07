"""Does a long run stay healthy: resident memory and disk of 20,000 steps of the smallest model.

    python benchmarks/long_run.py [--steps 20000] [--override checkpoint.every=50]

Needs 2 CPU cores and about 20 minutes. Samples the resident memory of the process, its open files and threads, and
the disk that the run's folder takes, every few seconds. Prints a table over the steps, and the growth from the first
tenth of the samples after step 100 to the last. `metrics.jsonl` and the TensorBoard events are the run's result and
grow by a line a step; all else must stay. Exit status 1 if anything else grows by more than 10% and 20 (MB, threads or
files).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
run_dir: {run_dir}
device: cpu
task: {{max_prompt_tokens: 6, arithmetic: {{train_prompts: 64, heldout_prompts: 8, max_operations: 2}}}}
policy: {{architecture: {{hidden_size: 8, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 8}}}}
rollout: {{prompts: 8, per_prompt: 2, max_tokens: 3}}
allocation: {{low: 1, high: 4}}
trainer: {{steps: {steps}}}
eval: {{every: 100, samples: 2, k: [1, 2]}}
checkpoint: {{every: 50}}
logging: {{progress: false, rollouts_per_step: 16}}
"""
GROWING = ("metrics.jsonl", "tensorboard")
FROM_STEP = 100


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and disk of a long run.")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long_run_") as folder:
        run = Path(folder) / "run"
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG.format(run_dir=run, steps=arguments.steps))
        command = [sys.executable, "-m", "dynamo_jax", "train", str(config), *arguments.override]
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        samples, began = [], time.monotonic()
        try:
            while process.poll() is None:
                step = last_step(run)
                if FROM_STEP <= step < arguments.steps:  # the end has a report to write
                    samples.append(sample(process.pid, run, step))
                time.sleep(2.0)
        finally:
            process.kill()
        if process.returncode:
            print((Path(folder) / "log").read_text()[-3000:])
            return 1
        warnings = [line for line in (Path(folder) / "log").read_text().splitlines() if "WARNING" in line]
    seconds = time.monotonic() - began
    print(f"{arguments.steps} steps in {seconds:.0f} s; {len(samples)} samples; {len(warnings)} warnings in the log")
    names = list(samples[0])
    print("".join(f"{name:>16s}" for name in names))
    for index in sorted({round(i * (len(samples) - 1) / 10) for i in range(11)}):
        print("".join(f"{samples[index][name]:16.1f}" for name in names))
    failed = False
    # The mean of a tenth at either end: a checkpoint being written comes and goes.
    tenth = max(len(samples) // 10, 1)
    for name in names[1:]:
        first, last = (sum(s[name] for s in part) / tenth for part in (samples[:tenth], samples[-tenth:]))
        bad = name not in ("growing MB",) and last > 1.1 * first and last - first > 20
        failed |= bad
        print(f"{name}: {first:.1f} -> {last:.1f}{'  GROWS' if bad else ''}")
    return int(failed)


def last_step(run: Path) -> int:
    try:
        whole = (run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return -1
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else -1


def sample(pid: int, run: Path, step: int) -> dict[str, float]:
    growing = kept = files = 0
    paths = [Path(folder) / name for folder, _, names in os.walk(run) for name in names]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed while we look
            size = path.stat().st_size
            files += 1
            if path.relative_to(run).parts[0] in GROWING:
                growing += size
            else:
                kept += size
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "step": step,
        "resident MB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "growing MB": growing / 1e6,
        "other disk MB": kept / 1e6,
        "files": files,
    }


if __name__ == "__main__":
    sys.exit(main())
