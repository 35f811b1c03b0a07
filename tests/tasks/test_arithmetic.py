"""The built-in task: problems, worked solutions, splits, and the tokenizer."""

import itertools
import operator
import re

import numpy as np
import pytest

from dynamo_jax.tasks.arithmetic import (
    ArithmeticTokenizer,
    ArithmeticVerifier,
    grade,
    random_problem,
    solve,
    split_problems,
    worked_solutions,
)
from dynamo_jax.tasks.grading.verifier import Verifier

CHAIN = re.compile(r"[1-9]([-+*][1-9]){1,6}=")


def operations(problem: str) -> str:
    return problem[1:-1:2]


# --- solving


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        ("3+4=", "7"),
        ("3+4*2=", "74"),  # from left to right: (3 + 4) * 2 = 14
        ("3*4+2=", "24"),  # 12 is carried on as 2
        ("2-5=", "7"),  # -3 modulo 10
        ("2-5-9=", "78"),  # 7 - 9 = -2
        ("9*9*9*9*9*9*9=", "191919"),
        ("5+5*7=", "00"),
        ("1-1+9-9+1*3=", "09013"),
    ],
)
def test_by_hand(problem, solution):
    assert solve(problem) == solution


def test_against_plain_evaluation():
    rng = np.random.default_rng(0)
    for _ in range(200):
        problem = random_problem(rng, 6)
        value, expected = int(problem[0]), ""
        for i in range(1, len(problem) - 1, 2):
            # Without reducing on the way: only the digit that is written down is taken modulo 10.
            value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[problem[i]](value, int(problem[i + 1]))
            expected += str(value % 10)
        assert solve(problem) == expected


@pytest.mark.parametrize(
    "text",
    ["", "=", "3=", "3+4", "3+=", "+3=", "3+4*=", "34=", "3/4=", "3+4==", "3 + 4=", "a+4=", "3++4=", "3+4=7", "³+4="],
)  # fmt: skip
def test_what_is_no_chain_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        solve(text)


@pytest.mark.parametrize(
    ("output", "right"),
    [("74", True), (" 74\n", True), ("4", False), ("74=", False), ("7 4", False), ("", False), ("744", False)],
)
def test_only_the_whole_worked_solution_is_right(output, right):
    assert grade(output, "74") is right


def test_the_verifier_has_the_interface_of_the_real_one():
    verifier = ArithmeticVerifier()
    assert verifier.grade_batch([("74", "74"), ("4", "74"), ("7", "7")]) == [True, False, True]
    assert verifier.counts == {}
    verifier.close()
    assert {name for name in ("grade_batch", "counts", "close") if hasattr(Verifier, name)} == {
        "grade_batch", "counts", "close"
    }  # fmt: skip


# --- making problems


def test_problems_are_chains_of_every_length():
    rng = np.random.default_rng(0)
    problems = [random_problem(rng, 6) for _ in range(3000)]
    assert all(CHAIN.fullmatch(problem) for problem in problems)
    counts = np.bincount([len(operations(problem)) for problem in problems], minlength=7)
    assert counts[0] == 0
    assert counts[1:].min() > 400  # uniform: 500 each, standard deviation 20
    assert {problem[0] for problem in problems} == set("123456789")


@pytest.mark.parametrize("rate", [0.0, 0.05, 1 / 3, 1.0])
def test_the_rate_of_multiplications(rate):
    rng = np.random.default_rng(0)
    signs = "".join(operations(random_problem(rng, 6, rate)) for _ in range(3000))
    tolerance = 4 * np.sqrt(0.25 / len(signs))
    assert signs.count("*") / len(signs) == pytest.approx(rate, abs=tolerance if 0 < rate < 1 else 0)
    assert signs.count("+") / len(signs) == pytest.approx((1 - rate) / 2, abs=tolerance)


@pytest.mark.parametrize(("train", "heldout", "most"), [(2048, 256, 6), (1, 1, 1), (100, 20, 1), (500, 100, 2)])
def test_the_split_has_the_sizes_asked_for_and_nothing_in_common(train, heldout, most):
    parts = split_problems(0, train, heldout, most)
    assert [len(part) for part in parts] == [train, heldout]
    assert len(set(itertools.chain(*parts))) == train + heldout
    assert all(1 <= len(operations(problem)) <= most for problem in itertools.chain(*parts))


def test_both_parts_have_the_same_mix_of_lengths():
    # The 243 chains of one operation are all found early: were the first problems drawn the training ones, hardly any
    # would be held out, and the held-out score would be one of harder problems.
    heldout = split_problems(0, 3000, 400, 2)[1]
    short = sum(len(operations(problem)) == 1 for problem in heldout)
    assert short == pytest.approx(243 * 400 / 3400, abs=18)  # 4 standard deviations


def test_the_split_depends_on_the_seed_alone():
    assert split_problems(3, 50, 10, 6) == split_problems(3, 50, 10, 6)
    assert set(split_problems(3, 50, 10, 6)[0]) != set(split_problems(4, 50, 10, 6)[0])


def test_more_problems_than_there_are_is_an_error():
    # 9 * 27 = 243 chains of one operation; beyond half of them drawing new ones at random gets slow.
    with pytest.raises(ValueError, match=r"100 training and 22 held-out .* 243 .* at most 121"):
        split_problems(0, 100, 22, 1)


# --- worked solutions


def test_worked_solutions_are_right_and_leave_out_the_excluded():
    # With 243 possible problems a batch of 500 would hold excluded ones for certain.
    exclude = split_problems(0, 60, 60, 1)[1]
    first, second = itertools.islice(worked_solutions(0, 500, 1, 1 / 3, exclude), 2)
    assert len(first) == len(second) == 500
    assert first != second
    assert all(solve(problem) == solution for problem, solution in first + second)
    assert not {problem for problem, _ in first + second} & set(exclude)
    assert {problem for problem, _ in first + second} & set(split_problems(0, 60, 60, 1)[0])


def test_worked_solutions_have_few_multiplications_and_depend_on_the_seed():
    pairs = next(worked_solutions(0, 2000, 6, 0.05, []))
    signs = "".join(operations(problem) for problem, _ in pairs)
    assert signs.count("*") / len(signs) == pytest.approx(0.05, abs=0.02)
    assert next(worked_solutions(0, 2000, 6, 0.05, [])) == pairs
    assert next(worked_solutions(1, 2000, 6, 0.05, [])) != pairs


# --- the tokenizer


def test_tokenizer_round_trip():
    tokenizer = ArithmeticTokenizer()
    ids = tokenizer.encode(tokenizer.alphabet)
    assert tokenizer.decode(ids) == tokenizer.alphabet
    assert sorted({*ids, tokenizer.pad_id, tokenizer.eos_id}) == list(range(tokenizer.size))
    assert len(ids) == tokenizer.size - 2  # no character is padding or an end
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


def test_special_tokens_are_no_text():
    tokenizer = ArithmeticTokenizer()
    assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode("7"), tokenizer.eos_id, tokenizer.pad_id]) == "7"


def test_a_character_without_a_token_is_named():
    with pytest.raises(ValueError, match=r"no token for \['x', '÷'\]; it knows"):
        ArithmeticTokenizer().encode("3÷x=")


def test_a_chat_is_its_text():
    messages = [{"role": "user", "content": "3+4="}, {"role": "user", "content": "1"}]
    assert ArithmeticTokenizer().render_chat(messages) == "3+4=1"
