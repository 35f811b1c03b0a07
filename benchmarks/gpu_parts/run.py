"""A short run of the built-in task on the GPU against one on the CPU, both from one checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_parts.common import emit, gpu

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("objective/loss", "objective/grad_norm", "reward/mean", "rollout/tokens_per_second")


class Run:
    """One `dynamo-jax train` of the built-in task, in a process of its own."""

    def __init__(self, folder: Path, device: str, steps: int, small: bool) -> None:
        self.folder, self.device = folder, device
        overrides = [f"run_dir={folder}", f"device={device}", f"trainer.steps={steps}", "eval.every=0"]
        overrides += ["checkpoint.every=1", "logging.progress=false", "logging.rollouts_per_step=512"]
        overrides += ["warmup.steps=5", "rollout.prompts=8"] if small else ["warmup.steps=300"]
        command = [sys.executable, "-m", "dynamo_jax", "train", str(ROOT / "configs" / "arithmetic_cpu.yaml")]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        self.log = folder.with_suffix(".log").open("w+")
        self.process = subprocess.Popen([*command, *overrides], stdout=self.log, stderr=self.log, env=environment)

    def finish(self) -> None:
        """Raises RuntimeError if it failed."""
        if status := self.process.wait():
            self.log.seek(0)
            raise RuntimeError(f"the run on {self.device} ended with {status}: {self.log.read()[-2000:]}")

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def rollouts(self, step: int) -> list[str]:
        return (self.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()


def main(small: bool) -> None:
    emit(device=gpu(small))
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        base = Run(Path(folder, "base"), "cpu", 1, small)
        base.finish()
        first = base.metrics()[-1]["step"]
        runs = {}
        for name, device in (("cpu", "cpu"), ("gpu", "cpu" if small else "gpu")):
            shutil.copytree(base.folder, Path(folder, name))
            runs[name] = Run(Path(folder, name), device, first + (1 if small else 4), small)
        for run in runs.values():
            run.finish()
        cpu, gpu_ = runs["cpu"], runs["gpu"]
        for x, y in zip(cpu.metrics()[first + 1 :], gpu_.metrics()[first + 1 :], strict=True):
            pairs = list(zip(cpu.rollouts(x["step"]), gpu_.rollouts(x["step"]), strict=True))
            row: dict[str, Any] = {"step": x["step"], "rollouts": len(pairs), "equal": sum(a == b for a, b in pairs)}
            for name, line in (("cpu", x), ("gpu", y)):
                row[name] = {key: line[key] for key in KEPT}
                row[name]["seconds"] = sum(value for key, value in line.items() if key.startswith("time/"))
            emit(**row)
