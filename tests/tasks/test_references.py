"""Reference answers in data files: lists of alternatives, numbers, worked solutions."""

from decimal import Decimal

import pytest

from dynamo_jax.tasks.references import of_solution, reference


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["(1,2)"]', "(1,2)"),
        ('["10000", "10,000"]', '["10000", "10,000"]'),
        ("['5']", "5"),
        ("['a', \"b's\"]", '["a", "b\'s"]'),
        (["5"], "5"),
        ([5], "5"),
        ([0.5, "1/2"], '["0.5", "1/2"]'),
        (["5", 5, 5.0, " 5 "], "5"),
        (["π", "\\pi"], '["π", "\\\\pi"]'),
        (['["(1,2)"]'], "(1,2)"),
        (["['5']", "6"], '["5", "6"]'),
        (["worked #### 1,200", "1.2e3"], '["1200", "1.2e3"]'),
        (r'["\\boxed{3}", "\\boxed{4}"]', r'["\\boxed{3}", "\\boxed{4}"]'),
        ("[1,2]", "[1,2]"),
        ("[0, 1)", "[0, 1)"),
        (r"[\frac12, 3]", r"[\frac12, 3]"),
        (r"[-\sqrt{2}, \sqrt{2}]", r"[-\sqrt{2}, \sqrt{2}]"),
        ('"5"', '"5"'),
        (Decimal("5.10"), "5.1"),
        (Decimal("1E+3"), "1000"),
        (2**64 - 1, "18446744073709551615"),
        (-0.0, "0"),
    ],
)
def test_references(value, expected):
    assert reference(value, "x, line 1", "answer") == expected


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "it is empty"),
        ("[]", "it is empty"),
        ('[""]', "its element 1 is empty"),
        (["5", " "], "its element 2 is empty"),
        ([None], "its element 1 is null"),
        (["5", ["6"]], "its element 2 is a list"),
        ([[1, 2]], "its element 1 is a list"),
        ([{"value": "5"}], "its element 1 is a dict"),
        ([True], "its element 1 is a bool"),
        ([float("nan")], "its element 1 is nan"),
        ('["5", "6"', "neither JSON nor"),
        ("['5' '6']", "neither JSON nor"),
        ("['5', None]", "neither JSON nor"),
        ('["5"], ["6"]', "neither JSON nor"),
        (["['5', ]x"], "neither JSON nor"),
        (r'["\theta"]', "write each backslash twice"),
        ("['[\"5\"]']", "it holds another list"),
    ],
)
def test_lists_that_are_no_references(value, why):
    with pytest.raises(ValueError, match=why) as error:
        reference(value, "x.jsonl, line 3", "answer")
    assert str(error.value).startswith("x.jsonl, line 3: answer = ")
    assert '["10000", "10,000"]' in str(error.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [(["5", "\ud800"], "half of a surrogate pair"), (["#### "], "nothing after its last ####"), (True, "is a bool"),
     (b"5", "is a bytes"), (float("-inf"), "is not a number"), (Decimal("NaN"), "is not a number")],
)  # fmt: skip
def test_what_is_no_reference(value, why):
    with pytest.raises(ValueError, match=why):
        reference(value, "x, line 1", "answer")


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        (r"First \boxed{3}, so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"So $x$ is \boxed{1} or \boxed{2}.", "1, 2"),
        (r"It is $\fbox{7}$.", "7"),
        (r"It is $\boxed 4$", "4"),
        ("48/2 = 24\n#### 1,024", "1024"),
        (r"24 #### 3, that is \boxed{9}", "9"),
    ],
)
def test_the_last_box_of_a_solution(solution, expected):
    for named in (False, True):
        assert reference(of_solution(solution, "x", "solution", named=named), "x", "solution") == expected


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        ("It is 5.", r"solution has no \\boxed\{\}, .* task\.columns\.answer=solution"),
        (r"\boxedness", r"has no \\boxed"),
        (r"It is \boxed{}.", "the last box of solution is empty or not closed"),
        (r"\boxed{1} or rather \boxed{2", "the last box of solution is empty or not closed"),
        ("", "solution is empty"),
        (["It is 5."], "is a list. Make it a text whose last"),
    ],
)
def test_solutions_without_an_answer(solution, why):
    with pytest.raises(ValueError, match=why):
        of_solution(solution, "x", "solution", named=False)


@pytest.mark.parametrize(
    ("value", "expected"), [("5", "5"), (5, "5"), (["5"], "5"), ('["\\\\boxed{5}", "6"]', '["\\\\boxed{5}", "6"]')]
)
def test_a_named_solution_may_be_the_answer_itself(value, expected):
    assert reference(of_solution(value, "x", "solution", named=True), "x", "solution") == expected
