"""Ten steps of 2 processes x 4 devices, of 1 process x 8 devices, and of 1 device, each resumed in between: the same?

    python benchmarks/process_equality.py [--steps 10] [--override warmup.steps=100]

Needs 2 CPU cores and about 5 minutes; devices are virtual, the processes meet on loopback. The runs on several devices
stop half way and go on from their checkpoint; the last one goes on in one process on another mesh (8 devices to 4, fsdp
to tensor). Prints the largest absolute difference of every metric to one device's undisturbed run, and whether all
rollouts are identical. Exit status 1 if a rollout differs, or the loss or the reward by more than 1e-5.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from mesh_equality import JUDGED, TOLERANCE, identical_rollouts, largest_differences, metrics  # noqa: E402

from dynamo_jax.config import load_config  # noqa: E402

MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
SMALLER = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=4")
# name -> for each half: how many processes, and their mesh
LAYOUTS: dict[str, tuple[tuple[int, Sequence[str]], tuple[int, Sequence[str]]]] = {
    "2 x 4": ((2, MESH), (2, MESH)),
    "1 x 8": ((1, MESH), (1, MESH)),
    "2 x 4, 1 x 4": ((2, MESH), (1, SMALLER)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare processes and meshes, with resumes in between.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arithmetic_cpu.yaml")
    parser.add_argument("--override", nargs="*", default=[], metavar="key.sub=value", help="for all runs")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.override)
    common = [
        f"logging.rollouts_per_step={config.rollout.budget}",
        "logging.progress=false",
        "logging.tensorboard=false",
        "device=cpu",
        *arguments.override,
    ]
    with tempfile.TemporaryDirectory(prefix="process_equality_") as folder:
        one = Path(folder) / "one"
        train(arguments.config, one, 1, [*common, f"trainer.steps={arguments.steps}"])
        expected = metrics(one)
        differences, same = {}, {}
        for number, (name, halves) in enumerate(LAYOUTS.items()):
            run = Path(folder) / str(number)
            for (count, mesh), steps in zip(halves, (arguments.steps // 2, arguments.steps), strict=True):
                train(arguments.config, run, count, [*common, *mesh, f"trainer.steps={steps}"])
            # The first half's last step is evaluated because it is the last; one device's run does not do that.
            found = [
                {k: v for k, v in line.items() if k in wanted}
                for line, wanted in zip(metrics(run), expected, strict=True)
            ]
            differences[name] = largest_differences(expected, found)
            same[name] = identical_rollouts(one, run)

    print(f"{len(expected) - 1} steps, largest absolute difference to one device")
    print(f"{'metric':34s}" + "".join(f"{name:>14s}" for name in LAYOUTS))
    for metric in sorted(differences["2 x 4"], key=lambda m: (m not in JUDGED, m)):
        print(f"{metric:34s}" + "".join(f"{differences[name][metric]:14.2e}" for name in LAYOUTS))
    failed = False
    for name in LAYOUTS:
        equal, total = same[name]
        worst = max(differences[name][metric] for metric in JUDGED)
        print(f"{name}: {equal} of {total} rollouts identical, loss and reward within {worst:.2e}")
        failed |= equal < total or total == 0 or not worst <= TOLERANCE
    return int(failed)


def train(config: Path, run: Path, count: int, overrides: list[str]) -> None:
    """`dynamo-jax train` in `count` processes, to its end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynamo_jax", "train", str(config.resolve()), *overrides, f"run_dir={run}"]
    processes = []
    for index in range(count):
        several = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
        environ = os.environ | (several | {"JAX_PROCESS_ID": str(index)} if count > 1 else {})
        with open(run.with_suffix(f".log{index}"), "wb") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log))
    for index, process in enumerate(processes):
        if process.wait():
            log = run.with_suffix(f".log{index}").read_text(errors="replace")[-3000:]
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{log}")


if __name__ == "__main__":
    sys.exit(main())
