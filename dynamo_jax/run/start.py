"""What a run settles when it is first started, and keeps: every resume and every host makes the same prompts by it.

This module imports no jax.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import NamedTuple

from dynamo_jax.config import ConfigError
from dynamo_jax.run.bucket import is_remote, reaching
from dynamo_jax.run.folder import CONFIG_NAME

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


def start_of_evaluation(folder: Path, checkpoint: Path) -> Start:
    """Of the samples in `folder`: the start kept with them, else that of the run that `checkpoint` is in.

    Without either it is today's, or, where samples of before are in `folder`, theirs. Raises as `start_in` does.
    """
    if _kept(folder / START_NAME) is None:
        with reaching(checkpoint):
            for place in (checkpoint, *list(checkpoint.parents)[:2]):
                if (place / CONFIG_NAME).is_file():
                    return start_in(place, began=True)
    return start_in(folder, began=any(folder.glob("*.jsonl")))


def _kept(path: Path) -> Start | None:
    with reaching(path):
        if not path.is_file():
            return None
        data = path.read_bytes()
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
