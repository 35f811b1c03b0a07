"""Grading is shared by the processes: each judges its part, and all know the whole."""

import dataclasses
import threading
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from dynamo_jax import judge as module
from dynamo_jax.batch import Rollouts
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.judge import Judge
from dynamo_jax.tasks.rewards import Grading, Shaped


class Letters:
    """Token i is the i-th letter; 0 ends."""

    stop_ids = (0,)

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


class Same:
    """Right if output and answer are equal; says what it was asked."""

    def __init__(self):
        self.asked, self.counts = [], {}

    def grade_batch(self, pairs):
        self.asked += pairs
        return [output == gold for output, gold in pairs]


def piece(*words):
    tokens = np.zeros((len(words), 4), np.int32)
    for row, word in zip(tokens, words, strict=True):
        row[: len(word)] = [ord(letter) - 96 for letter in word]
    n = len(words)
    lengths = np.array([len(word) + 1 for word in words], np.int32)
    return Rollouts(tokens, lengths, np.ones(n, bool), np.zeros((n, 4), np.float32))


def judged(grader, pieces):
    grading = Grading(grader.base if isinstance(grader, Shaped) else grader)
    judge = Judge(grading, grader, Letters())
    for words, answers in pieces:
        judge.add(piece(*words), answers)
    try:
        return judge.result()
    finally:
        grading.close()


PIECES = [(["abc", "b", "c"], ["abc", "x", "c"]), (["d", "e"], ["d", "y"])]


def test_one_process_grades_everything():
    verdict, added = judged(Same(), PIECES)
    assert verdict.tolist() == [1, 0, 1, 1, 0]
    assert added.tolist() == [0] * 5


def test_what_is_added_comes_beside_the_verdict():
    verdict, added = judged(Shaped(Same(), 0.0, 0.5, 0, 2), PIECES)
    assert verdict.tolist() == [1, 0, 1, 1, 0]
    assert added.tolist() == [-0.5, -0.25, -0.25, -0.25, -0.25]  # by length in characters


def test_shares_of_two_processes_add_up(monkeypatch):
    graders, results = [Same(), Same()], []
    gathered: dict[int, np.ndarray] = {}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(module, "total", lambda x, index=index: gathered.setdefault(index, x))
        judged(graders[index], PIECES)
    results = gathered[0] + gathered[1]
    assert results[0].tolist() == [1, 0, 1, 1, 0]
    assert [len(grader.asked) for grader in graders] == [2, 3]  # 1 + 1 and 2 + 1
    assert sorted(graders[0].asked + graders[1].asked) == sorted(
        pair for words, answers in PIECES for pair in zip(words, answers, strict=True)
    )


def test_what_grading_raises_comes_out():
    class Broken(Same):
        def grade_batch(self, pairs):
            raise RuntimeError("a grading worker did not start")

    with pytest.raises(RuntimeError, match="did not start"):
        judged(Broken(), PIECES)
    with pytest.raises(TimeoutError, match="the grader's own"):
        judged(dataclasses.make_dataclass("Late", [], bases=(Same,), namespace={"grade_batch": late})(), PIECES)


def test_what_ends_just_when_the_waiting_does_is_taken():
    class Late(Future):
        def result(self, timeout=None):
            if timeout is not None and not self.done():
                self.set_result([1.0, 0.0])
                raise TimeoutError
            return super().result(timeout)

    judge = Judge(Grading(Same()), Same(), Letters())
    assert judge._waited_for(Late()) == [1.0, 0.0]


def late(*_):
    raise TimeoutError("the grader's own")


def test_slow_grading_says_that_it_works(monkeypatch):
    """Only as long as answers come out: a grader that hangs must not hold the others for ever."""
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.02)
    pulses, go = [], threading.Event()

    def pulse():
        pulses.append(1)
        if len(pulses) == 6:  # the last one that there should be
            threading.Timer(0.3, go.set).start()

    monkeypatch.setattr(PROGRESS, "pulse", pulse)

    class Slow(Same):
        def __init__(self):
            self.asked = []

        @property
        def counts(self):
            return {"graded": min(len(pulses), 5)}  # moves five times, then no more

        def grade_batch(self, pairs):
            go.wait(10)
            return super().grade_batch(pairs)

    verdict, _ = judged(Slow(), PIECES)
    assert verdict.sum() == 3
    assert 6 <= len(pulses) <= 7  # the second piece may be looked at once
