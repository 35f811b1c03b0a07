"""References that are lists of texts: which texts are such lists, what is refused, and how they are graded."""

import contextlib
import json
import random
import re
import time
from decimal import Decimal

import pytest

from dynamo_jax.tasks.grading.alternatives import alternatives, listed, number_text
from dynamo_jax.tasks.grading.verifier import Verifier, grade
from dynamo_jax.tasks.rewards import RewardGrader


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('["(1,2)"]', ("(1,2)",)),
        ('["10000", "10,000"]', ("10000", "10,000")),
        ("['5']", ("5",)),
        ("['5', \"it's\"]", ("5", "it's")),
        (" [\n \"5\" , '6' ]\n", ("5", "6")),
        ('["A", "A", " B "]', ("A", "B")),
        ('["1/2", 0.5, 3]', ("1/2", "0.5", "3")),
        ("['1/2', 0.5, -3]", ("1/2", "0.5", "-3")),
        ('["5",]', ("5",)),
        (r'["\\frac{1}{2}", "\\nu \"x\""]', (r"\frac{1}{2}", r'\nu "x"')),
        (r"['\\theta', '\xb2', '\u03c0']", (r"\theta", "²", "π")),
        # Written without doubling its backslashes: JSON would take \f and \b for one character.
        (r'["\frac{1}{2}"]', (r"\frac{1}{2}",)),
        (r'["\beta", "\sqrt{2}"]', (r"\beta", r"\sqrt{2}")),
        (r"['\sqrt{2}', '\xi']", (r"\sqrt{2}", r"\xi")),
        ('["\\\\begin{pmatrix}\\n1 & 2\\n\\\\end{pmatrix}"]', ("\\begin{pmatrix}\n1 & 2\n\\end{pmatrix}",)),
    ],
)
def test_lists_of_texts(text, texts):
    assert listed(text) == texts
    assert alternatives(text.strip()) == texts


@pytest.mark.parametrize(
    "text",
    ["5", "", "[1,2]", "[0, 1)", r"[\frac12, 3]", "[x]", "[-1, 1]", "[[1, 2], [3, 4]]", "{1, 2}", '"5"', "[ABC] = 7",
     '{"target": 24, "numbers": [3, 8, 8]}'],
)  # fmt: skip
def test_intervals_and_all_else_are_no_lists(text):
    assert listed(text) is None
    assert alternatives(text) == (text,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "it is empty"),
        ("[ ]", "it is empty"),
        ('[""]', "its element 1 is empty"),
        ("['5', '  ']", "its element 2 is empty"),
        ('["5", null]', "its element 2 is null"),
        ('["5", ["6"]]', "its element 2 is a list"),
        ('["5", {"a": 1}]', "its element 2 is a dict"),
        ('["5", true]', "its element 2 is a bool"),
        ('["5", NaN]', "its element 2 is nan"),
        ('["5"', "neither JSON nor"),
        ('["5"] or 6', "neither JSON nor"),
        ("['10' '20']", "neither JSON nor"),  # numpy's way; Python would read 1020
        ("['5', None]", "neither JSON nor"),
        ("[“5”]", "neither JSON nor"),
        (r'["\theta"]', "write each backslash twice"),
        (r"['5', '\nu']", "write each backslash twice"),
    ],
)
def test_lists_that_cannot_be_read(text, why):
    with pytest.raises(ValueError, match=why):
        listed(text)
    assert alternatives(text) == (text,)


def test_what_json_and_python_write_is_read_back():
    rng = random.Random(0)  # noqa: S311
    for _ in range(2000):
        items = [
            "".join(rng.choices("ab1\\'\"{}[], \nfuxθ²,;", k=rng.randint(1, 6))) + "." for _ in range(rng.randint(1, 3))
        ]
        for text in (json.dumps(items), json.dumps(items, ensure_ascii=False), repr(items)):
            if not re.search(r"\\n[a-z]", text):  # which may be a lost backslash
                assert listed(text) == tuple(dict.fromkeys(item.strip() for item in items))


MANY = 100_000


@pytest.mark.parametrize(
    "text",
    ["['a'" + " " * MANY + "x", "['" + "\\" * MANY + "\\", "['a'," * MANY, '["' + "[" * MANY, '["a", ' + "[" * MANY],
)
def test_hostile_lists_take_linear_time(text):
    began = time.process_time()
    assert alternatives(text) == (text,)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(18, "18"), (18.0, "18"), (1e-7, "0.0000001"), (Decimal("5.00"), "5"), (Decimal("-0.250"), "-0.25"), (True, None),
     (float("inf"), None), (Decimal("NaN"), None), ("5", None), (2**70, str(2**70))],
)  # fmt: skip
def test_numbers_as_people_write_them(value, text):
    assert number_text(value) == text


# --- grading


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("10000", '["10000", "10,000"]', True),
        ("10,000", '["10000", "10,000"]', True),
        ("1000", '["10000", "10,000"]', False),
        ("B", '["B", "12"]', True),
        ("12", '["B", "12"]', True),
        ("C", '["B", "12"]', False),
        ("B, 12", '["B", "12"]', False),  # alternatives are no list of answers
        (r"\frac{1}{2}", '["7", "0.5"]', True),
        ("(1,2)", '["(1,2)"]', True),
        ("[1,2]", '["(1,2)", "[1,2]"]', True),
        ("5", "['5']", True),
        ("6", "['5']", False),
    ],
)
def test_a_response_may_equal_any_alternative(answer, gold, right):
    assert grade(f"so \\boxed{{{answer}}}", gold) is right


def test_alternatives_that_need_algebra_are_graded_and_counted_once():
    with Verifier(workers=1) as verifier:
        gold = r'["\\sqrt{8}", "\\sqrt{2}", "3"]'
        answers = [r"2\sqrt{2}", r"\frac{2}{\sqrt{2}}", "3", r"\sqrt{3}", "4"]
        pairs = [(f"\\boxed{{{answer}}}", gold) for answer in answers] + [("none", gold)]
        assert verifier.grade_batch(pairs) == [True, True, True, False, False, False]
        counts = verifier.counts
        assert (counts["graded"], counts["no_answer"]) == (6, 1)
        assert verifier.grade_batch(pairs[:1]) == [True]
        assert verifier.counts["cached"] > counts["cached"]
        bad = '["\\\\sqrt{2}", "t(0,4]"]'
        assert verifier.unreadable([gold, bad, '["5", "5}"]']) == [
            None, "the reference answer 't(0,4]' is no formula that the grader can read",
            "the braces of the reference answer '5}' do not match",
        ]  # fmt: skip


def test_built_in_rewards_take_alternatives():
    countdown = '["{\\"target\\": 24, \\"numbers\\": [3, 8]}", "{\\"target\\": 11, \\"numbers\\": [3, 8]}"]'
    assert RewardGrader("countdown").grade_batch([("\\boxed{3*8}", countdown), ("\\boxed{3+8}", countdown)]) == [1, 1]
    assert RewardGrader("countdown").grade_batch([("\\boxed{8-3}", countdown)]) == [0]
    numbers = RewardGrader("gsm8k")
    assert numbers.grade_batch([("#### 5", '["4", "5"]'), ("#### 6", '["4", "5"]')]) == [1, 0]
    assert numbers.counts["graded"] == 2
    assert RewardGrader("exact").grade_batch([("\\boxed{b}", '["a", "b"]'), ("\\boxed{c}", '["a", "b"]')]) == [1, 0]
    assert numbers.unreadable(['["4", "5"]', '["4", "x"]']) == [None, "the reference answer 'x' is no number"]


def test_the_users_reward_is_asked_for_each_alternative_and_the_highest_counts(tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text("def f(output, gold): return len(gold)\n")
    monkeypatch.syspath_prepend(tmp_path)
    golds = ['["a", "bbb", "cc"]', "dddd"]
    with contextlib.closing(RewardGrader("lengths:f", workers=1)) as grader:
        assert grader.grade_batch([("x", gold) for gold in golds]) == [3, 4]
        assert grader.counts["graded"] == 2
    with contextlib.closing(RewardGrader("lengths:f", workers=1, whole_golds=True)) as grader:
        assert grader.grade_batch([("x", gold) for gold in golds]) == [len(golds[0]), 4]
