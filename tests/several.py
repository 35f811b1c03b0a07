"""One process of the several that `test_processes.py` starts: a command, with a verifier that has something to teach.

Of `train` every process writes what it knows after each step, so that the test can compare: only process 0 writes the
metrics. Of `eval` it writes how many answers it graded.
Steps may be slowed down (`PAUSE`), and one process may be made to hang (`HANG_AT`, a step), by the environment.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import Coin

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.evaluation import command as evaluation
from dynamo_jax.sharding import to_host
from dynamo_jax.tasks.task import build_task


class Witness(loop.Trainer):
    def step(self, step: int) -> dict[str, Any]:
        time.sleep(float(os.environ.get("PAUSE", "0")))
        if step == int(os.environ.get("HANG_AT", "0")) and jax.process_index() == 1:
            time.sleep(3600)
        metrics = super().step(step)
        stats = jax.tree.map(lambda x: np.asarray(x).tolist(), to_host(self.history))
        told = {k: v for k, v in metrics.items() if "per_second" not in k}
        with open(self.places.work.with_suffix(f".knows{jax.process_index()}"), "a") as file:
            file.write(json.dumps({"step": step, "metrics": told, "stats": jax.tree.leaves(stats)}) + "\n")
        return metrics


class CountingCoin(Coin):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.graded = file, 0

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.graded += len(pairs)
        return super().grade_batch(pairs)

    def close(self) -> None:
        self.file.write_text(str(self.graded))


def main() -> None:
    loop.Trainer = Witness  # type: ignore[misc]
    loop.build_task = lambda *given: dataclasses.replace(build_task(*given), verifier=Coin())
    evaluation.build_verifier = lambda config, **_: CountingCoin(  # type: ignore[misc, assignment]
        Path(config.run_dir).with_suffix(f".graded{jax.process_index()}")
    )
    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
