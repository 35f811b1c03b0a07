"""What a person sees of a run: `metrics.jsonl`, TensorBoard, optionally W&B, the progress bar and the log."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynamo_jax.run.folder import cannot_write, write_atomic
from dynamo_jax.run.storage import failing_quietly

METRICS_NAME = "metrics.jsonl"
LINE_SECONDS = 5.0  # at most one progress line in this time when there is no terminal

logger = logging.getLogger("dynamo_jax")


class MetricsLog:
    """One JSON line a step in `metrics.jsonl`, in step order, none lost or doubled however often the run is killed.

    `resume_step` is the step of the checkpoint that the run goes on from, None if it starts anew. The lines up to it
    are kept byte for byte; whatever a killed run wrote after it is dropped, since those steps are done again. Lines
    carry consecutive steps, the first one 0 or 1. With `may_lack`, the line of `resume_step` itself may be missing: the
    checkpoint knows it. `last` is the step of the last line. With several processes, only process 0 makes one.

    Raises `ValueError` naming the file, the line and the remedy if a line up to `resume_step` is missing or broken, if
    the folder cannot be written, or if W&B is asked for but not installed.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        *,
        may_lack: bool = False,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        run_name: str | None = None,
    ) -> None:
        self.path = Path(folder) / METRICS_NAME
        self.last: int | None = None
        self._durable = self._resume(resume_step, may_lack)  # bytes that are safe, whatever the storage does
        self._pending = bytearray()  # the lines after them
        self._torn = False  # whether the file may hold something else than these lines
        self._nonfinite: set[str] = set()
        first_redone = 0 if self.last is None else self.last + 1
        self._tensorboard = _open_tensorboard(self.path.parent / "tensorboard", first_redone) if tensorboard else None
        self._wandb = _open_wandb(self.path.parent, wandb_project, config, run_name) if wandb_project else None
        try:
            # Appending in one `write` call: a kill leaves whole lines and at most one partial last line.
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the line of `step`: numbers, or scalar arrays of numpy or jax. Not finite ones are written as null.

        Raises `StorageError` if the file cannot be written; the same call may be made again and leaves one whole line.
        Raises `ValueError` if `step` does not follow the last one, or a value is no number.
        """
        if step not in ((0, 1) if self.last is None else (self.last + 1,)):
            raise ValueError(f"{self.path}: step {step} after step {self.last}: steps must be consecutive, from 0 or 1")
        numbers = plain_numbers(metrics)
        for name in [name for name, value in numbers.items() if not math.isfinite(value)]:
            if name not in self._nonfinite:
                logger.warning("%s is %s at step %d (said once for this metric)", name, numbers[name], step)
            self._nonfinite.add(name)
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN
        line = json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"
        with self._writing():
            self._append(line)
        self._pending += line
        self.last = step
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def sync(self) -> None:
        """Put every line on the disk. Call before each checkpoint, which knows no line but that of its own step.

        Raises `StorageError` if that fails; the same call may be made again.
        """
        with self._writing():
            self._append(b"")
            os.fsync(self._file)
        self._durable += len(self._pending)
        self._pending.clear()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Sync and close everything. May be called again. Raises `StorageError` if the sync fails."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with failing_quietly(kind):
            self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._torn = True
            raise cannot_write(self.path, error) from error

    def _append(self, line: bytes) -> None:
        if self._torn:
            # A nearly full disk takes a part of a line and refuses the rest. And after an fsync that failed, the system
            # may have dropped what it was to write, while the next fsync says that all is well.
            os.ftruncate(self._file, self._durable)
            _write_all(self._file, bytes(self._pending))
            self._torn = False
        _write_all(self._file, line)

    def _resume(self, resume_step: int | None, may_lack: bool) -> int:
        """Cut the file back to what the checkpoint has seen. Returns its size."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise cannot_write(self.path, error) from error
        end = 0
        if resume_step is not None:
            end, self.last = _prefix_through(self.path, data, resume_step, may_lack)
        if len(data) > end:
            write_atomic(self.path, data[:end])
        return end


def _prefix_through(path: Path, data: bytes, resume_step: int, may_lack: bool) -> tuple[int, int | None]:
    """Bytes of `data` up to the line of `resume_step`, and the last step in them (None: no line, resume from 0)."""
    remedy = "Restore the file, delete the checkpoints of this step and later, or start anew in another run_dir"
    last: int | None = None
    end = 0
    for number, end, line in _lines(path, data, f"{remedy}."):
        if line["step"] not in ((0, 1) if last is None else (last + 1,)):
            where = "at the start" if last is None else f"after step {last}"
            raise ValueError(f"{path}:{number}: step {line['step']} {where}: a line is missing. {remedy}.")
        if line["step"] > resume_step:  # only the very first line, step 1 after a checkpoint of step 0
            return 0, None
        last = line["step"]
        if last == resume_step:
            return end, last
    if resume_step == 0 or (may_lack and last == resume_step - 1):
        return end, last
    found = "is empty" if last is None else f"ends after step {last}"
    raise ValueError(f"{path}: {found}, but the checkpoint to resume from is of step {resume_step}. {remedy}.")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a `metrics.jsonl`, in order; null is None. A partial last line (a run being killed) is left out.

    Raises `ValueError` naming the file, the line and the remedy if the file is missing or another line is broken.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: cannot be read: {reason}. Give the folder of a run that has made a step.") from error
    return [line for _, _, line in _lines(path, data, "Restore the file.")]


def _lines(path: Path, data: bytes, remedy: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number from 1, end in bytes, parsed line) of each complete line."""
    end = 0
    for number, raw in enumerate(io.BytesIO(data), 1):
        if not raw.endswith(b"\n"):
            return
        end += len(raw)
        try:
            line = json.loads(raw)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error}. {remedy}") from error
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ValueError(f"{path}:{number}: not an object with a whole number `step`. {remedy}")
        yield number, end, line


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Python numbers of scalars and scalar arrays, by name, in order. Raises `ValueError` for anything else."""
    return {name: _number(name, metrics[name]) for name in sorted(metrics)}


def _number(name: str, value: Any) -> int | float:
    """A Python number from a Python, numpy or jax scalar (waits for a jax array)."""
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if not isinstance(number, int | float):
        raise ValueError(
            f"metric {name!r} = {value!r}: is not a single number. Log a mean, a minimum or a maximum of it."
        )
    return number


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _open_tensorboard(folder: Path, first_redone: int) -> Any:
    from tensorboardX import SummaryWriter  # slow to import, and a run may go without it
    from tensorboardX.record_writer import register_writer_factory

    register_writer_factory(_EventFiles.PREFIX, _EventFiles)
    try:
        # `purge_step` hides what a killed run wrote from that step on, which is written again.
        # The suffix keeps two runs that start in the same second in two files.
        logdir = f"{_EventFiles.PREFIX}:{folder}"
        return SummaryWriter(logdir, purge_step=first_redone, filename_suffix=f".{first_redone}")
    except OSError as error:
        raise cannot_write(folder, error) from error


class _EventFiles:
    """The files of tensorboardX. The first write that fails is a warning and its last: the run does without.

    Left alone, its thread dies of a full disk, and the run hangs on the queue to that thread.
    """

    PREFIX = "dynamo_jax"

    @classmethod
    def directory_check(cls, path: str) -> None:
        os.makedirs(path.removeprefix(f"{cls.PREFIX}:"), exist_ok=True)

    @classmethod
    def open(cls, path: str) -> _EventFiles:
        return cls(path.removeprefix(f"{cls.PREFIX}:"))

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            _write_all(self._file, data)
        except OSError as error:
            logger.warning("%s. TensorBoard gets no more events until the run is started again.",
                           cannot_write(Path(self.path), error))  # fmt: skip
            self.close()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the system may tell of a failed write only now
                os.close(self._file)
            self._file = None


def _open_wandb(folder: Path, project: str, config: Mapping[str, Any] | None, run_name: str | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"logging.wandb_project = {project!r}: the package wandb is not installed. "
            "Run `pip install wandb`, or set logging.wandb_project=null."
        ) from error
    id_path = folder / "wandb_id"
    if not id_path.exists():
        write_atomic(id_path, secrets.token_hex(4))  # a resumed run goes on in the same W&B run
    return wandb.init(
        project=project,
        id=id_path.read_text().strip(),
        name=run_name,
        config=dict(config or {}),
        dir=str(folder),
        resume="allow",
    )


class ProgressBar:
    """Steps done of `total`, what was said of the last one, and the time left.

    On a terminal a bar; otherwise a log line, at most one every `LINE_SECONDS` and one for the last step. With
    `enabled=False`, neither. `what` is done in these steps, where it is not the run itself.
    """

    def __init__(self, total: int, initial: int = 0, enabled: bool = True, what: str = "") -> None:
        self._total, self._initial, self._enabled, self._what = total, initial, enabled, what
        self._start = time.monotonic()
        self._said = self._start if what else -math.inf
        terminal = enabled and sys.stderr.isatty()
        options = {"total": total, "initial": initial, "unit": "step", "desc": what or None, "dynamic_ncols": True}
        self._bar = tqdm(**options) if terminal else None

    def update(self, step: int, shown: Mapping[str, str] | None = None) -> None:
        """Show that `step` steps are done, with these values."""
        shown = shown or {}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._enabled:
            now = time.monotonic()
            if now - self._said >= LINE_SECONDS or step >= self._total:
                self._said = now
                seconds = (now - self._start) / max(step - self._initial, 1) * max(self._total - step, 0)
                said = [f"{name} {value}" for name, value in shown.items()]
                said.append(f"time left {tqdm.format_interval(seconds)}")
                what = f"{self._what}, step" if self._what else "step"
                logger.info("%s %d/%d: %s", what, step, self._total, ", ".join(said))

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TqdmHandler(logging.Handler):
    """Writes to standard error above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(process_index: int) -> logging.Logger:
    """Direct the package's one logger to standard error on process 0, to nowhere on the others. May be repeated."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = _TqdmHandler() if process_index == 0 else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other libraries give the root logger a handler, which would show every line twice
    return logger
