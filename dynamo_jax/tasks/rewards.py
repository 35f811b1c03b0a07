"""Rewards besides `math`: functions of a response and its reference answer, and what is added to any reward.

A reward is a function `(output, gold) -> float`, usually 0 or 1. `RewardGrader` makes a `Grader` of one, `Shaped` adds
a format bonus and a length penalty to any. The rewards here take linear time and evaluate no text as code.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from typing import Any, Protocol, cast, get_args

from dynamo_jax.config.choices import RewardKind, VerifierKind
from dynamo_jax.tasks import arithmetic
from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.latex import normalise

MAX_CHARS = 400  # of a countdown expression
_EXPRESSION = re.compile(r"[\d+\-*/() ]+")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\$?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")


class Grader(Protocol):
    """`Verifier`, or anything that grades like it. Rewards are numbers, `bool` for right and wrong alone."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]: ...

    def close(self) -> None: ...


class Reward(Protocol):
    """The reward of a response. Called from one thread at a time; what it raises ends the run."""

    def __call__(self, output: str, gold: str) -> float: ...


def exact(output: str, gold: str) -> float:
    """1 if the extracted answer is the reference answer, character for character."""
    return float((extract(output) or "").strip() == gold.strip() != "")


def gsm8k(output: str, gold: str) -> float:
    """1 if the number after the last `####` is the reference number. No `####`: 0."""
    found, expected = (_hash_number(text) for text in (output, gold if "####" in gold else f"#### {gold}"))
    return float(found is not None and found == expected)


def _hash_number(text: str) -> Fraction | None:
    _, mark, after = text.rpartition("####")
    match = _NUMBER.match(after.strip()) if mark else None
    if match is None or len(match.group(1)) > 50:
        return None
    value = Fraction(match.group(1).replace(",", ""))
    return -value if match.group(0).startswith("-") else value


def countdown(output: str, gold: str) -> float:
    """1 if the answer reaches the target with + - * / and parentheses, from every given number exactly once.

    `gold` is JSON: `{"target": 24, "numbers": [3, 8, 8]}`. The answer stands in `<answer>` or where `math` looks for
    it; "= 24" after it is allowed. Raises `ValueError` for another gold.
    """
    target, numbers = countdown_gold(gold)
    tags = _ANSWER_TAG.findall(output.rpartition("</think>")[2])
    answer = tags[-1] if tags else extract(output)
    if answer is None or len(answer) > MAX_CHARS:
        return 0.0
    left, _, right = answer.translate(str.maketrans("×÷−·", "*/-*")).partition("=")  # noqa: RUF001
    text = re.sub(r"\\cdot|\\times", "*", left).replace("\\div", "/").replace("$", "").strip()
    if "\\frac" in text:
        text = normalise(text).replace("\\cdot", "*")
        for _ in range(20):  # the innermost ones first
            text, changed = _FRACTION.subn(r"((\1)/(\2))", text)
            if not changed:
                break
    if not _EXPRESSION.fullmatch(text) or re.search(r"\d\s+\d|\*\s*\*|\)\s*\d|\d\s*\(|\)\s*\(", text):
        return 0.0
    try:
        reached = evaluate(text.replace("*", "\\cdot "))
        stated = evaluate(normalise(right)) if right.strip() else target
    except NotRationalError:
        return 0.0
    return float(reached == target == stated and Counter(map(int, re.findall(r"\d+", text))) == Counter(numbers))


def countdown_gold(gold: str) -> tuple[int, list[int]]:
    """Target and numbers of a countdown problem. Raises `ValueError` if the gold is something else."""
    try:
        value: Any = json.loads(gold)
        target, numbers = value["target"], value["numbers"]
        good = isinstance(target, int) and numbers and all(isinstance(n, int) and n >= 0 for n in numbers)
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f"the reference answer {gold[:80]!r} is no countdown problem. "
            'Write it as {"target": 24, "numbers": [3, 8, 8]}.'
        )
    return target, numbers


def format_reward(output: str) -> float:
    """1 if the response keeps to the form: at most one closed `<think>`, then one closed and filled box."""
    thought, closing, rest = output.rpartition("</think>")
    thinking = output.count("<think>") == output.count("</think>") <= 1 and thought.lstrip().startswith(
        "<think>" if closing else ""
    )
    return float(thinking and len(re.findall(r"\\boxed\s*\{", rest)) == 1 and extract(rest) is not None)


def length_penalty(output: str, free: int, limit: int) -> float:
    """0 up to `free` characters, then falling linearly to -1 at `limit` and beyond."""
    return -min(1.0, max(0.0, (len(output) - free) / (limit - free)))


BUILT_IN: dict[RewardKind, Reward] = {
    "exact": exact,
    "arithmetic": arithmetic.grade,
    "countdown": countdown,
    "gsm8k": gsm8k,
}


def load_reward(name: str) -> Reward:
    """A built-in reward, or the user's own `module:function`. Raises `ValueError` if there is none of that name."""
    if name in get_args(RewardKind):
        return BUILT_IN[cast(RewardKind, name)]
    module, _, function = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join((*get_args(VerifierKind), *get_args(RewardKind)))
        raise ValueError(
            f"task.reward.kind = {name!r}: cannot be loaded: {error}. Give one of {known}, or module:function of a "
            "module on PYTHONPATH."
        ) from None
    if not callable(reward):
        raise ValueError(f"task.reward.kind = {name!r}: is a {type(reward).__name__}, not a function (output, gold).")
    return reward  # type: ignore[no-any-return]


class RewardGrader:
    """A `Grader` of one reward function, in the calling process: meant for functions that are bounded by themselves."""

    def __init__(self, name: str) -> None:
        self.name, self.reward = name, load_reward(name)
        self._lock = threading.Lock()
        self._graded = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"graded": self._graded}

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Each pair's reward. Raises `ValueError` for one that is no finite number."""
        rewards = []
        with self._lock:
            for output, gold in pairs:
                reward = self.reward(output, gold)
                try:
                    value = float(reward)
                except (TypeError, ValueError):
                    value = math.nan
                if not math.isfinite(value):
                    raise ValueError(
                        f"task.reward.kind = {self.name!r} gave {reward!r} for the reference answer {gold[:80]!r}. "
                        "Return a finite number."
                    )
                rewards.append(value)
            self._graded += len(rewards)
        return rewards

    def unreadable(self, golds: Sequence[str]) -> list[str | None]:
        """Why a reference answer cannot be used, None for those that can."""
        return [_gold_problem(self.name, gold) for gold in golds]

    def close(self) -> None:
        """Nothing to close."""


def _gold_problem(name: str, gold: str) -> str | None:
    if name == "countdown":
        try:
            countdown_gold(gold)
        except ValueError as error:
            return str(error)
    if name == "gsm8k" and _hash_number(gold if "####" in gold else f"#### {gold}") is None:
        return f"the reference answer {gold[:80]!r} is no number"
    return None if gold.strip() else "the reference answer is empty"


class Shaped:
    """Another grader's reward, plus `format_bonus` for the right form, less up to `length_penalty` for length."""

    def __init__(
        self, base: Grader, format_bonus: float, penalty: float, length_free: int, length_limit: int
    ) -> None:  # fmt: skip
        self.base, self.format_bonus, self.penalty = base, format_bonus, penalty
        self.length_free, self.length_limit = length_free, length_limit

    @property
    def counts(self) -> Mapping[str, int]:
        return self.base.counts

    def added(self, output: str) -> float:
        """What the response gets beside the verdict."""
        penalty = self.penalty * length_penalty(output, self.length_free, self.length_limit)
        return self.format_bonus * format_reward(output) + penalty

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        rewards = self.base.grade_batch(pairs)
        return [float(reward) + self.added(output) for reward, (output, _) in zip(rewards, pairs, strict=True)]

    def close(self) -> None:
        self.base.close()


def added_reward(grader: Grader, output: str) -> float:
    """What `grader` adds to the verdict on a response: 0 unless it is `Shaped`."""
    return grader.added(output) if isinstance(grader, Shaped) else 0.0


def verdict_of(grader: Grader) -> Grader:
    """The grader that says right or wrong, without what is added for form and length."""
    return grader.base if isinstance(grader, Shaped) else grader


class Grading:
    """Grades in the background: the device goes on while early rollouts are judged.

    `submit` returns at once; `Future.result()` gives the rewards of that batch, in order, or raises what grading
    raised. At most `waiting` batches are held: one more makes `submit` wait.
    """

    def __init__(self, grader: Grader, waiting: int = 8) -> None:
        self.grader = grader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._room = threading.BoundedSemaphore(waiting)

    def submit(self, pairs: Sequence[tuple[str, str]]) -> Future[Sequence[float]]:
        self._room.acquire()
        try:
            future = self._thread.submit(self.grader.grade_batch, pairs)
        except RuntimeError:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self) -> None:
        """Wait for what runs, drop what waits. The grader stays open."""
        self._thread.shutdown(wait=True, cancel_futures=True)
