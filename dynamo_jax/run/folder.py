"""The run folder on disk: who may write in it, what config it belongs to, and files that are never half written.

This module imports no jax: a full disk, a foreign folder or a changed config is reported before any device work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

import yaml

from dynamo_jax.config import Config, ConfigError, differences, dump_config, resolved
from dynamo_jax.run.checkpoint_files import step_folders
from dynamo_jax.run.storage import StorageError

CONFIG_NAME = "config.yaml"
STATUS_NAME = "status.json"
STATUS_SECONDS = 60.0  # how often a running run refreshes it
LOCK_NAME = ".lock"
TEMPORARY_PREFIX = ".tmp-"  # every unfinished file starts with it, so that a killed run's leftovers are known as ours
log = logging.getLogger("dynamo_jax")

PROBE_BYTES = 1 << 20  # a run writes more than this, so less free space means that it cannot work

# Locks held by this process. A forked worker inherits the descriptor and, outliving a `kill -9` of its parent, would
# go on holding the lock; so children close it.
_held_locks: set[int] = set()


def _forget_locks() -> None:
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data`, wholly or not at all, durably (file and folder are synced before it returns).

    Raises `StorageError` naming the file, the system's reason and the remedy; the old file is then still there.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a file system that fails in this, too, has its first reason told
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> StorageError:
    """The error of every failed write in a run folder: the path, the system's reason and the remedy."""
    reason = error.strerror or str(error)
    return StorageError(
        f"{path}: cannot be written: {reason}. Free space or permit writing there, or set another run_dir."
    )


class RunFolder:
    """An existing, writable run folder that no other process uses while this object lives.

    Nothing that is already in the folder is overwritten. Killed at any moment, the same call goes on: whatever may be
    there without a `config.yaml` (the lock, unfinished files) is known by its name. With several processes, only
    process 0 makes one.

    Raises `ConfigError` (a `ValueError`) if the folder cannot be created or written, is full, holds something else
    than a run (nothing is touched then), or is in use (names the other process and its host).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._lock = self._acquire()
            try:
                # Under the lock: without it these may be another run's files, just being written.
                for leftover in self.path.glob(f"{TEMPORARY_PREFIX}*"):
                    leftover.unlink()
                self._probe()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_atomic(self, name: str, text: str) -> None:
        """Replace the file `name` of the folder by `text`, wholly or not at all. Raises `StorageError`."""
        write_atomic(self.path / name, text)

    def check_or_write_config(self, config: Config) -> bool:
        """Bind the folder to `config`: write it the first time, compare with it afterwards.

        Returns whether the folder had a config already. Keys that change no result (`FREE_ON_RESUME`) take their new
        values. Raises `ConfigError` that lists every other difference as `key: old -> new`, once the run has a
        checkpoint; the file then stays.
        """
        old = self._read_config()
        new = resolved(config)
        # Before the first checkpoint there is no result that a corrected path or value could change.
        changed = differences(old, new) if old is not None and self._has_checkpoint() else []
        if changed:
            raise ConfigError(
                f"{self.config_path}: this run was started with other values, which would change its result: "
                f"{'; '.join(changed)}. Set another run_dir to start a new run, or put the values back to resume."
            )
        if old != new:
            self.write_atomic(CONFIG_NAME, dump_config(config))
        return old is not None

    def sync(self) -> None:
        """Make all files safe against the loss of this machine, where the folder is in a bucket."""

    def close(self) -> None:
        """Give the folder free. The kernel does the same when the process dies."""
        if self._lock is not None:
            _held_locks.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()

    def _has_checkpoint(self) -> bool:
        return bool(step_folders(self.checkpoints))

    def _read_config(self) -> dict[str, Any] | None:
        try:
            tree = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.config_path}: cannot be read: {' '.join(str(error).split())}. "
                "Restore the file, or set another run_dir."
            ) from error
        if not isinstance(tree, dict) or not {"run_dir", "trainer"} <= tree.keys():
            raise ConfigError(
                f"{self.config_path}: is not the config of a run. Restore the file, or set another run_dir."
            )
        return tree

    def _refuse_foreign(self) -> None:
        if self._read_config() is not None:
            return
        foreign = sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name != LOCK_NAME and not entry.name.startswith(TEMPORARY_PREFIX)
        )
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise ConfigError(
                f"run_dir = {self.path}: is not empty ({shown}) and has no {CONFIG_NAME} of a run. "
                "Set run_dir to a new or empty folder; nothing was touched."
            )

    def _acquire(self) -> int:
        descriptor = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").split()
            os.close(descriptor)
            pid, host = holder if len(holder) == 2 else ("unknown", "unknown")
            raise ConfigError(
                f"run_dir = {self.path}: is in use by process {pid} on host {host}. "
                "Stop that process, or set another run_dir."
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        _held_locks.add(descriptor)
        return descriptor

    def _probe(self) -> None:
        """Write and sync a file for real: `os.access` sees neither a full disk nor a quota."""
        probe = self.path / f"{TEMPORARY_PREFIX}probe"
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


class Status:
    """`status.json` of a run: what whoever watches it from outside needs to decide whether to start it again.

    `{"state": ..., "step": 57, "steps": 150, "message": ..., "host": ..., "pid": ...}`, where the state is

        running   since this object was entered; the step is refreshed when `update` is called
        stopped   by one of the exceptions `stopped`, after which the same command goes on
        failed    by any other one: somebody has to mend what the message says
        complete  the block ended

    A process that is killed leaves `running` behind. Raises `StorageError` if the file cannot be written, but not at
    the end, where that is a warning.
    """

    def __init__(self, folder: RunFolder, steps: int, stopped: tuple[type[BaseException], ...]) -> None:
        self.folder, self.steps, self.stopped = folder, steps, stopped
        self._step = self._old_step()
        self._written = 0.0
        self._mutex = threading.Lock()  # a thread may have the last word

    def update(self, step: int, now: bool = False) -> None:
        """`step` is done. Written `now`, or if the file is older than `STATUS_SECONDS`."""
        self._step = step
        if now or time.monotonic() - self._written >= STATUS_SECONDS:
            self._write("running", "")

    def end(self, state: Literal["stopped", "failed", "complete"], message: str) -> None:
        """The last word, where no exception passes through the block."""
        try:
            self._write(state, message)
        except StorageError as error:
            log.warning("%s", error)

    def __enter__(self) -> Status:
        self._write("running", "")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self.end("complete", f"all {self.steps} steps are done")
        else:
            words = " ".join(str(error).split()) or type(error).__name__
            self.end("stopped" if isinstance(error, self.stopped) else "failed", words)

    def _old_step(self) -> int:
        try:
            return int(json.loads((self.folder.path / STATUS_NAME).read_text())["step"])
        except (OSError, ValueError, LookupError, TypeError):  # none yet; it is only for show until the first update
            return 0

    def _write(self, state: str, message: str) -> None:
        values = {
            "state": state, "step": self._step, "steps": self.steps, "message": message,
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        with self._mutex:
            self.folder.write_atomic(STATUS_NAME, json.dumps(values) + "\n")
        self._written = time.monotonic()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
