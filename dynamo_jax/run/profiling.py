"""A window of steps under jax's profiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax

log = logging.getLogger("dynamo_jax")


class Profile:
    """Traces the steps `window` (first, last, both included; None: nothing) into `folder`, for XProf or TensorBoard.

    A window that begins before the run does is traced from the run's first step on; the trace is written after its last
    step, or when the run ends before that.
    """

    def __init__(self, folder: Path, window: tuple[int, int] | None) -> None:
        self._folder, self._window, self._on = folder, window, False

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Around each step."""
        first, last = self._window or (1, 0)
        if first <= step <= last and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        if not self._on:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step >= last:
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info("The profile is in %s: tensorboard --logdir %s", self._folder, self._folder)

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
