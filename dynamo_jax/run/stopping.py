"""How a run stops before its end: asked by a signal, or ended from a thread because its main one waits for ever."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dynamo_jax.hosts.peers import Peers
from dynamo_jax.run.folder import Status
from dynamo_jax.run.storage import TemporaryFailure
from dynamo_jax.sharding import agreed

log = logging.getLogger("dynamo_jax")

LAST_WORD_SECONDS = 5.0


class Interrupted(Exception):
    """A signal asked the run to stop. What could be saved is saved."""

    def __init__(self, number: int, saved: str) -> None:
        self.signal = number
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")


TOGETHER = (Interrupted, TemporaryFailure)  # what one process raises, all do


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


class Ending:
    """Ends this process at once, called from a thread: the main one waits for what will never come.

    What is in the run's folder stays as it is: nothing there is ever half written. `status` and `peers` are told, where
    there are such.
    """

    def __init__(self) -> None:
        self.status: Status | None = None
        self.peers: Peers | None = None

    def announce(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """For an `ExitStack`: an exception that not every process raises ends the others, with this one's exit status.

        Pushed last, it comes before whatever closing may wait for them.
        """
        if self.peers is None or error is None:
            return
        if isinstance(error, TOGETHER):
            self.peers.close()
            return
        status = 2 if isinstance(error, ValueError | OSError) else 1
        reason = " ".join(str(error).split()) or type(error).__name__
        log.error("%s: %s", type(error).__name__, reason)
        self.peers.fail(reason, status)

    def lost(self, reason: str, exit_status: int = os.EX_TEMPFAIL) -> NoReturn:
        """Another process is gone."""
        if self.status is not None:
            state = "stopped" if exit_status == os.EX_TEMPFAIL else "failed"
            last_word = threading.Thread(target=self.status.end, args=(state, reason), daemon=True)
            last_word.start()
            last_word.join(LAST_WORD_SECONDS)  # the storage may be what hangs
        sys.stderr.write(f"dynamo-jax: error: {reason}\n")
        sys.stderr.flush()
        os._exit(exit_status)

    def hangs(self, reason: str) -> NoReturn:
        """This process does not move."""
        if self.peers is not None:
            self.peers.fail(reason, os.EX_TEMPFAIL)
        self.lost(f"{reason}. The run ends; the same command goes on from the newest checkpoint.")
