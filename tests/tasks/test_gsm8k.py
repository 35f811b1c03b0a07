"""The number after `####`: what is one, what is not, and that the data set's own answers are."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from dynamo_jax.tasks.gsm8k import gold_number, gsm8k, hash_number
from dynamo_jax.tasks.rewards import RewardGrader

THREE = [
    "3", "3.", "3.00", "+3", "003", "$3", "$ 3", r"\$3", "$3$", "3€", "3%", "3 %", r"3\%", "3 apples", "3 apples.",
    "3 dollars per day", "3 km/h", "3kg", "3 m", "3 people's dogs", "3 times", "3 seconds", "3 .", "  3  ", "\n3",
    "3\nor 4", "3\r\n\r\nThat is all.", "3 wrong answers", "3 real roots",
]  # fmt: skip
NOT_THREE = [
    "", "three", "3/4", "3 / 4", "3\x0c/4", "3 or 4", "3 or four", "3-4", "3 - 4", "3\u20134", "3e5", "3e", "3x", "3 x",
    "3.4.5", "3..", "3 + 4", "3*4", "3\u00d74", "3 = 4", "3^2", "3²", "3!", "3½", "3:30", "3 1/2", "3 4", "3, 4", "3,4",
    "3,", "3 and 4", "3 and a half", "3 to 5", "3 more", "at most 3", "3 million", "3 thousand", "3k", "3 K", "3M",
    "3 M", "3 dozen", "3 two-thirds", "3 thirds", "3 tenths", "3 point one", "3 pi", "3 squared", "3 plus tax", "3 %5",
    "3%2", "(3)", "--3", "-$-3", "-3", "<3", "~3", "3_0", "0x3", "٣", "x = 3", "1 3", "3 " + "a " * 100, "3" * 300,
    "3 is wrong", "3 is not correct", "3 isn't right", "3 wrong", "3 maybe", "3 perhaps", "3 factorial", "3 choose two",
    "3 mod n", "3 square", "3 root two", "3 trillion", "3 zillion",
]  # fmt: skip


@pytest.mark.parametrize("answer", THREE)
def test_one_number(answer: str) -> None:
    assert gsm8k(f"So it is\n####{answer}", "3") == 1
    assert gsm8k(f"#### 3/4\n#### {answer}", "#### 3") == 1
    assert gsm8k(f"#### {answer}", "4") == 0


@pytest.mark.parametrize("answer", NOT_THREE)
def test_not_one_number(answer: str) -> None:
    assert gsm8k(f"#### {answer}", "3") == 0
    assert gsm8k(f"#### 3\n#### {answer}", "3") == 0  # the last one counts


@pytest.mark.parametrize(
    ("answer", "value"),
    [("-3", -3), ("- 3", -3), ("-$3", -3), ("$-3", -3), ("\u22123", -3), ("1,234.00", 1234), ("$12.50 in all", "12.5"),
     ("1,450,000", 1450000), (".5", "1/2"), ("0.1", "1/10")],
)  # fmt: skip
def test_values(answer: str, value: str | int) -> None:
    assert hash_number(f"#### {answer}") == Fraction(value)
    assert gsm8k(f"#### {answer}", answer) == 1


@pytest.mark.parametrize("answer", ["1,2", "12,34", "1,2345", "1234,567", "1,,000", ",3", "1,23,456"])
def test_commas_stand_before_thousands(answer: str) -> None:
    assert hash_number(f"#### {answer}") is None


def test_a_reference_must_be_one_number_too() -> None:
    golds = ["3", "#### 1,000", "work #### 12.5", "3/4", "5 million", "3 or 4", "#### ", ""]
    reasons = RewardGrader("gsm8k").unreadable(golds)
    assert [reason is None for reason in reasons] == [True] * 3 + [False] * 5
    assert "no number" in (reasons[3] or "")
    assert gsm8k("#### 3/4", "3/4") == 0


def test_hostile_text_takes_linear_time() -> None:
    start = time.process_time()
    for tail in (" " * 10**6 + "!", " a" * 10**6 + "!", "####" * 10**6, ",000" * 10**6, "a-" * 10**6):
        assert gsm8k(f"#### 3{tail}", "3") == 0
    assert time.process_time() - start < 5


@pytest.mark.shared
def test_every_answer_of_the_data_set_is_one(shared: Path) -> None:
    for file in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        golds = [json.loads(line)["answer"] for line in (shared / "data" / file).open()]
        assert [gold_number(gold) for gold in golds] == [int(gold.replace(",", "")) for gold in golds]
