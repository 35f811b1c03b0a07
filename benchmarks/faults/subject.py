"""A training run that faults are injected into: `dynamo-jax train` with an own verifier, and faults named by `FAULT`.

The verifier decides by a hash, so that a policy without warm-up has something to learn. With `FAULT=verifier` every
answer also costs a question to the real pool of grading workers, whose verdict must be right.

    FAULT=verifier        workers are busy all the time, for somebody to kill or freeze them
    FAULT=slow_grading    grading takes a second, and says that it began by a file `grading` beside the run's folder
    FAULT=slow_checkpoint writing a checkpoint takes a second before it is committed
    FAULT=nan:STEP        one rollout's advantage in that step is not a number
    FAULT=hang:STEP       process 1 stops moving there
    FAULT=commit          process 0 cannot commit its first two checkpoints, while the others have written their parts
    FAULT=clock           the wall clock, as Python sees it, steps at every step, while checkpoints are written
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.run import checkpoint
from dynamo_jax.tasks.arithmetic import ArithmeticVerifier
from dynamo_jax.tasks.grading.verifier import Verifier
from dynamo_jax.tasks.task import build_task

CLOCK_HOURS = (0, 3, -48, 19200, -120000, 5)  # offsets of the wall clock, one after the other
FAULT, _, AT = os.environ.get("FAULT", "").partition(":")


class Hash(ArithmeticVerifier):
    """Right or wrong by a hash of output and answer; see the module."""

    def __init__(self, marker: Path) -> None:
        self.marker, self.asked = marker, 0
        self.pool = Verifier(workers=2) if FAULT == "verifier" else None

    @property
    def counts(self) -> dict[str, int]:
        return self.pool.counts if self.pool else {}

    def close(self) -> None:
        if self.pool:
            self.pool.close()

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        if FAULT == "slow_grading":
            self.marker.touch()
            time.sleep(1.0)
        verdicts = [zlib.crc32(f"{out}|{gold}".encode()) % 16 >= 7 * len(gold) - 6 for out, gold in pairs]
        if self.pool is None:
            return verdicts
        first, self.asked = self.asked, self.asked + len(pairs)
        questions = [
            (f"\\boxed{{\\sqrt{{{8 * k * k}}}}}", f"{2 * k}\\sqrt{{2}}") for k in range(first + 1, self.asked + 1)
        ]
        known = self.pool.grade_batch(questions)  # all are right: a lost one would change the run
        return [verdict and right for verdict, right in zip(verdicts, known, strict=True)]


class Faulty(loop.Trainer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.now, advantage = 0, self.advantage

        def poisoned(reward_B: Any, prompt_of_B: Any) -> Any:
            advantage_B = advantage(reward_B, prompt_of_B)
            return advantage_B.at[0].set(np.nan) if FAULT == "nan" and self.now == int(AT) else advantage_B

        self.advantage = poisoned

    def step(self, step: int) -> dict[str, Any]:
        self.now = step
        clock.offset = 3600.0 * CLOCK_HOURS[step % len(CLOCK_HOURS)]
        if FAULT == "hang" and step == int(AT) and jax.process_index() == 1:
            time.sleep(3600)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().step(step)


class Clock:
    """Stands in for `time.time` and `time.time_ns`."""

    def __init__(self) -> None:
        self.offset, self.time, self.time_ns = 0.0, time.time, time.time_ns

    def install(self) -> None:
        time.time = lambda: self.time() + self.offset
        time.time_ns = lambda: self.time_ns() + int(self.offset * 1e9)


clock = Clock()


def main() -> int:
    if FAULT == "clock":
        clock.install()
    build = build_task
    loop.Trainer = Faulty  # type: ignore[misc]
    loop.build_task = lambda c, *start: dataclasses.replace(
        build(c, *start), verifier=Hash(Path(c.run_dir).parent / "grading")
    )
    if FAULT == "commit":
        checkpoint.COMMIT_SECONDS = 5
        write, failures = checkpoint.Checkpointer._write_files_list, iter([True, True])

        def failing(self: checkpoint.Checkpointer) -> None:
            if jax.process_index() == 0 and next(failures, False):
                raise OSError(28, os.strerror(28))
            write(self)

        checkpoint.Checkpointer._write_files_list = failing  # type: ignore[method-assign]
    if FAULT == "slow_checkpoint":
        commit = checkpoint.Checkpointer._write_files_list

        def slowly(self: checkpoint.Checkpointer) -> None:
            time.sleep(1.0)
            commit(self)

        checkpoint.Checkpointer._write_files_list = slowly  # type: ignore[method-assign]
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
