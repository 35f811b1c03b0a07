"""Answers taken apart, in a box or without one, through a worker where algebra is needed. One case a line.

Reference, `==` right or `!=` wrong, answer.
"""

import re
import time
from collections.abc import Iterator

import pytest

from dynamo_jax.tasks.grading.answers import compare, judge
from dynamo_jax.tasks.grading.matrices import determinant
from dynamo_jax.tasks.grading.structure import labelled_tuple, without_systems
from dynamo_jax.tasks.grading.verifier import Verifier

# Letters are positive where both formulas keep roots of them.
ROOTS = r"""
\sqrt{4 \pi G \rho_{0} r_{0}^{2}}  ==  2 r_0 \sqrt{\pi G \rho_0}
\sqrt{a^2 b}  ==  a\sqrt{b}
a\sqrt{b}  ==  \sqrt{a^2 b}
\sqrt{a^2 b}  !=  -a\sqrt{b}
\sqrt{a^2 b}  !=  |a|\sqrt{-b}
\sqrt{a^2}  !=  a
\sqrt{x^2}  !=  x
x  !=  \sqrt{x^2}
|x|  ==  \sqrt{x^2}
|x|  !=  x
\sqrt{x^2y}  !=  -x\sqrt{y}
\sqrt{x^2+y^2}  !=  x+y
\sqrt{x+y}  !=  \sqrt{x}+\sqrt{y}
|x|\sqrt{y}  !=  x\sqrt{y}
|x|\sqrt{y}  ==  \sqrt{x^2 y}
\sqrt{18 m^2 k}  ==  3m\sqrt{2k}
(8 a^3 b^2)^{1/2}  ==  2ab\sqrt{2a}
\frac{c}{\sqrt{c^2-v^2}}  ==  \frac{1}{\sqrt{1-\frac{v^2}{c^2}}}
\sqrt{\frac{2E}{m}}  ==  \frac{\sqrt{2Em}}{m}
\frac{1}{2\pi}\sqrt{\frac{k}{m}}  ==  \frac{\sqrt{k m}}{2\pi m}
\sqrt[3]{8 a^3 b}  ==  2a\sqrt[3]{b}
\sqrt[4]{16 a^4 b}  ==  2a\sqrt[4]{b}
\sqrt[4]{16 a^4 b}  !=  4a\sqrt[4]{b}
\sqrt{a}\sqrt{1-\sin^2 x}  !=  \sqrt{a}\cos x
\sqrt{(x-1)^2 y}  !=  (x-1)\sqrt{y}
\sqrt{(x-1)^2}  !=  x-1
i\sqrt{a}  ==  \sqrt{-a}
\sqrt{\frac{2(E-V)}{m r^2}}  ==  \frac{1}{r}\sqrt{\frac{2(E-V)}{m}}
\sqrt{\frac{G M}{R^3}}  ==  \frac{1}{R}\sqrt{\frac{GM}{R}}
\frac{-b+\sqrt{b^2-4ac}}{2a}  ==  -\frac{b}{2a}+\sqrt{\frac{b^2}{4a^2}-\frac{c}{a}}
\frac{-b+\sqrt{b^2-4ac}}{2a}  !=  \frac{-b-\sqrt{b^2-4ac}}{2a}
x^{3/2}  ==  x\sqrt{x}
x^{3/2}  ==  \sqrt{x^3}
(a^2b)^{0.5}  ==  a b^{0.5}
2^{n}\sqrt{x^2y}  ==  2^n x\sqrt y
a\sqrt{b}  !=  \sqrt{a b^2}
\sqrt{4 m^2 v^2}  !=  2mv
2\pi\sqrt{\frac{l}{g}}  ==  \frac{2\pi\sqrt{lg}}{g}
\sqrt{x^2 y}  ==  x\sqrt{y}
\sqrt{\frac{c}{a-b}}  ==  \frac{\sqrt{c}}{\sqrt{a-b}}
v = \sqrt{2 g h^2 k}  ==  v = h\sqrt{2gk}
\ln(a\sqrt{b})  ==  \ln\sqrt{a^2b}
(r\sqrt{G\rho}, 1)  ==  (\sqrt{G \rho r^2}, 1)
"""
# A determinant is a number, its matrix is not.
DETERMINANTS = r"""
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  !=  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \begin{Vmatrix} 1 & 2 \\ 3 & 4 \end{Vmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \left|\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}\right|
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \left|\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right|
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \det\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \det\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ==  \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}  ==  \left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]
-2  ==  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
-2  ==  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} = -2
-2  ==  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} = 1 \cdot 4 - 2 \cdot 3 = -2
-2  ==  \det\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
-2  ==  \left|\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right|
2  !=  \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
-2  !=  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
-4  ==  2\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  ==  -2
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  ==  \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  ==  \begin{vmatrix}1&3\\2&4\end{vmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  !=  \begin{vmatrix}2&1\\3&4\end{vmatrix}
\begin{vmatrix} a & b \\ c & d \end{vmatrix}  ==  ad-bc
\begin{vmatrix} a & b \\ c & d \end{vmatrix}  !=  ad+bc
ad-bc  ==  \begin{vmatrix} a & b \\ c & d \end{vmatrix}
6  ==  \begin{vmatrix} 1 & 0 & 0 \\ 0 & 2 & 0 \\ 0 & 0 & 3 \end{vmatrix}
0  ==  \begin{vmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \\ 7 & 8 & 9 \end{vmatrix}
-3  ==  \begin{vmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \\ 7 & 8 & 10 \end{vmatrix}
3  !=  \begin{vmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \\ 7 & 8 & 10 \end{vmatrix}
2  !=  \left|\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}\right|
\begin{pmatrix}1\\2\end{pmatrix}  !=  \left|\begin{pmatrix}1\\2\end{pmatrix}\right|
\begin{pmatrix}1\\2\end{pmatrix}  !=  \left\|\begin{pmatrix}1\\2\end{pmatrix}\right\|
A=\begin{pmatrix}1\\2\end{pmatrix}  ==  \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}2&0\\0&2\end{pmatrix}  ==  2\begin{pmatrix}1&0\\0&1\end{pmatrix}
\begin{pmatrix}\lambda&0\\0&1\end{pmatrix}  !=  \begin{vmatrix}\lambda&0\\0&1\end{vmatrix}
"""
# Solved systems and chains are tuples; systems to be solved and functions in pieces are not.
SYSTEMS = r"""
(3,-1)  ==  \begin{cases}x=3\\y=-1\end{cases}
(3,-1)  ==  \begin{cases} x = 3, \\ y = -1. \end{cases}
(3,-1)  ==  \begin{cases} y = -1 \\ x = 3 \end{cases}
(3,-1)  ==  \begin{cases} x &= 3 \\ y &= -1 \end{cases}
(3,-1)  ==  \left\{\begin{array}{l}x=3\\y=-1\end{array}\right.
(3,-1)  ==  \left\{ \begin{array}{rcl} x & = & 3 \\ y & = & -1 \end{array} \right.
(3,-1)  ==  \left\{\begin{aligned}x&=3,\\[2pt] y&=-1.\end{aligned}\right.
(3,-1)  ==  \begin{aligned} x &= 3 \\ y &= -1 \end{aligned}
(3,-1)  ==  \begin{gathered} x=3 \\ y=-1 \end{gathered}
(3,-1)  ==  \begin{align*} x&=3\\ y&=-1 \end{align*}
(3,-1)  ==  \begin{array}{c} x=3 \\ \text{and } y=-1 \end{array}
(3,-1)  ==  x=3, y=-1
(3,-1)  ==  x=3 \\ y=-1
(3,-1)  ==  x=3 \text{ and } y=-1
(3,-1)  ==  x=3; y=-1
(3,-1)  ==  (x,y)=(3,-1)
(3,-1)  ==  (x=3, y=-1)
(3,-1)  ==  \{x=3, y=-1\}
(3,-1)  !=  \begin{cases}x=-1\\y=3\end{cases}
(3,-1)  !=  \begin{cases}y=3\\x=-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\y=1\end{cases}
(3,-1)  !=  \begin{cases}x=3\end{cases}
(3,-1)  !=  \begin{cases}x=3\\x=-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\y=-1\\z=0\end{cases}
(3,-1)  !=  \begin{cases}x+y=2\\x-y=4\end{cases}
(3,-1)  !=  \begin{cases}3\\-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\ \text{or } y=-1\end{cases}
(2,4)  !=  \begin{cases}x+y=2\\x-y=4\end{cases}
\begin{cases}x=3\\y=-1\end{cases}  ==  (3,-1)
\begin{cases}x=3\\y=-1\end{cases}  ==  x=3, y=-1
\begin{cases}x=3\\y=-1\end{cases}  ==  \begin{cases}y=-1\\x=3\end{cases}
\begin{cases}x=3\\y=-1\end{cases}  !=  (-1,3)
\begin{cases}x=3\\y=-1\end{cases}  !=  3
\begin{cases}x=3\\y=-1\end{cases}  !=  \begin{cases}x=3\\y=-2\end{cases}
x=3, y=-1  ==  \begin{cases}x=3\\y=-1\end{cases}
x=3, y=-1  !=  \begin{cases}x=-1\\y=3\end{cases}
(1,2,3)  ==  \begin{cases}a=1\\b=2\\c=3\end{cases}
(1,2,3)  ==  \begin{cases}x=1\\z=3\\y=2\end{cases}
(1,2,3)  !=  \begin{cases}a=1\\b=3\\c=2\end{cases}
(1,2),(3,4)  ==  \begin{cases}x=1\\y=2\end{cases} \text{ or } \begin{cases}x=3\\y=4\end{cases}
(1,2),(3,4)  ==  \left\{\begin{array}{l}x=3\\y=4\end{array}\right., \left\{\begin{array}{l}x=1\\y=2\end{array}\right.
(1,2),(3,4)  !=  \begin{cases}x=1\\y=2\end{cases} \text{ or } \begin{cases}x=3\\y=5\end{cases}
(\sqrt{2},\frac{\pi}{4})  ==  \begin{cases}r=\sqrt2\\\theta=\frac{\pi}{4}\end{cases}
(1,1,1)  ==  x=y=z=1
(1,1,1)  ==  1=x=y=z
(1,1,1)  ==  a=b=c=1
(1,1,1)  !=  x=y=1
(1,1)  !=  x=y=z=1
(1,1,1)  !=  x=y=z=2
(1,1,1)  !=  x=x=x=1
(1,1,1)  !=  1=1=1
(x,y,z)=(1,1,1)  ==  x=y=z=1
x=y=z=1  ==  (1,1,1)
x=y=z=1  ==  x=1,y=1,z=1
x=1,y=1,z=1  ==  x=y=z=1
x=y=z=1  ==  z=y=x=1
x=y=z=1  ==  1
(2,2)  ==  a=b=2
2  ==  a=b=2
(1,1,2)  ==  x=y=1, z=2
(1,1,2)  ==  \begin{cases}x=y=1\\z=2\end{cases}
(1,2,2)  !=  x=y=1, z=2
3  ==  \begin{aligned} x &= 1+2 \\ &= 3 \end{aligned}
3  !=  \begin{aligned} x &= 1+1 \\ &= 3 \end{aligned}
42  !=  \begin{cases}42\\43\end{cases}
42  !=  \begin{aligned}42\\43\end{aligned}
f(x)=\begin{cases}x & x>0\\-x & x\le 0\end{cases}  ==  f(x)=\begin{cases}x & x>0\\-x & x\le 0\end{cases}
\begin{cases}1 & n=0\\ 2 & n=1\end{cases}  ==  \begin{cases}1 & n=0\\ 2 & n=1\end{cases}
(0,1)  !=  \begin{cases}1, & n=0\\ 2, & m=1\end{cases}
(1,2)  !=  \begin{cases}a & n=1\\ b & m=2\end{cases}
(1,2)  !=  \begin{cases}a, n=1\\ b, m=2\end{cases}
(t,2t)  ==  \begin{cases}x=t\\y=2t\end{cases}
(a,b)  ==  x=a, y=b
(b,a)  !=  x=a, y=b
(3,-1)  !=  (x,y)=(-1,3)
(3,-1)  ==  \left(x, y\right) = \left(3, -1\right)
(\frac12,2)  ==  \begin{cases} m=0.5 \\ n=2 \end{cases}
(3,4,5)  ==  a=3,\ b=4,\ c=5
(3,4,5)  ==  $a=3$, $b=4$, and $c=5$
"""
CASES = [
    tuple(re.split("  (==|!=)  ", line))
    for table in (ROOTS, DETERMINANTS, SYSTEMS)
    for line in table.strip().splitlines()
]
HOSTILE = {
    "many equals": "m+n=" * 990 + "13",
    "many roots": r"\sqrt{a" * 600,
    "a large determinant": r"\begin{vmatrix}" + r"1&2&3&4\\" * 400 + r"\end{vmatrix}",
    "nested determinants": r"\begin{vmatrix}1" * 200 + r"\end{vmatrix}" * 200,
    "nested systems": r"\begin{cases}x=1\\" * 150 + r"\end{cases}" * 150,
    "many rows": r"\begin{cases}" + r"x=1\\" * 700 + r"\end{cases}",
    "open systems": r"\begin{cases}" * 280,
    "many systems": r"\begin{cases}x=1\\y=2\end{cases}" * 110,
    "rows alone": r"x=1 \cr " * 450,
    "many names": "x=" * 1900 + "1",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as shared_verifier:
        yield shared_verifier


@pytest.mark.parametrize(("gold", "verdict", "answer"), CASES)
def test_cases(gold: str, verdict: str, answer: str, verifier: Verifier) -> None:
    assert verifier.grade(f"So it is $\\boxed{{{answer}}}$.", gold) is (verdict == "==")


def test_without_a_box(verifier: Verifier) -> None:
    outputs = [f"The answer is ${answer}$." for _, _, answer in CASES]
    grades = verifier.grade_batch([(output, gold) for output, (gold, _, _) in zip(outputs, CASES, strict=True)])
    assert [case for case, grade in zip(CASES, grades, strict=True) if grade is not (case[1] == "==")] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_decided_quickly(name: str) -> None:
    began = time.process_time()
    for gold in ("7", "x+1", "(3,-1)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "x=3", HOSTILE[name] + "7"):
        assert compare(gold, HOSTILE[name]) in (False, None)
    assert judge("\\boxed{" + HOSTILE[name] + "}", "7") is False
    assert time.process_time() - began < 2.0


def test_small_determinants_are_written_out() -> None:
    assert determinant(r"\begin{vmatrix}a&b\cr c&d\end{vmatrix}") == "(1)(+(a)(d)-(b)(c))"
    for text in (r"\begin{pmatrix}1&2\cr 3&4\end{pmatrix}", r"\begin{vmatrix}1&2\end{vmatrix}", "|x|", "5"):
        assert determinant(text) is None
    assert determinant(r"\begin{vmatrix}" + r"1&2&3&4\cr " * 4 + r"\end{vmatrix}") is None


def test_a_system_becomes_a_tuple_only_if_it_is_solved() -> None:
    solved = r"\begin{cases}x=3\cr y=-1\end{cases}"
    assert without_systems(solved) == "(3,-1)"
    assert without_systems(f"{solved} , {solved}") == "(3,-1) , (3,-1)"
    for text in (
        r"\begin{cases}x=3\cr x=-1\end{cases}",
        r"\begin{cases}x+y=3\cr x-y=-1\end{cases}",
        r"f(x)=\begin{cases}1&x=0\cr 2&x=1\end{cases}",
        r"\begin{cases}x & x>0\cr -x & x<0\end{cases}",
        r"\begin{pmatrix}1\cr 2\end{pmatrix}",
        r"\begin{array}{c}1\cr 2\end{array}",
    ):
        assert without_systems(text) == text


def test_labelled_tuples() -> None:
    assert labelled_tuple(["x=1", "y=2"]) == "(1,2)"
    assert labelled_tuple(["y=2", "x=1"]) == "(1,2)"
    assert labelled_tuple(["x=a", "y=b"]) == "(a,b)"
    assert labelled_tuple([r"\theta=2", "r=1"]) == "(1,2)"
    assert labelled_tuple(["x=y=1", "2=z"]) == "(1,1,2)"
    assert labelled_tuple(["(x=1,y=2)"]) == "(1,2)"
    for parts in (["x=1"], ["x=1", "x=2"], ["x=1", "2"], ["x=1", "y="], ["x+y=1", "z=2"], ["1=1", "x=2"], []):
        assert labelled_tuple(parts) is None
