"""What a run writes into its folder as it goes, beside checkpoints. All of it may be tried again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_jax.batch import Pool
from dynamo_jax.config import Config, resolved
from dynamo_jax.run.folder import RunFolder, Status, write_atomic
from dynamo_jax.run.metrics import MetricsLog

FOLDER = "rollouts"


class RunWriter:
    """The metrics, some rollouts and the status of a run that goes on after `resume_step` (None: starts anew).

    With `may_lack`, the line of that step may be missing. Only process 0 makes one. Raises `ValueError` as `MetricsLog`
    does.
    """

    def __init__(
        self, folder: RunFolder, status: Status, config: Config, resume_step: int | None, may_lack: bool = False
    ) -> None:
        options = config.logging
        self.folder, self.status = folder, status
        self.rollouts = RolloutFiles(folder.path, options.rollouts_keep)
        self.metrics = MetricsLog(
            folder.path,
            resume_step,
            may_lack=may_lack,
            tensorboard=options.tensorboard,
            wandb_project=options.wandb_project,
            config=resolved(config),
            run_name=config.run_dir.rstrip("/").rpartition("/")[2],
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The line of `step`. Raises `StorageError` or `OSError`; the same call may be made again."""
        self.status.update(step)
        self.metrics.write(step, metrics)  # comes last: it takes each step once

    def sync(self, step: int) -> None:
        """Make all that was written safe before the checkpoint of `step`. Raises as `write` does."""
        self.metrics.sync()
        self.status.update(step, now=True)
        self.folder.sync()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.metrics.__exit__(kind)


def sample_lines(step: int, pool: Pool, rows: np.ndarray, texts: Sequence[str]) -> str:
    """JSON lines of the pool's rollouts `rows`, whose texts are `texts`, each with its prompt and reward."""
    lines = []
    for r, text in zip(rows.tolist(), texts, strict=True):
        p = int(pool.prompt_of_R[r])
        row = {
            "step": step,
            "rollout": r,
            "prompt_id": pool.prompts.ids[p],
            "prompt": pool.prompts.texts[p],
            "text": text,
            "answer": pool.prompts.answers[p],
            "right": bool(pool.right_R[r]),
            "reward": float(pool.reward_R[r]),
            "length": int(pool.rollouts.length_B[r]),
            "ended": bool(pool.rollouts.ended_B[r]),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


class RolloutFiles:
    """`rollouts/step_<step>.jsonl` in `run_dir`, some rollouts of each step: the newest `keep` files (None: all)."""

    def __init__(self, run_dir: Path, keep: int | None) -> None:
        self.folder, self.keep = run_dir / FOLDER, keep
        self._steps: set[int] | None = None  # that have a file; the folder is read once

    def write(self, step: int, lines: str) -> None:
        """Write the file of `step`, unless there are no lines, after removing those that are one too many with it.

        Raises `StorageError` or `OSError` if that fails; the same call may be made again.
        """
        if not lines:
            return
        self.folder.mkdir(exist_ok=True)
        if self._steps is None:
            self._steps = {
                int(number) for path in self.folder.glob("step_*.jsonl") if (number := path.stem[5:]).isdigit()
            }
        others = sorted(self._steps - {step})
        for old in others[: max(len(others) + 1 - self.keep, 0) if self.keep else 0]:
            self._file(old).unlink(missing_ok=True)
            self._steps.discard(old)
        write_atomic(self._file(step), lines)
        self._steps.add(step)

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.jsonl"
