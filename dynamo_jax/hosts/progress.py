"""How far this process has come, which the other hosts judge it by. One object a process: it has one main thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Standing(NamedTuple):
    """A snapshot of `Progress`."""

    arrived: int  # meetings with the other processes that were begun; the same on every process that keeps up
    waiting: bool  # in such a meeting now
    patient: bool  # in something that may take long on one process alone, such as a compilation
    idle: float  # seconds since anything of this changed or `pulse` was called
    doing: str  # for messages


class Progress:
    """Written by the main thread, read by others; each field is replaced in one go, so that no lock is needed."""

    def __init__(self) -> None:
        self._arrived, self._waiting, self._patient, self._doing = 0, False, True, "start"
        self._since = time.monotonic()

    def pulse(self) -> None:
        """Say that this process works, though it arrives nowhere yet: an answer graded, a try to write repeated."""
        self._since = time.monotonic()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around whatever returns only when every process has called it."""
        self._arrived += 1
        self._waiting = True
        self.pulse()
        try:
            yield
        finally:
            self._waiting = False
            self.pulse()

    @contextmanager
    def doing(self, what: str, patient: bool = False) -> Iterator[None]:
        """Names what happens inside. `patient`: it may take long on one process, and nobody should make a fuss."""
        before = self._doing, self._patient
        self._doing, self._patient = what, patient
        self.pulse()
        try:
            yield
        finally:
            self._doing, self._patient = before
            self.pulse()

    def standing(self) -> Standing:
        return Standing(self._arrived, self._waiting, self._patient, time.monotonic() - self._since, self._doing)


PROGRESS = Progress()
