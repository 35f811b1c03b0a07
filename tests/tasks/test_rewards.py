"""Rewards besides `math`, what is added to a reward, and grading in the background."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from dynamo_jax.config.choices import RewardKind
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.tasks import rewards
from dynamo_jax.tasks.grading.verifier import Verifier
from dynamo_jax.tasks.rewards import (
    BUILT_IN,
    Grading,
    Reopened,
    RewardGrader,
    Shaped,
    countdown,
    exact,
    format_reward,
    length_penalty,
    verdict_of,
)

GOLD = '{"target": 24, "numbers": [3, 8, 8]}'


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("<answer>(8*8)-3</answer>", 0),  # 61
        ("<answer>3*8*8/8</answer>", 0),  # a number too often
        (r"\boxed{8 \times 3 + 8 - 8}", 0),
        (r"\boxed{8*3}", 0),  # a number left out
        ("<answer>24</answer>", 0),
        ("<answer>__import__('os')</answer>", 0),
        ("<answer>8**8+3</answer>", 0),
        ("<answer>88/3</answer>", 0),
        ("<answer>3+8 8</answer>", 0),
        ("", 0),
    ],
)
def test_countdown_refuses(answer, reward):
    assert countdown(answer, GOLD) == reward


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("<answer>(10 - 4) * 4</answer>", '{"target": 24, "numbers": [10, 4, 4]}'),
        ("<think>10*4</think> <answer>(10 - 4) * 4 = 24</answer>", '{"target": 24, "numbers": [4, 10, 4]}'),
        ("<ANSWER>\n(10 - 4) * 4\n</ANSWER>", '{"target": 24, "numbers": [10, 4, 4]}'),
        ("<answer>10</answer><answer>4 * (10 - 4)</answer>", '{"target": 24, "numbers": [10, 4, 4]}'),
        (r"<answer>\boxed{(10 - 4) * 4}</answer>", '{"target": 24, "numbers": [10, 4, 4]}'),
        (r"So \boxed{(10-4) \times 4}", '{"target": 24, "numbers": [10, 4, 4]}'),
        (r"\boxed{\frac{8}{3 - \frac{8}{3}}}", '{"target": 24, "numbers": [8, 3, 8, 3]}'),
        ("<answer>8 / (3 - 8/3)</answer>", '{"target": 24, "numbers": [8, 3, 8, 3]}'),
        ("<answer>8 ÷ 2 − 3</answer>", '{"target": 1, "numbers": [8, 2, 3]}'),  # noqa: RUF001
    ],
)
def test_countdown_accepts(answer, gold):
    assert countdown(answer, gold) == 1
    assert countdown(answer.replace("=", "= 2 *"), gold) == (0 if "=" in answer else 1)


@pytest.mark.parametrize(
    ("output", "reward"),
    [
        (r"\boxed{24} <answer>(10-4)*4</answer>", 1),
        (r"<answer>(10-4)*4</answer> \boxed{24}", 0),
        ("<answer>(10-4)*4</answer> <answer>24</answer>", 0),
        ("<answer>(10-4)*4", 0),
        ("<think><answer>(10-4)*4</answer></think>", 0),
        ("<answer>(10-4)*4 or 4*10-4*4</answer>", 0),
    ],
)
def test_countdown_looks_where_the_others_look(output, reward):
    assert countdown(output, '{"target": 24, "numbers": [10, 4, 4]}') == reward


@pytest.mark.parametrize("gold", ["24", "[]", '{"target": 24}', '{"target": 1.5, "numbers": [1]}', "{" * 5000])
def test_countdown_needs_its_kind_of_gold(gold):
    with pytest.raises(ValueError, match="no countdown problem"):
        countdown("1", gold)
    assert "countdown" in (RewardGrader("countdown").unreadable([gold])[0] or "")


def test_every_reward_that_a_config_may_name_is_there():
    assert tuple(BUILT_IN) == get_args(RewardKind)


def test_exact():
    assert exact(r"\boxed{1/2}", "1/2") == 1
    assert exact(r"\boxed{0.5}", "1/2") == 0
    assert exact("", "") == 0


def test_format_and_length():
    assert format_reward(r"<think>a</think> so \boxed{1}") == 1
    assert format_reward(r"so \boxed{1}") == 1
    for wrong in (r"\boxed{1} \boxed{2}", r"\boxed{", r"\boxed{}", r"<think>\boxed{1}", "1"):
        assert format_reward(wrong) == 0
    assert [length_penalty("x" * n, 10, 20) for n in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]
    shaped = Shaped(RewardGrader("exact"), format_bonus=0.5, penalty=1.0, length_free=10, length_limit=20)
    assert shaped.grade_batch([(r"\boxed{1}", "1"), (r"\boxed{1}" + " " * 11, "1"), ("no", "1")]) == [1.5, 0.5, 0]
    assert shaped.counts["graded"] == 3


@pytest.mark.parametrize(
    ("output", "reward"),
    [
        (r"reasoning</think>\boxed{5}", 1),  # the prompt may have ended with the opening
        ("\n\nreasoning\n</think>\n\nSo $\\boxed{5}$.", 1),
        (r"is it \boxed{4}?</think> \boxed{5}", 1),
        ("</think>\\boxed{5}", 1),
        (r"a</think>b</think>\boxed{5}", 0),
        (r"a</think> 5", 0),
        (r"a</think>\boxed{4} \boxed{5}", 0),
        (r"a</think>\boxed{}", 0),
        (r"a</think><think>\boxed{5}", 0),
        (r"a<think>b</think>\boxed{5}", 0),
        (r"<think><think>b</think>\boxed{5}", 0),
    ],
)
def test_the_form_where_the_prompt_opened_the_thinking(output, reward):
    assert format_reward(output) == reward


def test_a_response_is_judged_with_the_opening_of_its_prompt():
    base = Reopened(RewardGrader("exact"))
    shaped = Shaped(base, format_bonus=0.5, penalty=1.0, length_free=20, length_limit=21, opens_thinking=True)
    pairs = [
        (r"why</think>\boxed{5}", "5"),
        (r"maybe \boxed{5}? wait", "5"),  # cut off inside the reasoning
        (r"<think>a</think>\boxed{5}", "5"),  # it writes the opening once more, and is long
        (r"0123</think>\boxed{5}", "5"),  # 21 characters
        (r"012</think>\boxed{5}", "5"),  # 20, without the opening
    ]
    assert shaped.grade_batch(pairs) == [1.5, -1.0, 0.5, 0.5, 1.5]
    assert base.grade_batch(pairs) == [1, 0, 1, 1, 1]
    assert (shaped.counts["graded"], verdict_of(shaped)) == (10, base)
    unshaped = Shaped(RewardGrader("exact"), format_bonus=0.5, penalty=0.0, length_free=0, length_limit=1)
    assert unshaped.grade_batch(pairs[1:2]) == [1.5]


def test_a_built_in_reward_starts_no_process(monkeypatch):
    monkeypatch.delattr("dynamo_jax.tasks.rewards.Pool")
    grader = RewardGrader("gsm8k")
    assert grader.grade_batch([("#### 3", "3"), ("#### 4", "3")]) == [1, 0]
    assert grader.counts == {"graded": 2}
    grader.close()


# --- a reward of the user's own

MINE = """
import os, sys, time
import helper  # beside it

calls = []
x = 1
print("a word at the start")


def half(output, gold):
    return 0.5


def behave(output, gold):
    print(output)
    sys.stderr.write(gold)
    if output == "spin":
        while True:
            pass
    if output == "eat":
        held = []
        while True:
            held.append(bytearray(1 << 20))
    if output == "wait":
        time.sleep(1e6)
    if output == "exit":
        os._exit(0)
    if output == "leave":
        sys.exit(3)
    if output == "raise":
        return {}["no such key"]
    odd = {"nan": float("nan"), "none": None, "text": "0.5", "huge": 10**400, "list": [1]}
    return odd.get(output, helper.third(gold))


def pid(output, gold):
    time.sleep(0.3)
    return os.getpid()


def remember(output, gold):
    calls.append(output)
    return len(calls)


def fill(output, gold):
    calls.append(bytearray(48 << 20))
    return 1
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The name of a module that is found as the trainer finds one: in the current folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine_of_test_rewards.py").write_text(MINE)
    (folder / "helper.py").write_text("third = lambda gold: len(gold) / 3\n")
    (folder / "broken_at_start.py").write_text("def f(output, gold): return 1\n1 / 0\n")
    (folder / "json.py").write_text("raise ImportError('not this one')\n")  # shadows nothing that a worker needs
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        context.syspath_prepend("")  # as `python -m` does
        yield "mine_of_test_rewards"


@pytest.fixture(scope="module")
def behave(own):
    grader = RewardGrader(f"{own}:behave", workers=1, timeout=1.0, memory_mb=256, killed_file="killed.jsonl")
    yield grader
    grader.close()


def test_a_reward_of_the_users_own(own, behave):
    assert behave.grade_batch([("", "a"), ("\0é" + "x" * 10**6, "ab"), ("", "")]) == [1 / 3, 2 / 3, 0]
    assert (behave.counts["graded"], behave.counts["starts"], behave.counts["killed"]) == (3, 1, 0)
    assert own not in sys.modules  # what it keeps is not the trainer's


@pytest.mark.parametrize(("output", "cause"), [("spin", "timeout"), ("eat", "crash"), ("exit", "crash")])
def test_an_answer_that_takes_too_much_costs_its_own_reward_alone(behave, output, cause):
    before = behave.counts
    assert behave.grade_batch([("", "a"), (output, "ab"), ("", "abc")]) == [1 / 3, 0, 1]
    after = behave.counts
    assert (after["graded"] - before["graded"], after["killed"] - before["killed"]) == (3, 1)
    row = json.loads(Path("killed.jsonl").read_text().splitlines()[-1])
    assert row == {"cause": cause, "kind": "reward", "gold": "ab", "answer": output}


def test_an_answer_that_waits_is_not_waited_for_twice(own, behave):
    behave.grade_batch([("", "a")])
    before, behave._pool.workers[0].wall = behave.counts, 0.5
    try:
        assert behave.grade_batch([("wait", "a")]) == [0]
    finally:
        behave._pool.workers[0].wall = 60.0
    assert (behave.counts["timeouts"] - before["timeouts"], behave.counts["starts"] - before["starts"]) == (1, 0)


@pytest.mark.parametrize(
    ("output", "words"),
    [("raise", r"raised KeyError.*Mend(?s:.*)in behave(?s:.*)no such key"), ("leave", "raised SystemExit"),
     ("nan", "gave nan.*Return a finite number"), ("none", "gave None"), ("text", "gave '0.5'"), ("huge", "gave 1000"),
     ("list", r"gave \[1\]")],
)  # fmt: skip
def test_what_is_no_reward_ends_the_run(own, behave, output, words):
    where = rf"task\.reward\.kind = '{own}:behave' {words}"
    with pytest.raises(ValueError, match=where) as caught:
        behave.grade_batch([("", "a"), (output, "the gold"), ("", "a")])
    assert f"for answer 2 of its batch (reference answer 'the gold', response '{output}')" in str(caught.value)
    assert behave.grade_batch([("", "a")]) == [1 / 3]


def test_workers_work_at_the_same_time_and_remember_for_themselves(own):
    with contextlib.closing(RewardGrader(f"{own}:pid")) as grader:
        pids = set(grader.grade_batch([("", "")] * 4))
        assert len(pids) == 2  # the second answer does not wait for the first
        assert os.getpid() not in pids
    with contextlib.closing(RewardGrader(f"{own}:remember", workers=1)) as grader:
        assert grader.grade_batch([("same", "")] * 3) == [1, 2, 3]  # each is asked anew
    with contextlib.closing(RewardGrader(f"{own}:fill", workers=1, memory_mb=128)) as grader:
        assert grader.grade_batch([("", "")] * 4) == [1] * 4  # what earlier answers left is not this one's doing
        assert (grader.counts["killed"], grader.counts["starts"]) == (0, 2)


def test_the_current_folder_is_searched_last(tmp_path, monkeypatch):
    """The console script, unlike `python -m`, does not have it among its paths."""
    (tmp_path / "found_here_alone.py").write_text("import gzip\ndef score(output, gold): return len(output)\n")
    (tmp_path / "gzip.py").write_text("raise ImportError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = list(sys.path)
    with contextlib.closing(RewardGrader("found_here_alone:score", workers=1)) as grader:
        monkeypatch.chdir("/")  # a worker that is started later finds it, too
        grader._pool.workers[0].stop()
        assert grader.grade_batch([("abc", "")]) == [3]
    assert sys.path == before
    with pytest.raises(
        ValueError, match=r"'found_here_alone'.*It was looked for in .*, /\. Give .* in the current folder"
    ):
        RewardGrader("found_here_alone:score", workers=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [("{own}:none", "has no none"), ("{own}:x", "is a int"), ("nowhere:f", "No module named 'nowhere'"), ("maths", ""),
     ("broken_at_start:f", r"cannot be loaded(?s:.*)broken_at_start\.py(?s:.*)ZeroDivisionError")],
)  # fmt: skip
def test_a_reward_that_cannot_be_loaded(own, name, words):
    name = name.format(own=own)
    with pytest.raises(ValueError, match=rf"task\.reward\.kind = '{name}': .*{words}"):
        RewardGrader(name)


# --- in the background


class Slow:
    """Grades when it is let."""

    counts: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.go = threading.Event()

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.go.wait(20)
        return [float(output == gold) for output, gold in pairs]

    def close(self) -> None:
        pass


def test_grading_in_the_background_keeps_order_and_makes_the_caller_wait():
    slow = Slow()
    grading = Grading(slow, waiting=2)
    first, second = grading.submit([("a", "a")]), grading.submit([("a", "b"), ("b", "b")])
    assert not first.done()
    third = []
    thread = threading.Thread(target=lambda: third.append(grading.submit([("c", "c")])))
    thread.start()
    thread.join(0.2)
    assert third == []  # no room
    slow.go.set()
    thread.join(20)
    assert [f.result() for f in (first, second, *third)] == [[1.0], [0.0, 1.0], [1.0]]
    grading.close()
    with pytest.raises(RuntimeError):
        grading.submit([])


def test_waiting_for_room_gives_signs_of_life_while_the_grader_moves(monkeypatch):
    """The main thread waits in `submit`: on a slow host the others would take it for hung."""
    pulses: list[int] = []
    slow = None

    def pulse() -> None:
        pulses.append(1)
        if len(pulses) == 6:  # the last one that there should be
            threading.Timer(0.2, slow.go.set).start()

    monkeypatch.setattr(rewards, "PULSE_SECONDS", 0.01)
    monkeypatch.setattr(PROGRESS, "pulse", pulse)

    class Moving(Slow):
        @property
        def counts(self):
            return {"graded": min(len(pulses), 5)}  # answers come out five times, then no more

    slow = Moving()
    grading = Grading(slow, waiting=1)
    grading.submit([("a", "a")])
    assert pulses == []  # there was room
    assert grading.submit([("b", "b")]).result(20) == [1.0]
    assert len(pulses) == 6
    grading.close()


def test_math_verify_compat_has_three_decimals(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    with Verifier(workers=1, kind="math_verify_compat") as compat:
        pairs = [(r"\boxed{0.3333}", r"\frac{1}{3}"), (r"\boxed{0.33}", r"\frac{1}{3}"), ("It is 1+1", "2"),
                 ("open('graderpwned','w')", "2")]  # fmt: skip
        assert compat.grade_batch(pairs) == [True, False, True, False]
    assert not list(tmp_path.iterdir())
