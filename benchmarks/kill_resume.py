"""Kill a run with SIGKILL at random moments, restart it each time, and compare it with one that nobody killed.

    python benchmarks/kill_resume.py [--kills 10] [--steps 30] [--seed 0]

Needs 2 CPU cores and about 5 minutes. The warm-up is 40 steps, not the recipe's, so that most of the time goes to what
is tested; checkpoints come every 3 steps and evaluations every 5. `--override` changes that. Moments are drawn over
all of a run's life: start-up, warm-up, steps (the delay starts when `metrics.jsonl` reaches a random step) and the
writing of checkpoints (it starts when the line before a checkpoint is there). Exit status 1 if any value but
`time/*` and `rollout/tokens_per_second` differs in any line of `metrics.jsonl`, or any saved rollout does.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT_EVERY = 3
OVERRIDES = [
    "warmup.steps=40", "eval.every=5", f"checkpoint.every={CHECKPOINT_EVERY}", "logging.progress=false",
    "logging.rollouts_per_step=64", "logging.rollouts_keep=null",
]  # fmt: skip
POLL_SECONDS = 0.002
MEASURED = ("time/", "rollout/tokens_per_second")  # metrics that no two runs share


class Moment(NamedTuple):
    """Kill `delay` seconds after the line of `step` is written; after the start of the process if `step` is -1."""

    phase: str
    step: int
    delay: float


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare with an uninterrupted one.")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: drawn, and printed")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arithmetic_cpu.yaml")
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value", help="for both runs, comes last")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.kills} kills, {arguments.steps} steps", flush=True)

    with tempfile.TemporaryDirectory(prefix="kill_resume_") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def command(run_dir: Path) -> list[str]:
            overrides = [*OVERRIDES, f"trainer.steps={arguments.steps}", *arguments.override, f"run_dir={run_dir}"]
            return [sys.executable, "-m", "dynamo_jax", "train", str(arguments.config.resolve()), *overrides]

        began = time.monotonic()
        process, first_line = start(command(whole), whole), None
        while process.poll() is None:
            if first_line is None and last_step(whole) >= 0:
                first_line = time.monotonic() - began
            time.sleep(POLL_SECONDS)
        check_exit(process, whole)
        lines = read(whole)
        step_seconds = sorted(line["time/step"] for line in lines[1:])[len(lines) // 2]
        startup = first_line or 1.0
        print(f"uninterrupted: {time.monotonic() - began:.1f} s, first line after {startup:.1f} s, "
              f"median step {step_seconds:.3f} s", flush=True)  # fmt: skip

        hits = 0
        for number, moment in enumerate(draw_moments(seed, arguments, startup, step_seconds), 1):
            process = start(command(killed), killed)
            if not kill(process, killed, moment):
                print(f"kill {number:2d}: the run ended by itself with status {process.returncode}")
                check_exit(process, killed)
                break
            hits += 1
            print(f"kill {number:2d}: {describe(moment, killed)}", flush=True)
        process = start(command(killed), killed)
        process.wait()
        check_exit(process, killed)

        wrong = compare(lines, read(killed)) + compare_rollouts(whole, killed)
        for line in wrong[:20]:
            print("DIFFERENT", line)
        names = {name for line in lines for name in line if not name.startswith(MEASURED)}
        rows = sum(len(path.read_text().splitlines()) for path in (whole / "rollouts").iterdir())
        print(f"{hits} of {arguments.kills} kills; compared {len(lines)} lines of metrics.jsonl, "
              f"{len(names)} metrics (without time/* and rollout/tokens_per_second), and {rows} saved rollouts: "
              f"{len(wrong)} differences")  # fmt: skip
        return 1 if wrong or hits < arguments.kills else 0


def draw_moments(seed: int, arguments: argparse.Namespace, startup: float, step_seconds: float) -> list[Moment]:
    """A third at start-up (the first on a folder without a checkpoint), the others at rising steps of the run.

    Of these, every other one waits for the line before a checkpoint, and then for less than the writing takes.
    """
    rng = random.Random(seed)
    at_start = max(arguments.kills // 3, 1)
    last = max(arguments.steps - 2, 1)
    steps = sorted(rng.sample(range(last), min(arguments.kills - at_start, last)))
    moments = []
    for number, step in enumerate(steps):
        if number % 2:
            step = min(-(-step // CHECKPOINT_EVERY) * CHECKPOINT_EVERY, last)
            moments.append(Moment("checkpoint", step, rng.uniform(0.0, 0.3)))
        else:
            moments.append(Moment("step", step, rng.uniform(0.0, 1.5 * step_seconds)))
    for number in range(at_start):
        where = 0 if number == 0 else rng.randrange(len(moments) + 1)
        moments.insert(where, Moment("start-up", -1, rng.uniform(0.0, startup)))
    return moments


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder.with_suffix(".err"), "ab") as file:  # beside the run folder, which is the run's own
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def kill(process: subprocess.Popen[bytes], folder: Path, moment: Moment) -> bool:
    """Whether the process was still running when its moment came."""
    while moment.step >= 0 and last_step(folder) < moment.step and process.poll() is None:
        time.sleep(POLL_SECONDS)
    time.sleep(moment.delay)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def describe(moment: Moment, folder: Path) -> str:
    checkpoints = [path.name for path in (folder / "checkpoints").glob("*")]
    saved = max((int(name) for name in checkpoints if name.isdigit()), default=None)
    unfinished = [name for name in checkpoints if "tmp" in name]
    return (
        f"{moment.phase:10s} {moment.delay:6.3f} s after {'start' if moment.step < 0 else f'line {moment.step}':8s}"
        f" -> last line {last_step(folder)}, newest checkpoint {saved}"
        f"{', one being written' if unfinished else ''}"
    )


def last_step(folder: Path) -> int:
    """The step of the last whole line of `metrics.jsonl`, -1 if there is none."""
    try:
        whole_lines = (folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return -1
    return int(json.loads(whole_lines.rpartition(b"\n")[2])["step"]) if whole_lines else -1


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Every difference in a line's step, in its names, or in a value that is not measured time."""
    steps = [[line["step"] for line in lines] for lines in (expected, found)]
    if steps[0] != steps[1]:
        return [f"steps: {steps[0]} without kills, {steps[1]} with"]
    wrong = []
    for a, b in zip(expected, found, strict=True):
        names = sorted(name for name in a.keys() | b.keys() if not name.startswith(MEASURED))
        wrong += [
            f"step {a['step']}: {name}: {a.get(name)!r} without kills, {b.get(name)!r} with"
            for name in names
            if name not in a or name not in b or a[name] != b[name]
        ]
    return wrong


def compare_rollouts(whole: Path, killed: Path) -> list[str]:
    names = {path.name for folder in (whole, killed) for path in (folder / "rollouts").iterdir()}
    wrong = []
    for name in sorted(names):
        a, b = (folder / "rollouts" / name for folder in (whole, killed))
        if not a.exists() or not b.exists() or a.read_bytes() != b.read_bytes():
            wrong.append(f"rollouts/{name}")
    return wrong


def check_exit(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.returncode:
        errors = folder.with_suffix(".err").read_text(errors="replace")[-3000:]
        raise SystemExit(f"the run in {folder.name} ended with status {process.returncode}:\n{errors}")


if __name__ == "__main__":
    sys.exit(main())
