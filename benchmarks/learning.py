"""Does the built-in task learn? Trains the recipe over several warm-up seeds and prints held-out scores.

    python benchmarks/learning.py [--seeds 0 1 2] [--plot FILE.svg] [--override a.b=c ...]

The seed decides the problems, the warm-up and the rollouts. Prints a Markdown table: Pass@1 and Pass@8 on 256 held-out
problems before and after reinforcement learning, and the gain. Exits 1 if a seed gains less than 0.30 and 0.20.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dynamo_jax.run.metrics import read_metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "arithmetic_cpu.yaml"
SCORES = ("eval/heldout/pass@1", "eval/heldout/pass@8")
WANTED = (0.30, 0.20)


def train(seed: int, folder: Path, overrides: list[str]) -> tuple[np.ndarray, float]:
    """[evaluations, 3]: step, Pass@1, Pass@8; and the seconds that the whole command took."""
    command = [sys.executable, "-m", "dynamo_jax", "train", str(CONFIG), f"run_dir={folder}", f"seed={seed}"]
    began = time.perf_counter()
    subprocess.run([*command, "logging.progress=false", *overrides], check=True)
    seconds = time.perf_counter() - began
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if SCORES[0] in line]
    return np.array([[line["step"], *(line[name] for name in SCORES)] for line in lines]), seconds


def plot(curves: list[np.ndarray], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for column, (label, colour) in enumerate([("Pass@1", "#0072b2"), ("Pass@8", "#d55e00")], start=1):
        for seed, curve in enumerate(curves):
            style = {"color": colour, "alpha": 0.35, "linewidth": 1}
            axes.plot(curve[:, 0], curve[:, column], **style, label=None if seed else f"{label}, each seed")
        mean = np.mean([curve[:, column] for curve in curves], axis=0)
        axes.plot(curves[0][:, 0], mean, color=colour, linewidth=2.2, marker="o", markersize=3, label=f"{label}, mean")
    axes.set(xlabel="training step", ylabel="held-out problems solved", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    curves, all_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            curve, seconds = train(seed, Path(folder) / str(seed), arguments.override)
            curves.append(curve)
            all_seconds.append(seconds)
    firsts, lasts = (np.array([curve[row, 1:] for curve in curves]) for row in (0, -1))
    gains = lasts - firsts
    print("| seed | Pass@1 before -> after | gain | Pass@8 before -> after | gain | seconds, start to end |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = zip([*arguments.seeds, "mean"], *(np.vstack([x, x.mean(0)]) for x in (firsts, lasts, gains)), strict=True)
    for (seed, first, last, gain), seconds in zip(rows, [*all_seconds, np.mean(all_seconds)], strict=True):
        cells = [f"{a:.3f} -> {b:.3f} | {g:+.3f}" for a, b, g in zip(first, last, gain, strict=True)]
        print(f"| {seed} | {' | '.join(cells)} | {seconds:.0f} |")
    if arguments.plot:
        plot(curves, arguments.plot)
    return int(not (gains >= WANTED).all())


if __name__ == "__main__":
    sys.exit(main())
