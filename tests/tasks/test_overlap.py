"""Which rows of two files hold the same problem."""

import pytest

from dynamo_jax.tasks.overlap import shared_problems
from dynamo_jax.tasks.read import Row


def row(prompt, line=1, id="x", answer="1"):
    return Row(id, prompt, answer, f"line {line}")


@pytest.mark.parametrize(
    "same",
    [
        row("How many primes are below 10?", id="y"),
        row("How many primes are below 10?", answer="4"),
        row("  How many\tprimes\n\n are below\u00a010? "),
        row(({"role": "user", "content": "How many primes are below 10?"},)),
        row(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many primes are below 10?"})),
    ],
)
def test_the_same_problem(same):
    held_out = row("How many primes are below 10?")
    other = row("How many primes are below 11?")
    assert shared_problems([other, same], [[held_out]]) == [[(held_out, same)]]
    assert shared_problems([other, held_out], [[same]]) == [[(same, held_out)]]


@pytest.mark.parametrize(
    "other",
    [
        row("how many primes are below 10?"),
        row("How many primes are below 10"),
        row("How many primes are below 1 0?"),
        row(({"role": "system", "content": "How many primes are below 10?"}, {"role": "user", "content": "4"})),
    ],
)
def test_another_problem(other):
    assert shared_problems([other], [[row("How many primes are below 10?")]]) == [[]]


def test_accents_of_both_forms():
    assert len(shared_problems([row("caf\u00e9")], [[row("cafe\u0301")]])[0]) == 1


def test_each_file_has_its_own_and_the_first_place_in_training_counts():
    train = [row(text, line) for line, text in enumerate("abacb")]
    files = [[row("b"), row("z"), row("a"), row("b")], [], [row("c")], [row("d")]]
    found = shared_problems(train, files)
    assert [[(one.prompt, there.where) for one, there in rows] for rows in found] == [
        [("b", "line 1"), ("a", "line 0"), ("b", "line 1")], [], [("c", "line 3")], []
    ]  # fmt: skip
