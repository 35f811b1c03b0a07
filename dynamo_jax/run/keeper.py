"""Keeps a run: its checkpoints, its lines, its samples. On every process; what is not sharded only process 0 writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dynamo_jax.config import Config
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.run.bucket import Locations
from dynamo_jax.run.checkpoint import Checkpointer, CheckpointError
from dynamo_jax.run.contents import Contents, Form
from dynamo_jax.run.folder import RunFolder, Status
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.run.storage import patiently
from dynamo_jax.run.writer import RunWriter
from dynamo_jax.sharding import agreed

T = TypeVar("T")


class Keeper:
    """Storage that fails is tried again for `checkpoint.patience` seconds; meanwhile `stop` is called, and may raise.

    Use it as a context; `resume` comes first. Every method is called by all processes alike. `folder` and `status` are
    process 0's.

    A checkpoint is saved before its step is evaluated and written to `metrics.jsonl`, and knows the step's metrics.
    """

    def __init__(
        self,
        config: Config,
        places: Locations,
        folder: RunFolder | None,
        status: Status | None,
        stop: Callable[[], None],
    ) -> None:
        self._config, self._places, self._folder, self._status = config, places, folder, status
        self._patiently = partial(patiently, patience=config.checkpoint.patience, stop=stop, agree=agreed)
        self._stack = ExitStack()
        self._writer: RunWriter | None = None
        self.saved: int | None = None  # the newest step that has a checkpoint, or will have one shortly

    def __enter__(self) -> Keeper:
        opened = partial(Checkpointer, self._places.checkpoints, keep=self._config.checkpoint.keep)
        self.checkpoints = self._stack.enter_context(self._patiently(opened, "the checkpoints"))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def resume(self, forms: Sequence[Form]) -> Contents | None:
        """What the newest checkpoint holds, onto the shardings of `forms`; `saved` is its step. None: there is none.

        If its line is in `metrics.jsonl` already, `line` of the result is None.
        """
        found = self._patiently(
            partial(self.checkpoints.restore_newest, forms[0].arrays, forms[1:]), "the newest checkpoint"
        )
        contents = Contents.load_state(*found[1:]) if found else None
        self.saved = found[0] if found else None
        known = contents is not None and contents.line is not None
        if self._folder is not None and self._status is not None:
            self._writer = self._stack.enter_context(
                RunWriter(self._folder, self._status, self._config, self.saved, may_lack=known)
            )
        if contents is None or not agreed(self._writer is not None and self._writer.metrics.last == self.saved):
            return contents
        return contents._replace(line=None)

    def written(self) -> Mapping[str, Any]:
        """The last line of `metrics.jsonl`, on process 0; on the others nothing."""
        lines = read_metrics(self._writer.metrics.path) if self._writer else []
        return lines[-1] if lines else {}

    def write_samples(self, step: int, lines: str) -> None:
        """Some rollouts of the step."""
        self._by_process_0(lambda writer: writer.rollouts.write(step, lines), f"the rollouts of step {step}")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The line of the step."""
        self._by_process_0(lambda writer: writer.write(step, metrics), f"the metrics of step {step}")

    def save(self, step: int, contents: Contents, last: bool = False) -> None:
        """Start to save, in the background; the `last` time, only return when all is safe."""

        def start() -> None:
            self.checkpoints.save(step, *contents.state())
            if last:
                self.checkpoints.wait()

        with PROGRESS.doing("checkpoint", patient=True):  # hosts may take their time with their parts
            self._by_process_0(lambda writer: writer.sync(step), f"the metrics up to step {step}")
            self._patiently(start, f"the checkpoint of step {step}")
        self.saved = step

    def save_apart(self, name: str, arrays: Any) -> None:
        """What a run keeps once, in a folder `name` beside its checkpoints. Returns when all is safe."""

        def save() -> None:
            with Checkpointer(self._apart(name), keep=1) as folder:
                folder.save(1 + (folder.latest() or 0), arrays, {})  # after that of a start which was not kept

        with PROGRESS.doing("checkpoint", patient=True):
            self._patiently(save, f"the {name} of the run")

    def restore_apart(self, name: str, abstract: Any) -> Any:
        """What `save_apart` has saved, onto the shardings of `abstract`.

        Raises `CheckpointError` if it is not there, is damaged, or holds other arrays.
        """

        def restore() -> Any:
            with Checkpointer(self._apart(name), keep=1, read_only=True) as folder:
                newest = folder.latest()
                if newest is None:
                    raise CheckpointError(
                        f"{self._apart(name)}: is missing or empty, and the run cannot go on without what it kept "
                        "there at its start. Restore the folder, or set another run_dir to start a new run."
                    )
                return folder.restore(newest, abstract)[0]

        return self._patiently(restore, f"the {name} of the run")

    def _apart(self, name: str) -> Path:
        return self._places.checkpoints.parent / name

    def add_score(self, step: int, score: float | None) -> None:
        """What the best checkpoint is chosen by. Process 0's counts; None changes nothing."""
        with PROGRESS.doing("checkpoint", patient=True):
            self._patiently(partial(self.checkpoints.add_score, step, score), f"the score of step {step}")

    def _by_process_0(self, action: Callable[[RunWriter], None], what: str) -> None:
        writer = self._writer
        self._patiently(_nothing if writer is None else partial(action, writer), what)


def _nothing() -> None:
    """What a process that writes nothing does where process 0 writes."""
