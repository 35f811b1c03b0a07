"""XLA's compilation cache in the run's folder: a resumed run compiles nothing again."""

from __future__ import annotations

import json
import logging
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from dynamo_jax.run.folder import write_atomic
from dynamo_jax.run.storage import StorageError

log = logging.getLogger("dynamo_jax")

WHOLE_NAME = "whole.json"
REMOTE_SECONDS = 0.5  # shorter compilations are not worth a write to a bucket
_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


class XlaCache:
    """Compiled programs under `folder`: a path, or an address that jax can write to, such as `gs://...`.

    jax neither writes an entry atomically nor replaces one that a kill has cut short: `settle` notes which are whole,
    and the next start removes the others. In a bucket entries appear whole. Process 0 writes, all read.
    """

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/{_machine()}"
        self._remote = "://" in folder
        self._whole: dict[str, int] | None = None

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Programs that are compiled inside come from the cache or go into it. One that the user has set up stays."""
        if jax.config.values[_OPTIONS[0]] is not None:
            yield
            return
        if not self._remote and jax.process_index() == 0:
            self._remove_torn()
        before = {name: jax.config.values[name] for name in _OPTIONS}
        values = (self.path, REMOTE_SECONDS if self._remote else 0.0, -1)
        try:
            _set(dict(zip(_OPTIONS, values, strict=True)))
            yield
            self.settle()
        finally:
            _set(before)

    def settle(self) -> None:
        """Note the entries that are there. Call where nothing compiles, such as between steps."""
        if self._whole is None:
            return
        sizes = self._sizes()
        if sizes != self._whole:
            try:
                write_atomic(Path(self.path) / WHOLE_NAME, json.dumps(sizes))
            except StorageError as error:  # a full disk costs the next start some compilations, not this run its life
                log.warning("%s", error)
            self._whole = sizes

    def _remove_torn(self) -> None:
        folder = Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._whole = dict(json.loads((folder / WHOLE_NAME).read_text()))
        except (OSError, ValueError):
            self._whole = {}
        for name, size in self._sizes().items():
            if self._whole.get(name) != size:
                (folder / name).unlink()

    def _sizes(self) -> dict[str, int]:
        """Bytes of each entry."""
        entries = [path for path in Path(self.path).iterdir() if path.is_file() and path.name != WHOLE_NAME]
        return {path.name: path.stat().st_size for path in entries}


def _set(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else what was opened, or not, by an earlier compilation stays


def _machine() -> str:
    """The kind of machine. Code for a CPU holds instructions that another one may not have."""
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [f"flags: {platform.machine()} {platform.processor()}"]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"cpu-{zlib.crc32(flags.encode()):08x}"
