"""Storage that fails for a while: what is tried again, for how long, and what the run says meanwhile.

This module imports no jax.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from dynamo_jax.config import ConfigError

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between two tries
POLL_SECONDS = 0.5  # how soon a signal is heard while waiting

AGAIN, GIVE_UP = 1, 2

log = logging.getLogger("dynamo_jax")
T = TypeVar("T")


class StorageError(ConfigError):
    """Storage that refused to write or read. Whoever frees space, or waits for a bucket, may try the same again."""


class TemporaryFailure(Exception):
    """The run ended for a reason outside of it that may pass. The same command goes on."""


def patiently(
    action: Callable[[], T],
    what: str,
    patience: float,
    stop: Callable[[], None] = lambda: None,
    agree: Callable[[int], int] = lambda flag: flag,
) -> T:
    """`action()`, tried again while it raises `StorageError` or `OSError`, for `patience` seconds after it first did.

    Each failed try is a warning that names `what`, the reason and the time left. `stop` is called meanwhile and may
    raise. `agree` is the largest of what the processes of the run give it: all of them call this function for the same
    action, all try again if one has failed, and all give up if one does. An action that only some of them can fail in
    must be harmless to repeat, and may not wait for other processes before it can fail.

    Raises `TemporaryFailure` naming `what` and the reason once the time is over.
    """
    failed_at: float | None = None  # a first try may itself take long to fail, as with several processes
    slept, delay = 0.0, FIRST_DELAY
    while True:
        error: Exception | None = None
        try:
            result = action()
        except (StorageError, OSError) as caught:
            error = caught
        except Exception:
            agree(GIVE_UP)  # the others must not wait for a process that is gone
            raise
        if error is not None and failed_at is None:
            failed_at = time.monotonic()
        seconds = max(time.monotonic() - failed_at, slept) if failed_at is not None else slept
        decision = agree(0 if error is None else AGAIN if seconds < patience else GIVE_UP)
        if not decision:
            return result
        reason = str(error).rstrip(".") if error else "another process of the run has failed in it"
        if decision == GIVE_UP:
            raise TemporaryFailure(
                f"{what}: failed for {seconds:.0f} s: {reason}. Mend the storage; the same command goes on from the "
                "newest checkpoint."
            ) from error
        # The same on every process, however long each one's try took: `stop` may talk to the others.
        delay = min(delay, max(patience - slept, POLL_SECONDS))
        log.warning(
            "%s: %s. Nothing is lost: trying again in %.1f s, for at most %.0f s more",
            what, reason, delay, max(patience - seconds, 0.0),
        )  # fmt: skip
        _sleep(delay, stop)
        slept += delay
        delay = min(2 * delay, LONGEST_DELAY)


def _sleep(seconds: float, stop: Callable[[], None]) -> None:
    """In pieces: a signal only sets a flag, and Python goes on sleeping after it."""
    while seconds > 0:
        stop()
        time.sleep(min(seconds, POLL_SECONDS))
        seconds -= POLL_SECONDS
    stop()


@contextlib.contextmanager
def failing_quietly(already: object) -> Iterator[None]:
    """Failing storage is only a warning where something has failed `already`: that is what ends the run."""
    try:
        yield
    except (StorageError, OSError) as error:
        if already is None:
            raise
        log.warning("%s", error)
