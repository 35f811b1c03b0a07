"""Rewards besides `math`: functions of a response and its reference answer, and what is added to any reward.

A reward is a function `(output, gold) -> float`, usually 0 or 1. `RewardGrader` makes a `Grader` of one, `Shaped` adds
a format bonus and a length penalty to any. The rewards here take linear time and evaluate no text as code; those of
users may do as they like, in workers.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, get_args

from dynamo_jax.config.choices import RewardKind, VerifierKind
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.tasks import arithmetic
from dynamo_jax.tasks.grading.alternatives import alternatives
from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate
from dynamo_jax.tasks.grading.extract import END_OF_THINK, THINK, extract, reopened
from dynamo_jax.tasks.grading.latex import normalise
from dynamo_jax.tasks.grading.pool import Killed, Pool, RefusedError
from dynamo_jax.tasks.gsm8k import gold_number, gsm8k

MAX_CHARS = 400  # of a countdown expression
_EXPRESSION = re.compile(r"[\d+\-*/() ]+")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
PULSE_SECONDS = 1.0


class Grader(Protocol):
    """`Verifier`, or anything that grades like it. Rewards are numbers, `bool` for right and wrong alone."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]: ...

    def close(self) -> None: ...


class Reward(Protocol):
    """The reward of a response, a finite number. What it raises ends the run."""

    def __call__(self, output: str, gold: str) -> float: ...


def exact(output: str, gold: str) -> float:
    """1 if the extracted answer is the reference answer, character for character."""
    return float((extract(output) or "").strip() == gold.strip() != "")


def countdown(output: str, gold: str) -> float:
    """1 if the answer reaches the target with + - * / and parentheses, from every given number exactly once.

    `gold` is JSON: `{"target": 24, "numbers": [3, 8, 8]}`. The answer stands where `math` looks for it, as in
    `<answer>`; "= 24" after it is allowed. Raises `ValueError` for another gold.
    """
    target, numbers = countdown_gold(gold)
    answer = extract(output)
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
    """1 if the response keeps to the form: at most one closed `<think>`, then one closed and filled box.

    The `<think>` may be missing before its end: the prompt may have ended with it.
    """
    rest = output.rpartition(END_OF_THINK)[2]
    opened = output.count(THINK)
    thinking = output.count(END_OF_THINK) <= 1 and (opened == 0 or (opened == 1 and output.lstrip().startswith(THINK)))
    return float(thinking and len(re.findall(r"\\boxed\s*\{", rest)) == 1 and extract(rest) is not None)


def length_penalty(output: str, free: int, limit: int) -> float:
    """0 up to `free` characters, then falling linearly to -1 at `limit` and beyond."""
    return -min(1.0, max(0.0, (len(output) - free) / (limit - free)))


BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "arithmetic": arithmetic.grade,
    "countdown": countdown,
    "gsm8k": gsm8k,
}


class RewardGrader:
    """A `Grader` of one reward function: a built-in one in this process, the user's `module:function` in workers.

    The module is imported in each worker, by the paths of this process and from the current folder, where nothing hides
    installed packages, and what it remembers is that worker's. An
    answer that takes more than `timeout` seconds of CPU time, waits for too long, takes more than `memory_mb` or ends
    its worker in another way has the reward 0 and is `killed`; see `Pool` for the limits and for `killed_file`.

    Of a reference that is a list (`alternatives`) the function is asked for each text, and the highest reward counts.
    With `whole_golds` the user's function gets every reference as it stands.

    Raises `ValueError` if there is no such function.
    """

    def __init__(
        self, name: str, workers: int = 2, timeout: float = 5.0, memory_mb: int = 1024, *,
        killed_file: str | Path | None = None, whole_golds: bool = False,
    ) -> None:  # fmt: skip
        self.name, self._pool, self._whole_golds = name, None, whole_golds
        self._lock = threading.Lock()
        self._graded = 0
        if name in BUILT_IN:
            return
        if ":" not in name:
            raise self._unknown("there is no such reward")
        arguments = (name, json.dumps(_places_of_modules()))
        self._pool = Pool(workers, timeout, memory_mb, arguments, killed_file=killed_file)
        try:
            self._pool.start()
        except (RefusedError, RuntimeError) as error:
            self._pool.close()
            raise self._unknown(str(error)) from None

    @property
    def counts(self) -> dict[str, int]:
        return {"graded": self._graded, **(self._pool.counts if self._pool else {})}

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Each pair's reward, in order.

        Raises `ValueError` for one that is no finite number and for what the user's function raises, naming the
        function and the answer, and `RuntimeError` if workers cannot be started or the grader was closed.
        """
        if self._pool is None:
            reward = BUILT_IN[self.name]
            return [self._counted(max(reward(output, one) for one in alternatives(gold))) for output, gold in pairs]
        futures: list[Future[float]] = []
        try:
            for place, (output, gold) in enumerate(pairs, 1):
                futures.append(self._pool.submit(self._in_worker, self._pool, place, output, gold))
            return [future.result() for future in futures]
        except CancelledError as error:
            raise RuntimeError("this grader was closed while it graded") from error
        finally:
            for future in futures:
                future.cancel()  # after an error: do not go on with what nobody waits for

    def unreadable(self, golds: Sequence[str]) -> list[str | None]:
        """Why a reference answer cannot be used, None for those that can."""
        problems = ((_gold_problem(self.name, one) for one in alternatives(gold)) for gold in golds)
        return [next(filter(None, each), None) for each in problems]

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._pool is not None:
            self._pool.close()

    def _counted(self, reward: float) -> float:
        with self._lock:
            self._graded += 1
        return reward

    def _in_worker(self, pool: Pool, place: int, output: str, gold: str) -> float:
        golds = (gold,) if self._whole_golds else alternatives(gold)
        return self._counted(max(self._asked(pool, place, output, one) for one in golds))

    def _asked(self, pool: Pool, place: int, output: str, gold: str) -> float:
        try:
            reply = pool.ask("reward", gold, output)
        except Killed:
            return 0.0
        except RefusedError as error:
            raise self._unknown(str(error)) from None
        if "reward" in reply:
            return float(reply["reward"])
        name = f"task.reward.kind = {self.name!r}"
        where = f"for answer {place} of its batch (reference answer {gold[:80]!r}, response {output[:80]!r})"
        if "gave" in reply:
            raise ValueError(f"{name} gave {reply['gave']} {where}. Return a finite number.")
        raise ValueError(f"{name} raised {reply['error']} {where}. Mend it, or return 0.\n{reply['story']}")

    def _unknown(self, why: str) -> ValueError:
        known = ", ".join((*get_args(VerifierKind), *get_args(RewardKind)))
        return ValueError(
            f"task.reward.kind = {self.name!r}: {why}. Give one of {known}, or module:function of a module in "
            "the current folder or on PYTHONPATH."
        )


def _places_of_modules() -> list[str]:
    """Where this process imports from, and the current folder, which the console script lacks. It comes last there."""
    paths = [os.path.abspath(path) for path in sys.path]  # "" is the current folder
    return list(dict.fromkeys([*paths, os.getcwd()]))


def _gold_problem(name: str, gold: str) -> str | None:
    if name == "countdown":
        try:
            countdown_gold(gold)
        except ValueError as error:
            return str(error)
    if name == "gsm8k" and gold_number(gold) is None:
        return f"the reference answer {gold[:80]!r} is no number"
    return None if gold.strip() else "the reference answer is empty"


class Reopened:
    """Another grader, for prompts that end inside an open `<think>`: it sees each response with that in front."""

    def __init__(self, base: Grader) -> None:
        self.base = base

    @property
    def counts(self) -> Mapping[str, int]:
        return self.base.counts

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
        return self.base.grade_batch([(reopened(output), gold) for output, gold in pairs])

    def close(self) -> None:
        self.base.close()


class Shaped:
    """Another grader's reward, plus `format_bonus` for the right form, less up to `length_penalty` for length.

    With `opens_thinking` the form is that of the response with the `<think>` in front that its prompt ended with. That
    counts for no length.
    """

    def __init__(
        self, base: Grader, format_bonus: float, penalty: float, length_free: int, length_limit: int,
        *, opens_thinking: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.format_bonus, self.penalty = base, format_bonus, penalty
        self.length_free, self.length_limit, self.opens_thinking = length_free, length_limit, opens_thinking

    @property
    def counts(self) -> Mapping[str, int]:
        return self.base.counts

    def added(self, output: str) -> float:
        """What the response gets beside the verdict."""
        penalty = self.penalty * length_penalty(output, self.length_free, self.length_limit)
        return self.format_bonus * format_reward(reopened(output) if self.opens_thinking else output) + penalty

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


class Signs:
    """Of life, for the other hosts that wait for this one: a pulse whenever the grader's counts have moved."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._seen: dict[str, int] | None = None

    def look(self) -> None:
        """Call it now and then while waiting for the grader. One that hangs gives no sign."""
        counts = dict(self._grader.counts)
        if counts != self._seen:
            self._seen = counts
            PROGRESS.pulse()


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
        signs = Signs(self.grader)
        while not self._room.acquire(timeout=PULSE_SECONDS):
            signs.look()
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
