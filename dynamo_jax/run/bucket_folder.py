"""A run folder in a bucket: a working folder on this machine that mirrors it, and a lock against other machines.

The bucket is the truth: a run that starts takes over what is there, whatever the working folder holds. Locks do not
compare clocks, which may be wrong: their holder rewrites them, and who finds one looks whether it changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamo_jax.config import ConfigError
from dynamo_jax.run.bucket import below, filesystem, is_remote, locations, permanent, reaching
from dynamo_jax.run.folder import CONFIG_NAME, LOCK_NAME, TEMPORARY_PREFIX, RunFolder, cannot_write
from dynamo_jax.run.storage import StorageError, TemporaryFailure, failing_quietly, patiently

SYNC_SECONDS = 60.0  # how often the files are uploaded at least
BEAT_SECONDS = 10.0  # how often the holder of a lock rewrites it
DEAD_SECONDS = 30.0  # a lock that has not changed for so long has no holder
SETTLE_SECONDS = 2.0  # after which, of several that take over a lock, only the last one finds itself in it
LEASE_NAME = ".lease"  # the token of the last lock that this machine's working folder has held
# Are never in the working folder.
NOT_SMALL = ("checkpoints", "checkpoints_damaged", "reference", "reference_damaged", "xla_cache")
NOT_FETCHED = (*NOT_SMALL, "tensorboard")  # every start writes events into files of its own

log = logging.getLogger("dynamo_jax")


def open_run_folder(run_dir: str, patience: float) -> RunFolder:
    """The run folder on the disk or in the bucket. Raises as `RunFolder` and `BucketFolder` do."""
    return BucketFolder(run_dir, patience) if is_remote(run_dir) else RunFolder(run_dir)


@contextlib.contextmanager
def local_copies(runs: Sequence[str]) -> Iterator[list[Path]]:
    """The runs' folders, with copies of the small files of those in a bucket. Raises `StorageError`."""
    with tempfile.TemporaryDirectory(prefix="dynamo_jax_") as folder:
        copies = []
        for number, run in enumerate(runs):
            if not is_remote(run):
                copies.append(Path(run))
                continue
            url = str(locations(run).checkpoints).rpartition("/")[0]
            copy = Path(folder, str(number), url.rpartition("/")[2])
            copy.mkdir(parents=True)
            Mirror(filesystem(), url, copy).fetch(sorted(below(url)))
            copies.append(copy)
        yield copies


class Mirror:
    """The small files in `work` and their copies below `url`, a URL of `fs`. Any thread may call it."""

    def __init__(self, fs: Any, url: str, work: Path) -> None:
        self.fs, self.url, self.work = fs, url, work
        self._known: dict[str, tuple[int, int, int]] = {}  # stamps of the files that both have alike
        self._mutex = threading.Lock()

    def fetch(self, names: list[str]) -> None:
        """Make `work` hold these files of the bucket and nothing else but its lock. Raises `StorageError`."""
        with self._mutex:
            for old in self.work.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name not in (LOCK_NAME, LEASE_NAME):
                    old.unlink()
            for name in names:
                if name.partition("/")[0] in NOT_FETCHED or name == LOCK_NAME:
                    continue
                with reaching(f"{self.url}/{name}"):
                    data = self.fs.cat_file(f"{self.url}/{name}")
                path = self.work / name
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                    self._known[name] = _stamp(path.stat())
                except OSError as error:  # the machine's own disk is not waited for at the start
                    raise ConfigError(str(cannot_write(path, error))) from error

    def sync(self) -> None:
        """Upload what has changed in `work`, delete what has gone from it. Raises `StorageError`; may be repeated."""
        with self._mutex:
            found = dict(self._files())
            for name, stamp in found.items():
                if self._known.get(name) != stamp:
                    self._upload(name, stamp)
            for name in self._known.keys() - found.keys():
                with reaching(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.url}/{name}")
                del self._known[name]

    def publish(self, name: str) -> None:
        """Upload one file now. Raises `StorageError`."""
        with self._mutex:
            self._upload(name, _stamp((self.work / name).stat()))

    def _upload(self, name: str, stamp: tuple[int, int, int]) -> None:
        """A file that grows while it is read has another stamp the next time."""
        try:
            data = (self.work / name).read_bytes()
        except FileNotFoundError:
            return
        with reaching(f"{self.url}/{name}"):
            self.fs.pipe_file(f"{self.url}/{name}", data)
        self._known[name] = stamp

    def _files(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        for folder, _, names in os.walk(self.work):
            for name in names:
                path = Path(folder, name)
                relative = str(path.relative_to(self.work))
                if name.startswith(TEMPORARY_PREFIX) or relative in (LOCK_NAME, LEASE_NAME):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    yield relative, _stamp(path.stat())


class Lease:
    """The lock `url`, a file in a bucket that says who uses the folder around it.

    Raises `ConfigError` naming the process and its host if somebody does, `StorageError` if the bucket does not answer.
    `ours` says whether a lock with a token is known to be of a process that has ended.
    """

    def __init__(self, fs: Any, url: str, ours: Callable[[str], bool] = lambda _: False) -> None:
        self.fs, self.url = fs, url
        self.token = secrets.token_hex(16)
        self._count = 0
        self._lost: str | None = None
        self._ended = threading.Event()
        self._acquire(ours)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `TemporaryFailure` if another process has taken the lock over: this one may write no more."""
        if self._lost:
            raise TemporaryFailure(
                f"{self.url}: was taken over by {self._lost}, which found no sign of this process for "
                f"{DEAD_SECONDS:.0f} s. This one stops; if that one ends, the same command goes on."
            )

    def release(self) -> None:
        """Give the folder free. Raises `StorageError`."""
        self._ended.set()
        self._thread.join()
        if self._lost is None and self._is_own(self._read()):
            with reaching(self.url), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.url)

    def _acquire(self, ours: Callable[[str], bool]) -> None:
        found = self._read()
        if found is not None and not ours(_holder(found).get("token", "")):
            log.info(
                "%s: is the lock of %s. Waiting for %.0f s to see whether that one is alive",
                self.url, _name(found), DEAD_SECONDS,
            )  # fmt: skip
            end = time.monotonic() + DEAD_SECONDS
            while found is not None and time.monotonic() < end:
                time.sleep(min(BEAT_SECONDS / 2, DEAD_SECONDS))
                before, found = found, self._read()
                if found is not None and found != before:
                    raise self._in_use(found)
        if found is None:
            try:
                self._write(mode="create")  # refused by the bucket if another one was faster
            except FileExistsError:
                raise self._in_use(self._read() or b"") from None
            return
        self._write()
        time.sleep(SETTLE_SECONDS)
        found = self._read()
        if not self._is_own(found):
            raise self._in_use(found or b"")

    def _beat(self) -> None:
        told = False
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if found is not None and not self._is_own(found):
                    self._lost = _name(found)
                    log.warning("%s: was taken over by %s", self.url, self._lost)
                    return
                self._write()
                told = False
            except StorageError as error:
                if not told:
                    log.warning("%s Trying again every %.0f s", error, BEAT_SECONDS)
                told = True

    def _in_use(self, found: bytes) -> ConfigError:
        run_dir = self.url.rpartition("/")[0]
        return ConfigError(
            f"run_dir = {run_dir}: is in use by {_name(found)}. Stop that process, or set another run_dir."
        )

    def _is_own(self, found: bytes | None) -> bool:
        return found is not None and _holder(found).get("token") == self.token

    def _read(self) -> bytes | None:
        with reaching(self.url):
            try:
                data: bytes = self.fs.cat_file(self.url)
            except FileNotFoundError:
                return None
            return data

    def _write(self, mode: str = "overwrite") -> None:
        self._count += 1
        holder = {"token": self.token, "pid": os.getpid(), "host": socket.gethostname(), "count": self._count}
        exists: FileExistsError | None = None
        with reaching(self.url):
            try:
                self.fs.pipe_file(self.url, json.dumps(holder).encode(), mode=mode)
            except FileExistsError as error:
                exists = error
        if exists:
            raise exists


class BucketFolder(RunFolder):
    """A run folder `gs://bucket/path` that no other process uses; `path` is the working folder on this machine.

    Raises `ConfigError` as `RunFolder` does, for the bucket and for the working folder, or if gcsfs is missing; and
    `TemporaryFailure` if the bucket does not answer for `patience` seconds.
    """

    def __init__(self, url: str, patience: float) -> None:
        place = locations(url)
        self.url = url.rstrip("/")
        self._checkpoints = place.checkpoints
        self._ended = threading.Event()
        super().__init__(place.work)
        try:
            patiently(self._take_over, f"run_dir = {self.url}", patience)
        except BaseException:
            super().close()
            raise
        self._thread = threading.Thread(target=self._sync_now_and_then, name="mirror", daemon=True)
        self._thread.start()

    @property
    def checkpoints(self) -> Path:
        return self._checkpoints

    def sync(self) -> None:
        self._lease.check()
        self._mirror.sync()

    def write_atomic(self, name: str, text: str) -> None:
        super().write_atomic(name, text)
        self._lease.check()
        self._mirror.publish(name)

    def close(self) -> None:
        """Upload what is new and give the folder free. Raises `StorageError`, `TemporaryFailure`; may be repeated."""
        if self._ended.is_set() or self._lock is None:
            super().close()
            return
        self._ended.set()
        self._thread.join()
        try:
            self.sync()
            self._lease.release()
        finally:
            super().close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with failing_quietly(kind):
                self.close()
        except TemporaryFailure:
            if kind is None:
                raise

    def _take_over(self) -> None:
        fs = filesystem()
        try:
            names = sorted(below(self.url))
        except StorageError as error:
            if permanent(error):
                raise ConfigError(f"run_dir = {error}") from error
            raise
        if names and CONFIG_NAME not in names and any(name != LOCK_NAME for name in names):
            tops = sorted({name.partition("/")[0] for name in names} - {LOCK_NAME})
            raise ConfigError(
                f"run_dir = {self.url}: is not empty ({', '.join(tops[:5])}) and has no {CONFIG_NAME} of a run. Set "
                "run_dir to a new or empty folder; nothing was touched."
            )
        token = self.path / LEASE_NAME
        # We hold the working folder's lock, so the process that had it when it wrote this token has ended.
        before = token.read_text() if token.exists() else None
        self._lease = Lease(fs, f"{self.url}/{LOCK_NAME}", ours=lambda found: found == before)
        try:
            token.write_text(self._lease.token)
            self._mirror = Mirror(fs, self.url, self.path)
            self._mirror.fetch(sorted(below(self.url)))  # what the one before wrote last
        except BaseException:
            with contextlib.suppress(StorageError):  # the first error is the one to be told
                self._lease.release()
            raise

    def _sync_now_and_then(self) -> None:
        told = False
        while not self._ended.wait(SYNC_SECONDS):
            try:
                self.sync()
                told = False
            except StorageError as error:
                if not told:
                    log.warning("%s Trying again every %.0f s", error, SYNC_SECONDS)
                told = True
            except TemporaryFailure:
                return  # said by the lease, and by the next save

    def _refuse_foreign(self) -> None:
        """The working folder is ours; the bucket is looked at in `_take_over`."""


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    """A file replaced by one of equal size within the clock's tick has another inode."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(content: bytes) -> str:
    holder = _holder(content)
    return f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
