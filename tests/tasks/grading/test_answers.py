"""Extraction, the exact path, and what it leaves to algebra. Cases written by hand, one line each, by convention."""

# ruff: noqa: RUF001 - look-alike characters are among the cases

import re
import time
from fractions import Fraction

import pytest

from dynamo_jax.tasks.grading.answers import check_gold, compare, judge
from dynamo_jax.tasks.grading.exact import NotRationalError, TooLargeError, evaluate
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.latex import key, normalise

EXTRACTION = [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} no, \boxed{2}", "2"),
    (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
    (r"\(\boxed{1}\), \(\boxed{2}\), or \(\boxed{3}\)", "1, 2, 3"),
    (r"\boxed{1}\boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\text{brace \} inside} 5}", r"\text{brace \} inside} 5"),
    (r"\boxed{x = \boxed{3}}", "3"),
    (r"$\fbox{7}$", "7"),
    (r"\framebox[2cm]{7}", "7"),
    (r"\boxed 5$", "5"),
    (r"\boxed{1} then \boxed{2", None),
    (r"\boxed{}", None),
    (r"\boxed{", None),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> nothing", None),
    (r"<think>\boxed{1}", None),
    (r"<think>a</think>\boxed{1}<think>\boxed{2}", None),
    ("The answer is 42.", "42"),
    ("The answer is 41. No, the answer is 42.", "42"),
    ("Answer: $x^2$", "x^2"),
    ("**Answer:** 7", "7"),
    ("The final answer is $\\frac{1}{3}$. I hope it is correct.", r"\frac{1}{3}"),
    ("The answers are $1$ and $2$.", "1, 2"),
    ("The answer is $5$ because $2+3=5$.", "5"),
    ("The answer is\n\\[\n12\n\\]", "12"),
    ("#### 1,234", "1,234"),
    ("The correct choice is (D).", "(D)"),
    ("We find $a=3$, hence 17 apples", "17"),
    ("Hence the value is $\\frac{3}{4}$.", r"\frac{3}{4}"),
    ("no idea", None),
    ("", None),
]

# One case a line: reference, verdict, answer. `==` right, `!=` wrong, `??` only algebra can tell.
TABLE = r"""
# integers, decimals, fractions
204  ==  204
073  ==  73
27.0  ==  27
-1.0  !=  1
73  !=  0.73
0  ==  -0
1024  ==  2^{10}
1024  ==  2^10
252  ==  \binom{10}{5}
120  ==  5!
120  !=  5
0.5  ==  \frac{1}{2}
\frac12  ==  .5
\frac{1}{2}  ==  1/2
\frac{1}{2}  ==  \tfrac{2}{4}
\frac{1}{2}  !=  \frac{2}{1}
\frac{1}{3}  !=  0.333
\frac{1}{3}  !=  0.3333333333333333
\frac{1}{3}  ==  0.\overline{3}
1/7  ==  0.\overline{142857}
\frac{1}{6}  ==  0.1\bar{6}
-\frac{3}{2}  ==  \frac{-3}{2}
-\frac{3}{2}  ==  \frac{3}{-2}
-\frac{3}{2}  !=  \frac{3}{2}
+2  ==  2
-3./2  ==  -1.5
8  ==  \sqrt{64}
-2  ==  \sqrt[3]{-8}
7  ==  \lceil 6.2\rceil
5  ==  |-5|
6  ==  2 \cdot 3
6  ==  2*3
6  ==  2 \times 3
6  ==  2(3)
4  ==  \gcd(8, 12)
3  ==  7 \bmod 4
1002001  ==  1001^2
2^{100}  ==  1267650600228229401496703205376
# mixed numbers
\frac{7}{2}  ==  3\frac{1}{2}
\frac{7}{2}  ==  3 1/2
1\frac{4}{5}  ==  1.8
\frac{3}{2}  !=  3\frac{1}{2}
-\frac{5}{2}  ==  -2\frac{1}{2}
# scientific notation and thousands
4.5e33  ==  4.5 \times 10^{33}
4.5e33  !=  4.5\cdot 10^{32}
1e-5  ==  0.00001
1e-5  !=  1e-6
3e8  ==  3\times10^{8}\ \mathrm{m/s}
17000  ==  1.7 \times 10^4
6.02e23  ==  6.02 × 10²³
2271380  ==  2,271,380
2271380  ==  2{,}271{,}380
2271380  ==  2\,271\,380
2271380  ==  2 271 380
2271380  !=  2,271,38
10,\!080  ==  10080
58,500  ==  58500
1234.5  ==  1,234.5
# percent
62.5%  ==  0.625
62.5%  ==  62.5
25  ==  25\%
0.25  !=  25
0.25  ==  25\%
\frac{1}{2}  ==  50\%
8 \%  ==  8 percent
62.5%  !=  6.25\%
50  !=  \frac{1}{2}
# units, degrees, currency, words after the value
45  ==  45 \text{ minutes}
45  ==  45 min
15\mbox{ cm}^2  ==  15
15  ==  15\,\mathrm{cm}^{2}
36^\circ  ==  36
36^\circ  ==  36°
36^{\circ}  ==  36\text{ degrees}
36^\circ  !=  63^\circ
\$36  ==  36
8.5  ==  \$8.50
12  ==  12 ways
12  ==  \text{12 ways}
27  ==  27\text{ miles from City } A
10  !=  10\text{ cm by }20\text{ cm}
5.4 \text{ cents}  ==  5.4
3  !=  3x
6  !=  6y
4  !=  4\text{ hours } 30\text{ minutes}
# names before the value, equations
3  ==  x=3
x=3  ==  3
x=3  ==  x=3
x=3  !=  x=-3
f(x)=x+1  ??  f(x)=1+x
4  ==  \angle ABC = 4^\circ
m_{\max}=7  ==  7
42  ==  42 = 42
42  !=  1 = 2 = 42
540  ==  27 \cdot 20 = 540
x=3  !=  x^2-6x+9=0
42  !=  42 \neq 43
MR=SRMC  ==  SRMC = MR
(2,3)  ==  (x,y)=(2,3)
x=3  !=  y=3
k=5  ==  n=5
# lists, sets, tuples, intervals
1,3,5  ==  5, 3, 1
1,3,5  !=  1,3
1,3  !=  1,3,5
7,14  ==  \{14,7\}
1,2  ==  1 and 2
1,2  ==  x=1 \text{ or } x=2
42  !=  42, 42
42  !=  42 \text{ or } 43
2,-2  ==  \pm 2
\pm 4  ==  4,-4
2  !=  \pm 2
(2,4)  ==  (2, 4)
(2,4)  !=  (4,2)
(2,4)  !=  [2,4]
(2,4)  !=  \{2,4\}
(1,2)  !=  1,2
1,2  !=  (1,2)
(1,2),(3,4)  ==  (3,4),(1,2)
(1,2),(3,4)  !=  (1,2),(4,3)
(0.5,2)  ==  \left(\frac12, 2\right)
[0,1)  ==  \left[0,1\right)
[0,1)  !=  [0,1]
[0,1)  ==  0 \le x < 1
[0,1)  ==  1 > x \ge 0
[0,1)  ==  x\in[0,1)
(-\infty,3)  ==  x<3
x \ge 2  ==  [2,\infty)
x \ge 2  !=  x > 2
x\geqslant 2  ==  x ≥ 2
(0,1)\cup(2,3)  ==  (2,3)\cup(0,1)
(0,1)\cup(2,3)  !=  (0,3)
(-\infty,2)\cup(3,\infty)  ==  x<2 \text{ or } x>3
\emptyset  ==  \varnothing
\emptyset  ==  \{\}
\emptyset  !=  0
0  !=  \emptyset
\mathbb{R}  ==  (-\infty,\infty)
\mathbb{R}  ==  \text{all real numbers}
\infty  ==  ∞
\infty  !=  -\infty
42  !=  \infty
# matrices
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ==  \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}  ==  \begin{pmatrix}0.5\\3\\\end{pmatrix}
\begin{pmatrix} 1 \\ 3 \end{pmatrix}  !=  \begin{pmatrix}1&3\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ==  \frac12\begin{pmatrix}2\\4\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ==  \left(\begin{array}{c}1\\2\end{array}\right)
# words and choices
\text{even}  ==  even
Yes  ==  \text{yes}
Yes  !=  No
\text{ellipse}  ==  \text{an ellipse}
\text{east}  !=  west
\text{no solution}  ==  No solution
\text{(B)}  ==  B
B  ==  \textbf{(B)}
B  ==  (B) 12
12  ==  \textbf{(B) } 12
B  !=  C
B  !=  A, B
A  !=  \text{A triangle}
B  ==  B.
5  ==  five
1  !=  \text{True}
# text before the value
42  ==  \text{The answer is } 42
42  ==  Answer: 42
42  !=  \text{less than } 42
42  !=  \text{at most } 42
42  !=  \text{not } 42
42  !=  \text{either } 42 \text{ or } -42
42  ==  \approx 42
# Unicode and formatting
\frac{1}{2}  ==  ½
42  ==  ٤٢
-50  ==  −50
1024  ==  2¹⁰
42  ==  {{42}}
42  ==  \color{red}{42}
42  ==  \displaystyle 42
42  ==  \mathbf{42}
42  ==  **42**
42  ==  $42$
42  ==  42.
42  ==  \,42\;
\frac{1}{2}  ==  \\frac{1}{2}
52_8  ==  52_{8}
52_8  ==  52
52_8  !=  42
# not evaluated, not an answer
5050  !=  \sum_{k=1}^{100} k
42  !=  ?
42  !=  x
42  !=  1,2,\ldots,42
42  !=  \begin{cases}42\\43\end{cases}
42  !=  __import__('os')
42  !=  None
# left to algebra
\sqrt{8}  ??  2\sqrt{2}
2\pi  ??  6.28
x+1  ??  1+x
\sin x  ??  \cos x
2,\sqrt{8}  ??  2\sqrt{2},2
"""
CASES = [tuple(re.split("  (==|!=|[?][?])  ", line)) for line in TABLE.strip().splitlines() if not line.startswith("#")]
VERDICTS = {"==": True, "!=": False, "??": None}

HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "factorial of a factorial": "(10^{10})!!!",
    "a megabyte of digits": "9" * 1_000_000,
    "many digits": "9" * 3500,
    "huge exponent": "1e999999999",
    "deep braces": "{" * 2000 + "1" + "}" * 2000,
    "deep parentheses": "(" * 1900 + "1" + ")" * 1900,
    "deep fractions": "\\frac" * 700,
    "deep roots": "\\sqrt" * 700 + "2",
    "nested roots": "\\sqrt{" * 550 + "2" + "}" * 550,
    "long sum": "1+" * 1990 + "1",
    "long product": "99999999*" * 400 + "1",
    "long list": ",".join(["1"] * 1990),
    "many signs": "-" * 3990 + "1",
    "many equals": "1=" * 1990 + "1",
    "many less": "1<" * 1990 + "1",
    "plus minus": "\\pm 1" * 700,
    "quotes": "\\text{a" * 500 + "}" * 500,
    "spaces": "1" + " " * 200_000 + "2",
    "bars": "|" * 3999,
    "matrices": "\\begin{pmatrix}" * 250,
    "backslashes": "\\" * 3999,
    "raised": "²" * 3000,
}


@pytest.mark.parametrize(("output", "expected"), EXTRACTION)
def test_extract(output: str, expected: str | None) -> None:
    assert extract(output) == expected


@pytest.mark.parametrize(("gold", "verdict", "answer"), CASES)
def test_compare(gold: str, verdict: str, answer: str) -> None:
    assert compare(gold, answer) is VERDICTS[verdict]


def test_invisible_characters_do_not_count() -> None:
    assert compare("42", "\u202a4\u200b2\u202c") is True
    assert compare("42", "") is False


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_decided_quickly(name: str) -> None:
    start = time.process_time()
    for gold in ("42", "x+1", "1,2", r"\frac{1}{2}", "(1,2)"):
        assert compare(gold, HOSTILE[name]) in (False, None)
    assert compare("42", HOSTILE[name]) is False
    assert judge("\\boxed{" + HOSTILE[name] + "}", "42") is False
    assert judge("The answer is " + HOSTILE[name], "42") is False
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize(
    "text", ["\\boxed{", "{", "$", "\\(", "\\[", "answer is $", "<think>", "\\boxed{1}, ", "1 ", "\\frac"]
)
def test_extraction_is_linear(text: str) -> None:
    output = text * (400_000 // len(text))
    start = time.process_time()
    extract(output)
    assert time.process_time() - start < 3.0


def test_values_are_exact() -> None:
    assert evaluate(r"\frac{4 \cdot 999^{4}}{27}") == Fraction(4 * 999**4, 27)
    assert evaluate("-2^2") == -4
    assert evaluate("8^{-2/3}") == Fraction(1, 4)
    assert evaluate("0.1") + evaluate("0.2") == evaluate("0.3")
    for text in ("", "x", "1,2", "2 3", r"\sqrt{2}", r"\frac{1}{0}", "0^0", r"\pi", "1+", "(1", "i"):
        with pytest.raises(NotRationalError):
            evaluate(text)
    for text in ("9^{9^{9}}", "100000!", "1e99999", "9" * 4100):
        with pytest.raises(TooLargeError):
            evaluate(text)


def test_normalise_is_stable_on_plain_formulas() -> None:
    for text in (r"\frac{1}{2}", "x^2+1", "(1,2)", r"2\sqrt{3}", r"\{1,2\}"):
        assert key(normalise(text)) == key(text)
        assert normalise(normalise(text)) == normalise(text)


def test_check_gold() -> None:
    assert check_gold("42") is None
    assert check_gold(r"\frac{1}{2}") is None
    assert "empty" in (check_gold("  ") or "")
    assert "nothing is left" in (check_gold("$ $") or "")
    assert "braces" in (check_gold(r"\frac{1}{2") or "")
