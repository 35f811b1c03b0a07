"""Rewards besides `math`, what is added to a reward, and grading in the background."""

import threading
from collections.abc import Sequence
from typing import get_args

import pytest

from dynamo_jax.config.choices import RewardKind
from dynamo_jax.tasks.grading.verifier import Verifier
from dynamo_jax.tasks.rewards import (
    BUILT_IN,
    Grading,
    RewardGrader,
    Shaped,
    countdown,
    exact,
    format_reward,
    gsm8k,
    length_penalty,
    load_reward,
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
        (r"So \boxed{(10-4) \times 4}", '{"target": 24, "numbers": [10, 4, 4]}'),
        (r"\boxed{\frac{8}{3 - \frac{8}{3}}}", '{"target": 24, "numbers": [8, 3, 8, 3]}'),
        ("<answer>8 / (3 - 8/3)</answer>", '{"target": 24, "numbers": [8, 3, 8, 3]}'),
        ("<answer>8 ÷ 2 − 3</answer>", '{"target": 1, "numbers": [8, 2, 3]}'),  # noqa: RUF001
    ],
)
def test_countdown_accepts(answer, gold):
    assert countdown(answer, gold) == 1
    assert countdown(answer.replace("=", "= 2 *"), gold) == (0 if "=" in answer else 1)


@pytest.mark.parametrize("gold", ["24", "[]", '{"target": 24}', '{"target": 1.5, "numbers": [1]}', "{" * 5000])
def test_countdown_needs_its_kind_of_gold(gold):
    with pytest.raises(ValueError, match="no countdown problem"):
        countdown("1", gold)
    assert "countdown" in (RewardGrader("countdown").unreadable([gold])[0] or "")


def test_every_reward_that_a_config_may_name_is_there():
    assert tuple(BUILT_IN) == get_args(RewardKind)


def test_gsm8k_and_exact():
    assert gsm8k("so\n#### 1,234", "1234") == 1
    assert gsm8k("#### $12.50 in all", "work #### 12.5") == 1
    assert gsm8k("#### -3", "-3") == 1
    assert gsm8k(r"\boxed{1234}", "1234") == 0
    assert gsm8k("#### ", "1234") == 0
    assert exact(r"\boxed{1/2}", "1/2") == 1
    assert exact(r"\boxed{0.5}", "1/2") == 0
    assert exact("", "") == 0


def test_format_and_length():
    assert format_reward(r"<think>a</think> so \boxed{1}") == 1
    assert format_reward(r"so \boxed{1}") == 1
    for wrong in (r"\boxed{1} \boxed{2}", r"\boxed{", r"\boxed{}", r"<think>\boxed{1}", r"a</think>\boxed{1}", "1"):
        assert format_reward(wrong) == 0
    assert [length_penalty("x" * n, 10, 20) for n in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]
    shaped = Shaped(RewardGrader("exact"), format_bonus=0.5, penalty=1.0, length_free=10, length_limit=20)
    assert shaped.grade_batch([(r"\boxed{1}", "1"), (r"\boxed{1}" + " " * 11, "1"), ("no", "1")]) == [1.5, 0.5, 0]
    assert shaped.counts["graded"] == 3


def test_a_reward_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("half = lambda o, g: 0.5\nbad = lambda o, g: float('nan')\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardGrader("mine:half").grade_batch([("a", "b")] * 2) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"mine:bad.*nan.*finite"):
        RewardGrader("mine:bad").grade_batch([("a", "b")])
    for name in ("mine:none", "nowhere:f", "mine:x", "maths"):
        with pytest.raises(ValueError, match=rf"task\.reward\.kind = '{name}'"):
            load_reward(name)


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


def test_math_verify_compat_has_three_decimals(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    with Verifier(workers=1, kind="math_verify_compat") as compat:
        pairs = [(r"\boxed{0.3333}", r"\frac{1}{3}"), (r"\boxed{0.33}", r"\frac{1}{3}"), ("It is 1+1", "2"),
                 ("open('graderpwned','w')", "2")]  # fmt: skip
        assert compat.grade_batch(pairs) == [True, False, True, False]
    assert not list(tmp_path.iterdir())
