"""The same run on one device, on a mesh of 2 x 2 x 2 and with micro-batches of a quarter: how much do they differ?

    python benchmarks/mesh_equality.py [--steps 5] [--override warmup.steps=100]

Needs 2 CPU cores and about 3 minutes; the eight devices are virtual. Prints the largest absolute difference of every
metric over all steps, and whether all rollouts are identical. Exit status 1 if a rollout differs, or if the loss or the
reward differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dynamo_jax.config import load_config  # noqa: E402

TOLERANCE = 1e-5
JUDGED = ("objective/loss", "reward/mean")
MEASURED = ("time/", "rollout/tokens_per_second")
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a run on one device, on eight, and with micro-batches.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arithmetic_cpu.yaml")
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value", help="for all three runs")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.override)
    common = [
        f"trainer.steps={arguments.steps}",
        f"logging.rollouts_per_step={config.rollout.budget}",
        "logging.progress=false",
        *arguments.override,
    ]
    variants = {"2x2x2": MESH, "micro 1/4": [f"trainer.micro_batch={config.mini_batch // 4}"]}

    with tempfile.TemporaryDirectory(prefix="mesh_equality_") as folder:
        runs = {}
        for name, overrides in {"one device": [], **variants}.items():
            runs[name] = Path(folder) / str(len(runs))
            run(arguments.config, [*common, *overrides, f"run_dir={runs[name]}"])
        expected = metrics(runs["one device"])
        differences = {name: largest_differences(expected, metrics(runs[name])) for name in variants}
        same = {name: identical_rollouts(runs["one device"], runs[name]) for name in variants}

    print(f"{len(expected) - 1} steps, largest absolute difference to one device")
    print(f"{'metric':34s}" + "".join(f"{name:>12s}" for name in variants))
    for metric in sorted(differences["2x2x2"], key=lambda m: (m not in JUDGED, m)):
        print(f"{metric:34s}" + "".join(f"{differences[name][metric]:12.2e}" for name in variants))
    failed = False
    for name in variants:
        equal, total = same[name]
        worst = max(differences[name][metric] for metric in JUDGED)
        print(f"{name}: {equal} of {total} rollouts identical, loss and reward within {worst:.2e}")
        failed |= equal < total or total == 0 or not worst <= TOLERANCE
    return int(failed)


def run(config: Path, overrides: list[str]) -> None:
    """In a process of its own: the number of virtual devices is fixed when jax starts."""
    command = [sys.executable, "-m", "dynamo_jax", "train", str(config.resolve()), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def largest_differences(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, float]:
    """For each metric over all steps; infinite if a value is missing or not finite in one of the runs."""
    worst: dict[str, float] = {}
    for a, b in zip(expected, found, strict=True):
        for name in a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            apart = abs(x - y) if x is not None and y is not None else float("inf")
            worst[name] = max(worst.get(name, 0.0), apart)
    return worst


def identical_rollouts(a: Path, b: Path) -> tuple[int, int]:
    """(equal, all) saved rollouts: their prompt, text, reward and length."""
    equal = total = 0
    for path in sorted((a / "rollouts").iterdir()):
        pairs = list(
            zip(path.read_text().splitlines(), (b / "rollouts" / path.name).read_text().splitlines(), strict=True)
        )
        equal, total = equal + sum(x == y for x, y in pairs), total + len(pairs)
    return equal, total


if __name__ == "__main__":
    sys.exit(main())
