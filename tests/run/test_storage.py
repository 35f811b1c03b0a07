"""Trying again: how often, what is said, when it ends, and that all processes do the same."""

import logging
import threading
from collections.abc import Callable

import pytest

from dynamo_jax.config import ConfigError
from dynamo_jax.run import storage
from dynamo_jax.run.storage import StorageError, TemporaryFailure, failing_quietly, patiently


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which take no time here."""
    taken: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", taken.append)
    return taken


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    return action


def test_tries_again_until_it_works_and_says_so(naps, caplog):
    with caplog.at_level(logging.WARNING, "dynamo_jax"):
        assert patiently(failing(3, StorageError("a/b: no space.")), "the line of step 7", patience=60) == "done"
    assert sum(naps) == 0.5 + 1.0 + 2.0
    assert max(naps) == 0.5  # a signal is heard within that time
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1].startswith(
        "the line of step 7: a/b: no space. Nothing is lost: trying again in 1.0 s, for at most 60"
    )
    assert len(lines) == 3


@pytest.mark.parametrize(("patience", "slept"), [(0.0, 0.0), (3.0, 3.0), (100.0, 100.0)])
def test_gives_up_when_the_time_is_over(naps, patience, slept):
    with pytest.raises(
        TemporaryFailure, match=f"it: failed for {slept:.0f} s: a: full. Mend the storage; the same command"
    ):
        patiently(failing(1000, OSError("a: full.")), "it", patience)
    assert sum(naps) == slept


def test_what_trying_again_cannot_mend_is_raised_at_once(naps):
    for error in (ValueError("x"), ConfigError("x"), TypeError("x"), TemporaryFailure("x")):
        with pytest.raises(type(error), match="x"):
            patiently(failing(1, error), "it", 60)
    assert not naps


def test_stop_ends_it(naps):
    class Stop(Exception):
        pass

    def stop() -> None:
        if len(naps) == 4:
            raise Stop

    with pytest.raises(Stop):
        patiently(failing(1000, OSError("full")), "it", 600, stop)
    assert sum(naps) == 2.0


class Processes:
    """`agree` of two processes, here threads: each hands in a flag and gets the larger one."""

    def __init__(self) -> None:
        self.flags, self.barrier = [0, 0], threading.Barrier(2, timeout=10)
        self.results: list[object] = [None, None]

    def run(self, *actions: Callable[[], str], patience: float) -> list[object]:
        def one(number: int) -> None:
            def agree(flag: int) -> int:
                self.flags[number] = flag
                self.barrier.wait()
                largest = max(self.flags)
                self.barrier.wait()
                return largest

            try:
                self.results[number] = patiently(actions[number], "it", patience, lambda: agree(0), agree)
            except Exception as error:
                self.results[number] = error

        threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


def test_all_processes_try_again_if_one_failed(naps):
    calls: list[int] = []

    def fine() -> str:
        calls.append(1)
        return "fine"

    assert Processes().run(failing(2, OSError("full")), fine, patience=60) == ["done", "fine"]
    assert len(calls) == 3


def test_all_processes_give_up_together(naps):
    for error in (OSError("full"), TypeError("a mistake")):
        first, second = Processes().run(failing(1000, error), failing(0, error), patience=2)
        assert type(first) is (TemporaryFailure if isinstance(error, OSError) else TypeError)
        assert isinstance(second, TemporaryFailure)
        assert "another process of the run has failed" in str(second)


def test_the_first_failure_is_the_one_that_is_told(caplog):
    with pytest.raises(StorageError), failing_quietly(None):
        raise StorageError("a: full")
    with caplog.at_level(logging.WARNING, "dynamo_jax"), failing_quietly(KeyError):
        raise StorageError("b: full")
    assert [record.getMessage() for record in caplog.records] == ["b: full"]
