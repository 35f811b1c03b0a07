"""Checkpoints of a run, written by orbax in the background, committed by one rename, checked before they are read.

A checkpoint is a folder `checkpoints/<step>` with the arrays (`state`), the host's JSON data (`host`), the score
(`metrics`) and `files.json`, sizes and checksums of these. Orbax itself notices a flipped bit only in some of its
files, and some damages make it print tracebacks from its threads: a damaged folder is refused before orbax sees it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

TRASH_NAME = ".deleted"
FILES_NAME = "files.json"
# Larger files are compared by size only: reading the many gigabytes of a large run twice would slow its resume.
CHECKSUM_BYTES = 256 << 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names its folder, the reason and the remedy."""


class Checkpointer:
    """The checkpoints in `directory`: the newest `keep` and the one of the highest score (the newest among equals).

    What a killed run left unfinished is removed at the start. With `read_only` nothing is created, removed or saved,
    which is what an evaluation beside a running training needs. With several processes, each makes one and makes the
    same calls.

    Raises `CheckpointError` if `directory` cannot be made, or a score in it cannot be read.
    """

    def __init__(self, directory: str | Path, keep: int, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self._read_only = read_only
        self._saving: int | None = None
        _quiet_orbax()
        self._empty_trash()
        _check_scores(self.directory)
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            best_fn=_score_of,
            best_mode="max",
            read_only=read_only,
            create=False,
            cleanup_tmp_directories=not read_only,
            # Renamed in one go before it is removed: a kill in the middle of removing leaves no half checkpoint.
            todelete_subdir=None if read_only else TRASH_NAME,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=_score_of, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_files_list),
        )
        with _as_checkpoint_error(self.directory, "cannot be opened", "Free space or permit writing there."):
            if not read_only and jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, one being saved included."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the highest score, or None if no checkpoint has a score."""
        best: int | None = self._manager.best_step()
        return best

    def save(self, step: int, state: Any, host: Mapping[str, Any], score: float | None = None) -> bool:
        """Start to save `state` (a pytree of jax arrays) and `host` (JSON data) as the checkpoint of `step`.

        Waits for the save before. Both arguments are copied or held before it returns: the caller may donate the
        arrays and change `host`. A `score` that is None or not finite does not count for the best. Returns False and
        does nothing if `step` is already saved, as when a signal asks to save a step that was just saved.

        Raises `CheckpointError` if this save or the one before cannot be written, or `step` is not the newest.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory}: was opened to read only. Open it with read_only=False to save.")
        self.wait()
        if step in self.steps():
            return False
        latest = self.latest()
        if latest is not None and step < latest:
            raise CheckpointError(
                f"{self._folder(step)}: is older than the newest checkpoint, of step {latest}. "
                "Delete the newer ones to go on from an older one."
            )
        try:
            # Serialised here and now: orbax would do it later, in its thread.
            data = json.loads(json.dumps({"host": host, "arrays": _describe(state)}))
        except TypeError as error:
            raise CheckpointError(
                f"{self._folder(step)}: the host data is not JSON: {error}. Give plain types."
            ) from error
        metrics = {"score": float(score)} if score is not None and math.isfinite(score) else None
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), host=ocp.args.JsonSave(data))
        self._saving = step
        with self._writing(step):
            self._manager.save(step, args=arguments, metrics=metrics, force=True)
        return True

    def restore(self, step: int, abstract_state: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        """The state, onto the shardings of `abstract_state` (`jax.ShapeDtypeStruct` leaves), and the host data.

        The mesh may be another one than the state was saved on. With `partial`, `abstract_state` may leave out parts
        of what was saved (`{"params": ...}`).

        Raises `CheckpointError` naming the folder, the reason and the remedy if the checkpoint is missing, damaged, or
        has other arrays, shapes or dtypes than `abstract_state`. Nothing is deleted.
        """
        data = self._read_host(step)
        folder = self._folder(step)
        wrong = _mismatch(data["arrays"], _describe(abstract_state), partial)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{folder}: was saved from another model or optimizer: {'; '.join(wrong[:5])}{more}. "
                "Use the config that it was trained with."
            )
        arguments = ocp.args.PyTreeRestore(
            item=abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=partial,
        )
        with _as_checkpoint_error(folder, "cannot be read", _delete_remedy(folder)):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return restored["state"], data["host"]

    def restore_host(self, step: int) -> dict[str, Any]:
        """The host data of `step` alone. Raises `CheckpointError` as `restore` does."""
        host: dict[str, Any] = self._read_host(step)["host"]
        return host

    def wait(self) -> None:
        """Wait until the running save is committed. Raises `CheckpointError` if it could not be written."""
        if self._saving is None:
            return
        with self._writing(self._saving):
            self._manager.wait_until_finished()
        self._saving = None
        self._empty_trash()

    def close(self) -> None:
        """Wait, then end orbax's threads. Raises `CheckpointError` if the running save could not be written."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        remedy = "Free space or permit writing there, then run the same command: it goes on from the checkpoint before."
        try:
            with _as_checkpoint_error(self._folder(step), "cannot be written", remedy):
                yield
        except CheckpointError:
            self._saving = None  # said once; `close` after it must not fail again
            self._manager.reload()  # it has already forgotten the older ones that this save was to replace
            raise

    def _read_host(self, step: int) -> dict[str, Any]:
        self.wait()
        folder = self._folder(step)
        if step not in self.steps():
            raise CheckpointError(
                f"{folder}: no such checkpoint. There are steps {self.steps() or 'none'}; choose one of these."
            )
        wrong = _damage(folder)
        if wrong:
            raise CheckpointError(f"{folder}: is damaged: {wrong}. {_delete_remedy(folder)}")
        with _as_checkpoint_error(folder, "cannot be read", _delete_remedy(folder)):
            data: dict[str, Any] = json.loads((folder / "host" / "metadata").read_text())
            return {"host": data["host"], "arrays": data["arrays"]}

    def _write_files_list(self) -> None:
        """In orbax's thread, when every process has written its files and before the rename that commits them."""
        if jax.process_index() != 0:
            return
        unfinished = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        folder = next(unfinished, self._folder(self._saving or 0))
        # The files at the top of the folder are still written after this; they hold nothing that we read.
        files = [path for part in folder.iterdir() if part.is_dir() for path in part.rglob("*") if path.is_file()]
        (folder / FILES_NAME).write_text(
            json.dumps({str(path.relative_to(folder)): _fingerprint(path) for path in files})
        )

    def _empty_trash(self) -> None:
        trash = self.directory / TRASH_NAME
        if not self._read_only and jax.process_index() == 0 and trash.exists():
            with _as_checkpoint_error(trash, "cannot be removed", "Delete that folder."):
                shutil.rmtree(trash)


def resolve_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(folder of checkpoints, step) for a run folder, its `checkpoints` folder (both: the newest) or one step's folder.

    Raises `CheckpointError` if there is no checkpoint at `path`.
    """
    path = Path(path)
    for directory in (path / "checkpoints", path):
        steps = _step_folders(directory)
        if steps:
            return directory, max(steps)
    step_folder = path.resolve()
    if step_folder.name.isdigit() and any((path / name).exists() for name in ("state", "host", FILES_NAME)):
        return step_folder.parent, int(step_folder.name)
    what = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {what}. Give a run folder, its checkpoints/ folder or one step's folder in that.")


def _step_folders(directory: Path) -> list[int]:
    """Steps with a committed folder; unfinished ones have a suffix."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir())


def _score_of(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _check_scores(directory: Path) -> None:
    """Orbax reads every score when it opens the folder, and fails without naming the file."""
    for step in _step_folders(directory):
        folder = directory / str(step)
        path = folder / "metrics" / "metrics"
        with _as_checkpoint_error(folder, "cannot be read", _delete_remedy(folder)):
            if path.exists() and not isinstance(json.loads(path.read_text())["score"], float):
                raise TypeError("its score is not a number")


def _describe(state: Any) -> dict[str, list[Any]]:
    """Dtype and shape of each leaf by its path (`params.layers.w`), to tell two states apart."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def _mismatch(saved: Mapping[str, Any], wanted: Mapping[str, Any], partial: bool) -> list[str]:
    def text(description: Any) -> str:
        return "nothing" if description is None else f"{description[0]}{description[1]}"

    names = wanted.keys() if partial else sorted(saved.keys() | wanted.keys())
    return [
        f"{name} is {text(saved.get(name))} in the checkpoint, {text(wanted.get(name))} in this run"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]


def _fingerprint(path: Path) -> list[int]:
    """Size in bytes and CRC-32 (0 for a large file)."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= CHECKSUM_BYTES else 0]


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    path = folder / FILES_NAME
    try:
        files = json.loads(path.read_text())
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"the file {name} is missing"
            found = _fingerprint(folder / name)
            if found[0] != expected[0]:
                return f"the file {name} has {found[0]} bytes instead of {expected[0]}"
            if found != expected:
                return f"the content of the file {name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"the file {path.name} cannot be read ({error})"
    return None


def _delete_remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to go on from the checkpoint before."


@contextlib.contextmanager
def _as_checkpoint_error(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn any failure of the block into one paragraph."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many types, among them bare `Exception`
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split())[:300].rstrip(".") or "no reason given"
        raise CheckpointError(f"{folder}: {what}: {type(root).__name__}: {reason}. {remedy}") from error


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


def _quiet_orbax() -> None:
    """Orbax logs each save in many lines, and each failure as a traceback; what matters is raised by `Checkpointer`."""
    absl = logging.getLogger("absl")
    if not any(isinstance(known, _NotFromOrbax) for known in absl.filters):
        absl.addFilter(_NotFromOrbax())
