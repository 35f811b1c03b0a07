"""Numbers in words: what they are worth, where they end, and what is left as it is written."""

from fractions import Fraction

import pytest

from dynamo_jax.tasks.grading.exact import evaluate
from dynamo_jax.tasks.grading.numerals import spell_out, word_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("zero", 0), ("seven", 7), ("forty-two", 42), ("one hundred and two", 102), ("twelve hundred", 1200),
     ("Two Thousand Five Hundred", 2500), ("one million two hundred thousand and one", 1_200_001),
     ("nine hundred ninety-nine billion", 999 * 10**9), ("six trillion", 6 * 10**12)],
)  # fmt: skip
def test_word_number(text: str, number: int) -> None:
    assert word_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "-", "and", "one two", "zero one", "twenty eleven", "twenty ten", "five and", "one thousand two thousand",
     "thousand", "one and two", "hundred", "seven apples", "sieben", "七", "one " * 40],
)  # fmt: skip
def test_no_word_number(text: str) -> None:
    assert word_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("five million", 5_000_000), ("half a dozen", 6), ("a million", 10**6), ("two-thirds", "2/3"), ("half", "1/2"),
     ("three and a half", "7/2"), ('2.5 "million"', 2_500_000), ('\\frac{1}{2} "thousand"', 500),
     ("2^{3} million", 8 * 10**6), ('5 "hundred thousand"', 500_000), ('-3 "quarters"', "-3/4"), ('1 "third"', "1/3"),
     ('7 "ten-thousandths"', "7/10000"), ('5 "squared"', 25), ('\\frac{2}{3} "cubed"', "8/27"),
     ('(1+2) "squared"', 9), ('2^{3} "squared"', 64), ("4 factorial", 24), ("12 (twelve)", 12), ("seven (7)", 7),
     ('1,000 "(one thousand)"', 1000)],
)  # fmt: skip
def test_value(text: str, value: int | str) -> None:
    assert evaluate(spell_out(text).replace(",", "")) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["x+1", "\\frac{1}{2}", "five apples", "one-to-one", "one million and two million", '5 "cm" "million"', "million",
     '"million"', "5 k", "x million", "\\sin x", '5 "million" 200', '5 "hundred-dollar bills"',
     '5 "half-lives"', '3 "third"', '5 "cm squared"', '-5 "squared"', 'x+1 "squared"', '2x "squared"',
     '5 "squared cm"', "7 (eight)", "eight (7)", "5 (million)"],
)  # fmt: skip
def test_what_is_not_clear_stays(text: str) -> None:
    assert spell_out(text) == text


def test_the_words_that_follow_stay_quoted() -> None:
    assert spell_out('5 "million people"').split() == ["5", "\\cdot", "10^{6}", '"people"']
    assert spell_out("five million dollars").split() == ["5000000", '"dollars"']
    assert spell_out('7 "(seven) apples"').split() == ["7", '"apples"']
    assert spell_out('3 "k" \\Omega') == '3 "k" \\Omega'  # kiloohms
