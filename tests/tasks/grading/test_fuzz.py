"""Random texts: the grader never raises, and its exact path decides in bounded time."""

import string
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_jax.tasks.grading.answers import check_gold, compare, judge, readable
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.latex import normalise
from dynamo_jax.tasks.grading.verifier import Verifier

COMMANDS = [
    r"\frac",
    r"\sqrt",
    r"\sqrt[3]{",
    r"\binom",
    r"\pi",
    r"\infty",
    r"\pm",
    r"\mp",
    r"\cdot",
    r"\cup",
    r"\in",
    r"\le",
    r"\ne",
    r"\{",
    r"\}",
    r"\\",
    r"\text{",
    r"\left(",
    r"\right)",
    r"\boxed{",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\setminus",
    r"\mathbb{R}",
    r"^\circ",
    r"\overline{",
    r"\sum_{k=1}^",
    r"\int",
    r"\lfloor",
    r"\log_",
    r"\sin",
    r"\max(",
    r"\pmod",
    r"\approx",
    r"\equiv",
    r"=",
    r"<",
    r">",
    r"!=",
    r",",
    r";",
    r":",
    r"(",
    r")",
    r"[",
    r"]",
    r"{",
    r"}",
    r"|",
    r"^",
    r"_",
    r"!",
    r"%",
    r"&",
    r"+",
    r"-",
    r"*",
    r"/",
    r"0",
    r"1",
    r"2",
    r"17",
    r"0.5",
    r"1e9",
    r"x",
    r"y",
    r"i",
    r"e",
    r"f(x)",
    r"and",
    r"or",
    r"where",
]
pieces = st.one_of(st.sampled_from(COMMANDS), st.text(string.printable, max_size=3), st.text(max_size=2))
texts = st.lists(pieces, max_size=30).map("".join)
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(texts, texts)
def test_no_exception_and_no_hang(gold: str, answer: str) -> None:
    began = time.process_time()
    assert compare(gold, answer) in (True, False, None)
    assert judge(f"so \\boxed{{{answer}}} is it", gold) in (True, False, None)
    assert judge(answer, gold) in (True, False, None)
    check_gold(gold)
    readable(gold)
    assert time.process_time() - began < 1.0


@quick
@given(texts)
def test_normalising_and_extracting_never_fail(text: str) -> None:
    assert isinstance(normalise(text), str)
    found = extract(text)
    assert found is None or found.strip() == found != ""
    if normalise(text):
        assert compare(text, text) is not False or "\\boxed" in text


def test_through_workers() -> None:
    pairs: list[tuple[str, str]] = []
    collect = settings(quick, max_examples=200)(given(texts, texts)(lambda g, a: pairs.append((f"\\boxed{{{a}}}", g))))
    collect()
    with Verifier(workers=1, timeout=2.0) as verifier:
        grades = verifier.grade_batch(pairs)
        assert len(grades) == len(pairs)
        assert verifier.counts["killed"] == 0
