"""`rollouts/step_<step>.jsonl` of a run: some of each step's rollouts, the newest files only."""

from __future__ import annotations

from pathlib import Path

from dynamo_jax.run_folder import write_atomic

FOLDER = "rollouts"


class RolloutFiles:
    """The newest `keep` files (None: all of them) in the run folder `run_dir`."""

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
