"""Words around a value: what scales, changes, denies or names it, and what is only a unit or a remark."""

import re
import time
from pathlib import Path

import pytest

from dynamo_jax.tasks.grading.answers import compare, judge, readable
from dynamo_jax.tasks.grading.latex import normalise
from dynamo_jax.tasks.grading.verifier import Verifier

LINES = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
CASES = [tuple(re.split("  (==|!=)  ", line)) for line in LINES if line[0] != "#"]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], bool]:
    """All cases in one batch, with algebra."""
    pairs = [(gold, answer) for gold, _, answer in CASES]
    with Verifier(workers=1) as verifier:
        grades = verifier.grade_batch([(f"So it is \\boxed{{{answer}}}.", gold) for gold, answer in pairs])
        assert verifier.counts["killed"] == 0
    return dict(zip(pairs, map(bool, grades), strict=True))


@pytest.mark.parametrize(("gold", "verdict", "answer"), CASES)
def test_verdict(gold: str, verdict: str, answer: str, verdicts: dict[tuple[str, str], bool]) -> None:
    right = verdict == "=="
    assert verdicts[gold, answer] is right
    assert judge(f"\\boxed{{{answer}}}", gold) in (right, None)  # the exact path alone says the same or nothing


@pytest.mark.parametrize("gold", ["5\\text{ million}", "five million", "\\text{all integers } k \\ge 2", "x > 3", "②"])
def test_such_references_can_be_read(gold: str) -> None:
    assert readable(gold)


HOSTILE = [
    "million ", "5 million ", "\\text{million}", "5\\text{ million }", "5 and a half ", "x\\text{ squared}", "n't",
    "an't ", "5\\text{ is ", "7 (seven ", "=seven", "\\,", "all ", "\\text{all integers }", "k \\ge ", "\\log_e",
    "and five ", "\\text{a:}", "wrong!", "5万", "万", "②", "5\\text{k}", "zillions", "\\$5k",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_words_are_read_in_linear_time(text: str) -> None:
    start = time.process_time()
    for before in ("", "5 ", "5\\text{ "):
        answer = before + text * (15_000 // len(text))
        normalise(answer)
        compare("5", answer[:4000])
    assert time.process_time() - start < 1.5
