"""Six hundred spellings of right and wrong answers (`variations.txt`), and answers without a box, through workers."""

import re
from collections.abc import Iterator
from pathlib import Path

from dynamo_jax.tasks.grading.verifier import Verifier

LINES = (Path(__file__).parent / "variations.txt").read_text().splitlines()
BOXED = [tuple(re.split("  (==|!=)  ", line)) for line in LINES if line and not line.startswith("#")]

# One case a line: reference, verdict, whole response; `/` starts a new line.
PROSE = r"""
34  ==  Final Answer: The largest $n$ is 34.
120  ==  Final Answer: The volume of $ABC$ is 120. I hope it is correct.
3  ==  Final Answer: Jane started 3 hours ago. I hope it is correct.
3  !=  Final Answer: Jane started 3 of 8 hours ago.
5  ==  The answer is $5$ because $2+3=5$.
1000  ==  1 000
1234567  ==  It is 1 234 567
0.4  ==  .4
0.4  ==  The probability is .4
\frac{10}{9}  ==  \frac{10}{9}
-\frac{10}{9}  ==  We simplify./-\frac{10}{9}
x+1  ==  Therefore/$$x+1$$
x+1  !=  Therefore/$$x-1$$
(2,4)  ==  The answer is (2, 4).
1,2  ==  The answers are 1 and 2.
1,2  ==  $x=\boxed{1}$ and $y=\boxed{2}$
1,2  !=  $x=\boxed{1}$ and later $\boxed{3}$
7  !=  We try 7, then 8.
8  ==  We try 7, then 8.
\frac{3}{4}  ==  Thus $P = \frac{3}{4}$.
\text{(D)}  ==  The answer is D.
12  ==  **Answer: 12**
12  ==  Answer:/12
12  !=  Answer:/13
30^\circ  ==  The angle is $30^\circ$.
"""


def pairs() -> Iterator[tuple[str, str, bool]]:
    for gold, sign, answer in BOXED:
        yield f"So we get $\\boxed{{{answer}}}$.", gold, sign == "=="
    for line in PROSE.strip().splitlines():
        gold, sign, answer = re.split("  (==|!=)  ", line)
        yield answer if re.search(r"\d/\d", answer) else answer.replace("/", "\n"), gold, sign == "=="


def test_variations() -> None:
    table = list(pairs())
    with Verifier(workers=2) as verifier:
        grades = verifier.grade_batch([(output, gold) for output, gold, _ in table])
        assert verifier.counts["killed"] == 0
    wrong = [
        (gold, output, grade) for (output, gold, right), grade in zip(table, grades, strict=True) if grade != right
    ]
    assert wrong == []
