"""Checkpoints of a run, written by orbax in the background, committed by one rename, checked before they are read.

A checkpoint is a folder `checkpoints/<step>` with the arrays (`state`), the host's JSON data (`host`), the score
(`metrics`) and `files.json`, sizes and checksums of these (`checkpoint_files.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dynamo_jax.run.bucket import is_remote, place
from dynamo_jax.run.checkpoint_files import (
    SCORE_NAME,
    UNFINISHED,
    CheckpointError,
    damage,
    delete_remedy,
    remove_unfinished,
    resolve_checkpoint,
    score_damage,
    set_aside,
    set_damaged_aside,
    step_folders,
    write_files_list,
)
from dynamo_jax.run.contents import Form
from dynamo_jax.run.folder import write_atomic
from dynamo_jax.run.storage import StorageError, failing_quietly
from dynamo_jax.sharding import agreed

__all__ = ["CheckpointError", "CheckpointStorageError", "Checkpointer", "resolve_checkpoint"]

TRASH_NAME = ".deleted"
# What a process that has written its part waits for the others. Shorter than `checkpoint.patience`, so that a part that
# cannot be written is tried again.
COMMIT_SECONDS = 300
# Not of the storage, whatever it does: trying again would not help.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)


class CheckpointStorageError(CheckpointError, StorageError):
    """A checkpoint that the storage refused. The same call may be made again."""


class UnreadableError(CheckpointError):
    """A checkpoint that is damaged, or that orbax cannot read although it belongs to this model."""


class Checkpointer:
    """The checkpoints in `directory`: the newest `keep` and the one of the highest score (the newest among equals).

    What a killed run left unfinished is removed at the start, and damaged checkpoints are moved aside, with a warning:
    `latest` is one that is whole. With `read_only` nothing is created, moved, removed or saved, which is what an
    evaluation beside a running training needs. With several processes, each makes one and makes the same calls.

    Raises `CheckpointError` if `directory` cannot be made or, with `read_only`, a score in it cannot be read.
    """

    def __init__(self, directory: str | Path, keep: int, read_only: bool = False) -> None:
        self.directory = place(directory) if is_remote(directory) else Path(directory).absolute()
        self._read_only = read_only
        self._saving: int | None = None
        self._failed = False  # a save has, and may have left files
        # A bucket that does not answer says nothing about a checkpoint; a disk says that it is broken.
        self._trouble = CheckpointStorageError if is_remote(self.directory) else CheckpointError
        self._unreadable = CheckpointStorageError if is_remote(self.directory) else UnreadableError
        _quiet_orbax()
        self._empty_trash()
        if read_only:
            _check_scores(self.directory)
        else:
            _by_process_0(partial(set_damaged_aside, self.directory), self.directory, self._trouble)
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            best_fn=_score_of,
            best_mode="max",
            read_only=read_only,
            create=False,
            cleanup_tmp_directories=not read_only,
            # Renamed in one go before it is removed: a kill in the middle of removing leaves no half checkpoint.
            todelete_subdir=None if read_only or is_remote(self.directory) else TRASH_NAME,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=_score_of, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=COMMIT_SECONDS, post_finalization_callback=self._write_files_list
            ),
        )
        remedy = "Free space or permit writing there."
        with _as_checkpoint_error(self.directory, "cannot be opened", remedy, self._trouble):
            if not read_only and jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._whole = None if read_only else self.latest()  # need not be looked through again

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

        Raises `CheckpointStorageError` if this save or the one before cannot be written: the same call, or one for a
        later step, may follow. Raises `CheckpointError` if `step` is not the newest or `host` is not JSON.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory}: was opened to read only. Open it with read_only=False to save.")
        self.wait()
        if self._failed:
            _by_process_0(partial(remove_unfinished, self.directory), self.directory, CheckpointStorageError)
            self._failed = False
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

    def add_score(self, step: int, score: float | None) -> None:
        """Give the checkpoint of `step`, which was saved before it was evaluated, its score.

        Waits for its save. Only process 0's `score` counts; None, one that is not finite and a checkpoint that is gone
        change nothing. Raises `CheckpointStorageError` if it cannot be written; the same call may be made again.
        """
        self.wait()
        file = self._folder(step) / SCORE_NAME

        def write() -> None:
            if score is None or not math.isfinite(score) or step not in self.steps():
                return
            text = json.dumps({"score": float(score)})  # as orbax itself writes it
            if is_remote(file):
                file.write_text(text)  # an object appears whole
            else:
                file.parent.mkdir(exist_ok=True)
                write_atomic(file, text)

        _by_process_0(write, self._folder(step), CheckpointStorageError)
        self._manager.reload()

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
        with _as_checkpoint_error(folder, "cannot be read", delete_remedy(folder), self._unreadable):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        return restored["state"], data["host"]

    def restore_newest(self, abstract_state: Any, older: Sequence[Form] = ()) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, host data) of the newest checkpoint that can be read, None if there is none.

        One in a form of `older` versions is made one of today. One that orbax cannot read is moved aside as a damaged
        one is. Raises `CheckpointError` for one of another model or optimizer, which says nothing about the files.
        """
        while (step := self.latest()) is not None:
            failure: UnreadableError | None = None
            try:
                saved = self._read_host(step)["arrays"]
                form = next((form for form in older if saved == _describe(form.arrays)), Form(abstract_state))
                state, host = self.restore(step, form.arrays)
                state = form.upgrade(state)
            except UnreadableError as error:
                failure = error
            if not agreed(failure is not None):  # a process that raises something else ends the run of all
                return step, state, host
            before = [known for known in self.steps() if known < step]
            wrong = {step: str(failure) if failure else "another process cannot read it"}
            _by_process_0(
                partial(set_aside, self.directory, wrong, max(before, default=None)), self.directory, self._trouble
            )
            self._manager.reload()
        return None

    def restore_host(self, step: int) -> dict[str, Any]:
        """The host data of `step` alone. Raises `CheckpointError` as `restore` does."""
        host: dict[str, Any] = self._read_host(step)["host"]
        return host

    def wait(self) -> None:
        """Wait until the running save is committed. Raises `CheckpointStorageError` if it could not be written."""
        if self._saving is None:
            return
        step, failure = self._saving, None
        try:
            self._finish_saving(step)
        except CheckpointStorageError as error:
            failure = error
        if agreed(failure is not None):
            self._failed = True
            raise failure or CheckpointStorageError(f"{self._folder(step)}: another process could not write its part.")

    def close(self) -> None:
        """Wait, then end orbax's threads. Raises `CheckpointStorageError` if the running save could not be written."""
        try:
            if self._saving is not None:
                self._finish_saving(self._saving)  # asks no other process: it may be gone
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with failing_quietly(kind):
            self.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _finish_saving(self, step: int) -> None:
        with self._writing(step):
            self._manager.wait_until_finished()
            self._empty_trash()
        self._saving = None

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        remedy = "Free space or permit writing there, then run the same command: it goes on from the checkpoint before."
        try:
            with _as_checkpoint_error(self._folder(step), "cannot be written", remedy, CheckpointStorageError):
                yield
        except CheckpointError:
            self._saving = None  # said once; `close` after it must not fail again
            self._failed = True
            self._manager.reload()  # it has already forgotten the older ones that this save was to replace
            raise

    def _read_host(self, step: int) -> dict[str, Any]:
        self.wait()
        folder = self._folder(step)
        if step not in self.steps():
            raise CheckpointError(
                f"{folder}: no such checkpoint. There are steps {self.steps() or 'none'}; choose one of these."
            )
        wrong = damage(folder) if step != self._whole else None
        if wrong:
            raise UnreadableError(f"{folder}: is damaged: {wrong}. {delete_remedy(folder)}")
        with _as_checkpoint_error(folder, "cannot be read", delete_remedy(folder), self._unreadable):
            data: dict[str, Any] = json.loads((folder / "host" / "metadata").read_text())
            return {"host": data["host"], "arrays": data["arrays"]}

    def _write_files_list(self) -> None:
        """In orbax's thread, when every process has written its files and before the rename that commits them."""
        if jax.process_index() != 0:
            return
        final = self._folder(self._saving or 0)
        unfinished = [] if is_remote(final) else list(self.directory.glob(f"{self._saving}{UNFINISHED}*"))
        write_files_list(unfinished[0] if unfinished else final)

    def _empty_trash(self) -> None:
        if self._read_only or is_remote(self.directory) or jax.process_index() != 0:
            return  # in a bucket orbax deletes at once
        trash = self.directory / TRASH_NAME
        if trash.exists():
            with _as_checkpoint_error(trash, "cannot be removed", "Delete that folder."):
                shutil.rmtree(trash)


def _score_of(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _check_scores(directory: Path) -> None:
    """Orbax reads every score when it opens the folder, and fails without naming the file."""
    for step in step_folders(directory):
        wrong = score_damage(directory / str(step))
        if wrong:
            folder = directory / str(step)
            raise CheckpointError(f"{folder}: is damaged: {wrong}. {delete_remedy(folder)}")


def _by_process_0(action: Callable[[], None], directory: Path, kind: type[CheckpointError] = CheckpointError) -> None:
    """Do it on process 0 before any process goes on; its failure is everybody's, and of this kind."""
    failure: CheckpointError | None = None
    if jax.process_index() == 0:
        try:
            with _as_checkpoint_error(directory, "cannot be changed", "Permit writing there.", kind):
                action()
        except CheckpointError as error:
            failure = error
    if agreed(failure is not None):
        raise failure or kind(f"{directory}: process 0 could not change it.")


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


@contextlib.contextmanager
def _as_checkpoint_error(
    folder: Path, what: str, remedy: str, kind: type[CheckpointError] = CheckpointError
) -> Iterator[None]:
    """Turn any failure of the block into one paragraph, of this kind unless it is a mistake in a program."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many types, among them bare `Exception`
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split()).rstrip(".") or "no reason given"
        if len(reason) > 300:  # tensorstore tells much, and the system's word somewhere towards the end
            code = re.search(r"\[os_error_code='(\d+)'\]", reason)
            reason = f"{reason[:100]} ... {os.strerror(int(code[1])) if code else reason[-195:]}"
        if issubclass(kind, StorageError) and isinstance(root, BUGS):
            kind = CheckpointError
        raise kind(f"{folder}: {what}: {type(root).__name__}: {reason}. {remedy}") from error


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


def _quiet_orbax() -> None:
    """Orbax logs each save in many lines, and each failure as a traceback; what matters is raised by `Checkpointer`."""
    absl = logging.getLogger("absl")
    if not any(isinstance(known, _NotFromOrbax) for known in absl.filters):
        absl.addFilter(_NotFromOrbax())
