"""The saved samples of an evaluation: what makes it resumable, and lets a new grader judge without sampling again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_jax.evaluation.scores import Evaluation
from dynamo_jax.run.folder import write_atomic
from dynamo_jax.tasks.prompts import PromptSet

Row = dict[str, Any]  # id, sample, gold, text, tokens, truncated, answered, correct


class SampleFile:
    """One benchmark's samples: a JSONL file, its first line says what they were drawn with, the others are samples.

    Samples come problem by problem, in the order of the benchmark, `samples` each.
    """

    def __init__(self, path: Path, drawn_with: dict[str, Any], samples: int) -> None:
        self.path, self.drawn_with, self.samples = path, drawn_with, samples

    def read(self, check: bool = True) -> list[Row]:
        """The samples of all complete problems; none if there is no file yet. A torn end is cut off.

        Raises `ValueError` for a file that was drawn with other settings (unless not `check`) or is damaged.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        rows: list[Row] = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is a torn line
            try:
                row = json.loads(line)
                _ = row["drawn_with"] if number == 1 else (row["id"], row["text"], row["correct"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}: is no sample of an evaluation. Remove the file to sample again."
                ) from None
            if number == 1:
                self._compare(row["drawn_with"] if check else self.drawn_with)
            else:
                rows.append(row)
        return rows[: len(rows) - len(rows) % self.samples]

    def _compare(self, before: dict[str, Any]) -> None:
        for key, now in self.drawn_with.items():
            if before.get(key) != now:
                raise ValueError(
                    f"{self.path}: was drawn with {key} = {before.get(key)!r}, this evaluation has {now!r}. "
                    "Give another --out, remove the file, or grade these samples as they are with --regrade."
                )

    def write(self, rows: Iterable[Row]) -> None:
        """Replace the whole file, atomically."""
        lines = [json.dumps(row) for row in ({"drawn_with": self.drawn_with}, *rows)]
        write_atomic(self.path, "\n".join(lines) + "\n")

    def append(self, rows: Iterable[Row]) -> None:
        """Add samples and see them to the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def header(self) -> dict[str, Any] | None:
        """What the file says it was drawn with, None without a file."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return dict(json.loads(file.readline())["drawn_with"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def evaluation_of(prompts: PromptSet, samples: int, rows: list[Row]) -> Evaluation:
    """The arrays of a complete file's samples. Raises `ValueError` if they are not those of `prompts`."""
    ids = [row["id"] for row in rows[::samples]]
    if ids != [prompt.id for prompt in prompts.prompts]:
        raise ValueError(
            f"{prompts.name}: the saved samples are of {len(ids)} problems, and not of the {len(prompts)} of the "
            "benchmark. Finish the evaluation without --regrade first, or give the benchmark that was sampled."
        )

    def column(key: str, dtype: Any) -> np.ndarray:
        return np.array([row[key] for row in rows], dtype).reshape(len(ids), samples)

    return Evaluation(
        name=prompts.name,
        ids=tuple(ids),
        samples=samples,
        correct=column("correct", bool),
        length=column("tokens", np.int32),
        truncated=column("truncated", bool),
        no_answer=~column("answered", bool),
        dropped=prompts.dropped_ids,
    )
