"""Train every method of configs/methods from one warmed-up policy; print what each reached and what a step cost.

python benchmarks/methods.py [--steps 20] [--seeds 0] [--methods grpo dynamo ...] [--out FOLDER]

Exit status 1 if a metric of any step was not finite. Times are ratios to GRPO's step in the same run, in the same order
of methods; the first step of a run, which compiles, is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dynamo_jax.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "methods"
SCORES = ("eval/heldout/pass@1", "eval/heldout/pass@8")
BUDGET = 512  # rollouts a step of the recipes, where the method does not say how many it sampled
COLUMNS = ("method", "Pass@1", "Pass@8", "reward", "mixed groups", "sampled a step", "step time / GRPO's", "not finite")


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dynamo_jax", *arguments], check=True, cwd=ROOT)


def warmed_up(folder: Path, seed: int) -> Path:
    """The policy after the built-in task's warm-up, as a folder that `policy.load` takes; made once."""
    exported = folder / f"policy_{seed}"
    if not exported.is_dir():
        run = folder / f"warmup_{seed}"
        recipe = str(ROOT / "configs" / "arithmetic_cpu.yaml")
        # One step at a rate that rounds to nothing: what is exported is the warmed-up policy.
        quick = ["trainer.steps=1", "optimizer.learning_rate=1e-30", "eval.every=0", "logging.progress=false"]
        command("train", recipe, f"run_dir={run}", f"seed={seed}", *quick)
        command("export", recipe, "--checkpoint", str(run), "--out", str(exported))
    return exported


def trained(folder: Path, method: str, seed: int, steps: int) -> list[dict[str, float | None]]:
    """The lines of a run's metrics."""
    run = folder / f"{method}_{seed}_{steps}"
    command(
        "train", str(RECIPES / f"{method}.yaml"), f"run_dir={run}", f"seed={seed}", f"trainer.steps={steps}",
        "warmup.steps=0", "policy.architecture=null", f"policy.load={warmed_up(folder, seed)}", f"eval.every={steps}",
        f"checkpoint.every={steps}", "logging.progress=false", "logging.tensorboard=false",
    )  # fmt: skip
    return read_metrics(run / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--out", type=Path, help="keep the runs here, and use the warm-ups that are here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = ["grpo", *(m for m in arguments.methods if m != "grpo")]
        lines = {m: [trained(folder.resolve(), m, seed, arguments.steps) for seed in arguments.seeds] for m in chosen}
    seconds = {m: np.median([line["time/step"] for run in runs for line in run[2:]]) for m, runs in lines.items()}
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    bad = 0
    for method, runs in lines.items():
        last = [run[-1] for run in runs]
        broken = sum(value is None for run in runs for line in run for value in line.values())
        bad += broken
        steps = [line for run in runs for line in run[1:]]
        figures = [
            *(
                f"{np.mean([run[0][k] for run in runs]):.3f} -> {np.mean([line[k] for line in last]):.3f}"
                for k in SCORES
            ),
            *(f"{np.mean([line[k] for line in steps]):.3f}" for k in ("reward/mean", "reward/mixed_groups")),
            f"{np.mean([line.get('rollout/sampled', BUDGET) for line in steps]):.0f}",
            f"{seconds[method] / seconds['grpo']:.2f}",
            str(broken),
        ]
        print(f"| {' | '.join([method, *figures])} |", flush=True)
    print(f"GRPO's step: {seconds['grpo']:.3f} s (median).")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
