"""Notices when something that is done again and again takes much longer than it used to, and shows where it stands."""

from __future__ import annotations

import faulthandler
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dynamo_jax.config import WatchdogConfig

log = logging.getLogger("dynamo_jax")

ENOUGH = 5  # durations that make a median; the first of them may hold a compilation
REMEMBERED = 100  # newest durations that the median is of


class Watchdog:
    """Dumps the stacks of all threads to standard error when `watch(name)` takes `factor` times the median of `name`.

    Nothing happens below `floor_seconds`, nor until `name` was done five times. Where it goes on, up to `end_seconds`
    more than that, `end(reason)` is called, from another thread: the main one hangs.
    """

    def __init__(self, config: WatchdogConfig, end: Callable[[str], None]) -> None:
        self._config, self._end = config, end
        self._seconds: dict[str, deque[float]] = {}
        self._changed = threading.Condition()
        self._watched: tuple[str, float, float] | None = None  # what, when it began, its limit in seconds
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def limit(self, name: str) -> float | None:
        """Seconds after which `name` is suspicious; None as long as too few are known."""
        known = self._seconds.get(name, ())
        if len(known) < ENOUGH:
            return None
        return max(self._config.factor * statistics.median(known), self._config.floor_seconds)

    @contextmanager
    def watch(self, name: str, what: str) -> Iterator[None]:
        """Time the block as one of `name`; `what` names it in messages. Blocks that raise do not count."""
        limit, began = self.limit(name), time.monotonic()
        if limit is not None:
            self._set((what, began, limit))
        try:
            yield
        finally:
            if limit is not None:
                self._set(None)
        seconds = time.monotonic() - began
        if limit is not None and seconds > limit:
            log.warning("%s took %.1f s; suspicious from %.1f s on", what, seconds, limit)
        self._seconds.setdefault(name, deque(maxlen=REMEMBERED)).append(seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _set(self, watched: tuple[str, float, float] | None) -> None:
        with self._changed:
            self._watched = watched
            # Not woken: the thread looks by itself several times in `floor_seconds`, and waking it each step costs.

    def _run(self) -> None:
        dumped: float | None = None  # when the block that was dumped began
        while True:
            with self._changed:
                self._changed.wait(min(self._config.floor_seconds, 1.0) / 4)
                if self._closed:
                    return
                watched = self._watched
            if watched is None:
                continue
            what, began, limit = watched
            seconds = time.monotonic() - began
            if seconds > limit and dumped != began:
                dumped = began
                log.warning("%s takes more than %.1f s, %g times the median. Stacks of all threads:",
                            what, limit, self._config.factor)  # fmt: skip
                faulthandler.dump_traceback(2, all_threads=True)
            if self._config.end_seconds is not None and seconds > limit + self._config.end_seconds:
                self._end(f"{what} has taken {seconds:.0f} s, and it is suspicious from {limit:.1f} s on")
                return
