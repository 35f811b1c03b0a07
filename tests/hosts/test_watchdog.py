"""Steps that take much longer than those before: seen, shown, and ended if they never end."""

import logging
import queue
import time

import pytest

from dynamo_jax.config import WatchdogConfig
from dynamo_jax.hosts.watchdog import ENOUGH, Watchdog

FAST = {"factor": 10.0, "floor_seconds": 0.05, "end_seconds": None}


@pytest.fixture
def said(caplog):
    logger = logging.getLogger("dynamo_jax")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def watchdog(**changes):
    ended = queue.Queue()
    dog = Watchdog(WatchdogConfig(**FAST | changes), ended.put)
    return dog, ended


def a_step_that_hangs_here(dog, seconds, name="step"):
    with dog.watch(name, "step 57"):
        time.sleep(seconds)


def learned(dog, name="step", seconds=0.002):
    for _ in range(ENOUGH):
        with dog.watch(name, "a usual one"):
            time.sleep(seconds)


def test_a_slow_step_shows_where_it_stands(said, capfd):
    dog, _ = watchdog()
    learned(dog)
    assert capfd.readouterr().err == ""
    a_step_that_hangs_here(dog, 0.4)
    dog.close()
    error = capfd.readouterr().err
    assert error.count("in a_step_that_hangs_here") == 1  # once, however long it goes on
    assert "most recent call first" in error
    assert "step 57 takes more than 0.1 s, 10 times the median" in said.messages[0]
    assert said.messages[-1].startswith("step 57 took 0.4 s")


def test_the_limit_is_ten_times_the_median_and_not_below_the_floor():
    dog, _ = watchdog(floor_seconds=1e-6)
    assert dog.limit("step") is None
    learned(dog, seconds=0.02)
    assert 0.2 <= dog.limit("step") < 0.6
    a_step_that_hangs_here(dog, 0.15)  # one long step does not move it
    assert dog.limit("step") < 0.6
    assert dog.limit("evaluation") is None
    dog.close()
    dog, _ = watchdog(floor_seconds=5.0)
    learned(dog)
    assert dog.limit("step") == 5.0
    dog.close()


def test_a_compilation_is_not_suspicious(said, capfd):
    """Nothing is, until enough is known; and evaluations are not measured by steps."""
    dog, _ = watchdog()
    a_step_that_hangs_here(dog, 0.3)
    learned(dog)
    a_step_that_hangs_here(dog, 0.3, name="evaluation")
    dog.close()
    assert said.messages == []
    assert "a_step_that_hangs_here" not in capfd.readouterr().err


def test_what_never_ends_is_ended(capfd):
    dog, ended = watchdog(end_seconds=0.2)
    learned(dog)
    a_step_that_hangs_here(dog, 0.6)
    assert ended.get(timeout=60).startswith("step 57 has taken 0 s")
    dog.close()


def test_what_fails_is_not_learned_from():
    dog, _ = watchdog(floor_seconds=1e-6)
    learned(dog)
    limit = dog.limit("step")
    for _ in range(2 * ENOUGH):
        with pytest.raises(KeyError), dog.watch("step", "a failing one"):
            raise KeyError
    assert dog.limit("step") == limit
    dog.close()
