"""What a run settles when it is first started, and keeps: every resume and every host makes the same prompts by it.

This module imports no jax.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import NamedTuple

from dynamo_jax.config import ConfigError
from dynamo_jax.run.bucket import is_remote, locations, permanent, place, reaching
from dynamo_jax.run.checkpoint_files import step_folders
from dynamo_jax.run.folder import CONFIG_NAME, cannot_write
from dynamo_jax.run.storage import StorageError, patiently

START_NAME = "started.json"
READING = 2  # how data files are read today (`tasks/read.py`); 1: as they were before runs kept this file


class Start(NamedTuple):
    """`now`: the local time, to the second, that chat templates take for today's. `reading`: see `READING`."""

    now: datetime.datetime
    reading: int = READING

    @classmethod
    def today(cls) -> Start:
        return cls(datetime.datetime.now().replace(microsecond=0))

    def text(self) -> str:
        """What `START_NAME` holds."""
        return json.dumps({"now": self.now.isoformat(), "reading": self.reading}) + "\n"


def start_in(folder: Path, began: bool) -> Start:
    """The start that `folder` holds, or today's; if it holds none and yet a run `began` there, that of an old run.

    An old run's day is that of its `config.yaml`, which is written at its first start and whenever a setting changes.
    Raises `ConfigError` for a file that cannot be read.
    """
    kept = _kept(folder / START_NAME)
    if kept is not None:
        return kept
    if not began:
        return Start.today()
    config = folder / CONFIG_NAME
    if is_remote(folder) or not config.is_file():
        return Start(Start.today().now, reading=1)
    return Start(datetime.datetime.fromtimestamp(int(config.stat().st_mtime)), reading=1)


def start_of_run(run_dir: str, patience: float) -> Start:
    """The start of the run in a folder that nobody has opened yet, which may be in a bucket or not be there.

    Raises `ConfigError` if it cannot be read, `TemporaryFailure` if a bucket does not answer for `patience` seconds.
    """
    folder, checkpoints = place(run_dir), locations(run_dir).checkpoints

    def read() -> Start:
        try:
            return start_in(folder, began=bool(step_folders(checkpoints)))
        except StorageError as error:
            if permanent(error):
                raise ConfigError(f"run_dir = {error}") from error
            raise
        except OSError as error:  # the machine's own disk is not waited for at the start
            raise cannot_write(folder, error) from error

    return patiently(read, f"run_dir = {run_dir}", patience) if is_remote(run_dir) else read()


def start_of_evaluation(folder: Path, checkpoint: Path) -> Start:
    """Of the samples in `folder`: the start kept with them, else that of the run that `checkpoint` is in.

    Without either it is today's, or, where samples of before are in `folder`, theirs. Raises as `start_in` does.
    """
    if _kept(folder / START_NAME) is None:
        for run in (checkpoint, *list(checkpoint.parents)[:2]):
            if _read(run / CONFIG_NAME) is not None:
                return start_in(run, began=True)
    return start_in(folder, began=any(folder.glob("*.jsonl")))


def _kept(path: Path) -> Start | None:
    data = _read(path)
    if data is None:
        return None
    try:
        values = json.loads(data)
        start = Start(datetime.datetime.fromisoformat(values["now"]), values["reading"])
    except (ValueError, LookupError, TypeError) as error:
        raise _broken(path, error) from None
    if start.now.tzinfo is not None or start.reading not in range(1, READING + 1):
        raise _broken(path, f"no version up to this one writes {values}")
    return start


def _broken(path: Path, why: object) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be read: {why}. Restore the file: it says by which date and how the prompts were made."
    )


def _read(path: Path) -> bytes | None:
    """None if there is no such file, which a bucket that does not answer does not say. Raises `StorageError`."""
    with reaching(path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
