"""How long the phases of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dynamo_jax.hosts.progress import PROGRESS


class Phases:
    """Seconds of each phase and of the whole since the last `begin` or `taken`: `time/<phase>` and `time/step`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.known: set[str] = set()  # those that were gone through once, with their compilations
        self._began: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def since_begin(self) -> float:
        """Seconds; 0 before the first step."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Around each phase. The first time its programs are compiled, for however long."""
        began = time.perf_counter()
        with PROGRESS.doing(name, patient=name not in self.known):
            yield
        self.known.add(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def so_far(self) -> dict[str, float]:
        """The metrics of what the step has taken until now."""
        times = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return times if self._began is None else {**times, "time/step": self.since_begin()}

    def taken(self) -> dict[str, float]:
        """`so_far` for the last time: what follows is of the next step."""
        times, self.seconds = self.so_far(), {}
        return times
