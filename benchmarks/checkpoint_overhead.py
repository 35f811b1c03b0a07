"""What checkpoints cost: the built-in task with its real policy, a checkpoint every 50 steps.

    python benchmarks/checkpoint_overhead.py [--steps 400] [--override checkpoint.every=50]

Needs 2 CPU cores and about 2 minutes. A checkpoint stops the loop for as long as it takes to copy the state
(`time/checkpoint`), and is written in the background, which may slow the next steps down. Both are measured within one
run, against its other steps: times drift too much on a shared machine to compare two runs to a few percent. The cost of
a checkpoint is its blocking time and what its next five steps take beyond the median of the rest; the overhead is that
over the time of the steps from one checkpoint to the next. Exit status 1 from 3% on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERY = 50
AFTER = 5  # steps that the writing may reach into
LIMIT = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description="The share of time that checkpoints take.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arithmetic_cpu.yaml")
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_overhead_") as folder:
        overrides = ["warmup.steps=100", "eval.every=0", f"checkpoint.every={EVERY}", "logging.progress=false"]
        overrides += [f"trainer.steps={arguments.steps}", *arguments.override, f"run_dir={folder}/run"]
        command = [sys.executable, "-m", "dynamo_jax", "train", str(arguments.config.resolve()), *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        size = sum(p.stat().st_size for p in (Path(folder) / "run" / "checkpoints").glob("*/state/**/*") if p.is_file())
        kept = len(list((Path(folder) / "run" / "checkpoints").glob("[0-9]*")))

    seconds = {line["step"]: line["time/step"] for line in lines[1:]}
    blocked = {line["step"]: line["time/checkpoint"] for line in lines[1:] if "time/checkpoint" in line}
    blocked = {step: value for step, value in blocked.items() if step >= EVERY}  # after the first steps' compilations
    near = {step + i for step in blocked for i in range(AFTER + 1)}
    usual = statistics.median(value for step, value in seconds.items() if step not in near and step > AFTER)
    slowed = [sum(seconds[step + i] - usual for i in range(1, AFTER + 1)) for step in blocked]
    costs = [blocked[step] + extra for step, extra in zip(blocked, slowed, strict=True)]
    overhead = statistics.mean(costs) / (EVERY * usual)
    print(f"{len(blocked)} checkpoints of {size / kept / 1e6:.1f} MB, median step {usual * 1000:.0f} ms")
    print(f"blocking {1000 * statistics.mean(blocked.values()):.0f} ms (at most {1000 * max(blocked.values()):.0f}), "
          f"the next {AFTER} steps together {1000 * statistics.mean(slowed):+.0f} ms")  # fmt: skip
    print(f"overhead at one in {EVERY} steps: {overhead:.2%}; blocking alone "
          f"{statistics.mean(blocked.values()) / (EVERY * usual):.2%}")  # fmt: skip
    return int(overhead >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
