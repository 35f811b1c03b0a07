"""A bucket as run folder, `run_dir=gs://bucket/path`: what lies where, and how it is reached.

Orbax writes checkpoints straight into the bucket, every process its own shards. All other files of a run are small:
process 0 keeps them in a working folder on its disk, which `bucket_folder.py` mirrors. This module imports no jax.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_jax.config import ConfigError
from dynamo_jax.run.storage import StorageError, TemporaryFailure

WORK_VARIABLE = "DYNAMO_JAX_WORK_DIR"  # a folder for the working folders; default ~/.cache/dynamo_jax
COMMITTED = "commit_success.txt"  # orbax writes it last: in a bucket nothing can be renamed in one go


class Locations(NamedTuple):
    """Where the parts of a run are."""

    work: Path  # this machine's folder of everything small
    checkpoints: Path  # or the same interface to a bucket
    xla_cache: str


def locations(run_dir: str) -> Locations:
    """Of a local folder, or of `gs://bucket/path`. The same on every process but for the machine's own `work`.

    Raises `ConfigError` for another kind of bucket, a bucket without a path in it, or if gcsfs is not installed.
    """
    if not is_remote(run_dir):
        path = Path(run_dir)
        return Locations(path, path / "checkpoints", str(path / "xla_cache"))
    url = _checked(run_dir)
    parent = Path(os.environ.get(WORK_VARIABLE) or Path.home() / ".cache" / "dynamo_jax")
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    return Locations(parent / name, place(f"{url}/checkpoints"), f"{url}/xla_cache")


def is_remote(path: object) -> bool:
    return "://" in str(path)


def place(path: str | Path) -> Path:
    """A path on the disk, or what has the same methods for a bucket. Raises `ConfigError` as `locations` does."""
    if not is_remote(path):
        return Path(path)
    url = _checked(str(path))
    filesystem()
    from etils import epath

    return epath.Path(url)  # type: ignore[return-value]  # is one, but its stubs do not say so


@functools.cache
def filesystem() -> Any:
    """The bucket's fsspec file system, which remembers no listing: other processes and machines write, too."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "run_dir = gs://...: the package gcsfs is not installed. Run `pip install 'dynamo_jax[gcs]'`, or set "
            "run_dir to a folder on this machine."
        ) from error
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)  # of orbax's own one, too
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs as a traceback what it raises as well
    return fsspec.filesystem("gs")


def below(folder: object) -> dict[str, dict[str, Any]]:
    """What the bucket tells of every object below `folder`, by its path in it. Raises `StorageError`."""
    with reaching(folder):
        root = f"{str(folder).removeprefix('gs://')}/"
        found = filesystem().find(root, detail=True)
        return {name.removeprefix(root): info for name, info in found.items() if not name.endswith("/")}


def move(source: object, target: object) -> None:
    """Copy every object below `source`, then delete them there. Raises `StorageError`; may be called again."""
    names = below(source)
    with reaching(source):
        for name in names:
            filesystem().cp_file(f"{source}/{name}", f"{target}/{name}")
    remove(source)


def remove(folder: object) -> None:
    """Delete every object below `folder`. Raises `StorageError`."""
    names = below(folder)
    if names:
        with reaching(folder):
            filesystem().rm([f"{folder}/{name}" for name in names])


@contextlib.contextmanager
def reaching(path: object) -> Iterator[None]:
    """Whatever the bucket answers but success is a `StorageError`. A local path's errors stay what they are."""
    try:
        yield
    except (StorageError, TemporaryFailure):
        raise
    except Exception as error:  # gcsfs and aiohttp have many types
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split()).rstrip(".")[:300] or "no reason given"
        raise StorageError(
            f"{path}: the bucket cannot be used: {type(error).__name__}: {reason}. Mend that, or set another run_dir."
        ) from error


def permanent(error: StorageError) -> bool:
    """Whether the bucket will give the same answer until somebody changes the name or the permissions."""
    cause = error.__cause__
    code = str(getattr(cause, "code", ""))
    return isinstance(cause, FileNotFoundError) or code in ("400", "401", "403", "404") or "Forbidden" in str(cause)


def _checked(url: str) -> str:
    scheme, _, path = url.partition("://")
    if scheme != "gs":
        raise ConfigError(
            f"run_dir = {url}: of all buckets only gs:// ones are known, where a checkpoint's last file commits it. "
            "Use one, or a folder on this machine."
        )
    if not all(path.rstrip("/").partition("/")[::2]):
        raise ConfigError(f"run_dir = {url}: names no folder in a bucket. Write gs://BUCKET/FOLDER.")
    return url.rstrip("/")
