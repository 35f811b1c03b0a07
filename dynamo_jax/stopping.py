"""How a run is asked to stop by a signal."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynamo_jax.sharding import agreed

log = logging.getLogger("dynamo_jax")


class Interrupted(Exception):
    """A signal asked the run to stop. What could be saved is saved."""

    def __init__(self, number: int, saved: str) -> None:
        self.signal = number
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")


class Stopping:
    """SIGTERM and the first Ctrl-C ask the loop to stop where nothing is lost; a second Ctrl-C stops at once.

    With several processes, what one was asked all do: they meet in every call of `asked` and `check`.
    """

    def __init__(self) -> None:
        self._number = 0

    def asked(self) -> int:
        """The signal that any process got, 0 if none did."""
        return agreed(self._number)

    def check(self) -> None:
        """Raises `Interrupted` if `asked`."""
        number = self.asked()
        if number:
            raise Interrupted(number, "run the same command to go on")

    def check_alone(self) -> None:
        """`check` of this process only, where the others do not call it."""
        if self._number:
            raise Interrupted(self._number, "run the same command to go on")

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the signals over."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return

        def ask(number: int, _: Any) -> None:
            self._number = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("%s: saving before leaving", signal.Signals(number).name)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
