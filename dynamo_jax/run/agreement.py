"""What the processes of a run must have in common before it starts: the config, the data, the folder, the start."""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Iterable

import jax
import numpy as np

from dynamo_jax.config import Config, dump_config
from dynamo_jax.run.bucket import place
from dynamo_jax.run.folder import CONFIG_NAME
from dynamo_jax.run.start import Start
from dynamo_jax.sharding import agreed, of_process_0


def check_same_run(config: Config, fingerprints: Iterable[str]) -> None:
    """Compare what the processes were started with; each must call it, once process 0 has opened the run's folder.

    `fingerprints`: of each file of prompts.

    Raises `ValueError` in all of them if configs or data differ, and in one that does not see the folder.
    """
    told = [dump_config(config), *fingerprints]
    digest = zlib.crc32("\n".join(told).encode()) >> 1  # fits an int32
    if agreed(digest) != -agreed(-digest):
        raise ValueError(
            "the processes of this run were started with different configs or different data. Start the same command, "
            "with the same files, on all hosts."
        )
    if not (place(config.run_dir) / CONFIG_NAME).is_file():
        raise ValueError(
            f"run_dir = {config.run_dir}: process {jax.process_index()} does not see the folder that process 0 opened. "
            "Put it on a disk that all hosts share, or in a bucket."
        )


def start_of_process_0(start: Start | None) -> Start:
    """The start that process 0 calls this with, on every process, which must all call it."""
    told = start or Start.today()
    numbers = of_process_0(np.array([*told.now.timetuple()[:6], told.reading], np.int32))
    *when, reading = map(int, numbers)
    return Start(datetime.datetime(*when), reading)  # type: ignore[arg-type]
