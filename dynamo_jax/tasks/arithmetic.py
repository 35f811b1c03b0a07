"""The built-in task: left-to-right chains modulo 10, so that a machine with no weights and no network learns something.

A problem is a chain such as `3+4*2=`: 1 to 6 operations, operands 1 to 9, applied from left to right with no
precedence, modulo 10. Its answer is the worked solution, the running values one digit each: `74` (3+4=7, 7*2=14).
The reward is 1 only if the whole of it is right, so a chain is as hard as its length and its operations make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dynamo_jax.tasks.tokenizer import UNKNOWN_ID

OPERATIONS = "+-*"
_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def solve(problem: str) -> str:
    """The worked solution of a problem: `solve("3+4*2=") == "74"`. Raises `ValueError` if it is not a problem."""
    digits, operations = problem[:-1:2], problem[1:-1:2]
    well_formed = problem.endswith("=") and len(digits) == len(operations) + 1 and operations
    if not well_formed or not digits.isdecimal() or set(operations) - set(OPERATIONS):
        raise ValueError(f"{problem!r} is not a chain such as '3+4*2='")
    value, values = int(digits[0]), []
    for operation, digit in zip(operations, digits[1:], strict=True):
        value = _APPLY[operation](value, int(digit)) % 10
        values.append(str(value))
    return "".join(values)


def random_problem(rng: np.random.Generator, max_operations: int, multiplication_rate: float = 1 / 3) -> str:
    """A problem with a uniform number of operations, each `*` at the given rate and else `+` or `-`."""
    count = int(rng.integers(1, max_operations + 1))
    rest = (1 - multiplication_rate) / 2
    operations = rng.choice(list(OPERATIONS), size=count, p=[rest, rest, multiplication_rate])
    digits = rng.integers(1, 10, size=count + 1)
    return str(digits[0]) + "".join(f"{o}{d}" for o, d in zip(operations, digits[1:], strict=True)) + "="


def split_problems(seed: int, train: int, heldout: int, max_operations: int) -> tuple[list[str], list[str]]:
    """`train` and `heldout` different problems, with none in common.

    Raises `ValueError` if there are not that many problems of so few operations.
    """
    available = sum(9 * 27**n for n in range(1, max_operations + 1))
    if 2 * (train + heldout) > available:
        raise ValueError(
            f"task.arithmetic: {train} training and {heldout} held-out problems are too many of the {available} that "
            f"have up to {max_operations} operations. Raise max_operations, or ask for at most {available // 2} in all."
        )
    rng = np.random.default_rng([seed, 0])
    problems: dict[str, None] = {}
    while len(problems) < train + heldout:
        problems.setdefault(random_problem(rng, max_operations))
    mixed = [list(problems)[i] for i in rng.permutation(len(problems))]  # short chains run out first: mix them in
    return mixed[:train], mixed[train:]


def worked_solutions(
    seed: int, batch: int, max_operations: int, multiplication_rate: float, exclude: Sequence[str]
) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of (problem, worked solution) for the supervised warm-up; none of them from `exclude`."""
    rng, excluded = np.random.default_rng([seed, 1]), frozenset(exclude)
    while True:
        pairs: list[tuple[str, str]] = []
        while len(pairs) < batch:
            problem = random_problem(rng, max_operations, multiplication_rate)
            if problem not in excluded:
                pairs.append((problem, solve(problem)))
        yield pairs


def grade(output: str, gold: str) -> bool:
    """1 only if the whole worked solution is right."""
    return output.strip() == gold


class ArithmeticVerifier:
    """The same interface as `tasks.Verifier`, without workers: comparing two strings can neither hang nor fail."""

    counts: dict[str, int] = {}  # noqa: RUF012 - never written: there is nothing to count

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [grade(output, gold) for output, gold in pairs]

    def close(self) -> None:
        """Nothing to close."""


@dataclasses.dataclass(frozen=True)
class ArithmeticTokenizer:
    """One token a character, with padding and end-of-sequence ids as a real tokenizer has them."""

    alphabet: str = "0123456789+-*="
    pad_id: int = 0
    eos_id: int = 1
    stop_ids: tuple[int, ...] = (1,)

    @property
    def size(self) -> int:
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        unknown = set(text) - set(self.alphabet)
        if unknown:
            raise ValueError(f"the arithmetic tokenizer has no token for {sorted(unknown)}; it knows {self.alphabet!r}")
        return [self.alphabet.index(c) + 2 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i - 2] if i < self.size else UNKNOWN_ID for i in ids if i >= 2)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        return "".join(message["content"] for message in messages)
