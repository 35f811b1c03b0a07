"""What names an asked quantity and what is an equation still to be solved. One case a line: left side; value."""

# ruff: noqa: RUF001 - look-alike characters are among the cases

import pytest

from dynamo_jax.tasks.grading.asked import names_quantity
from dynamo_jax.tasks.grading.latex import normalise
from dynamo_jax.tasks.grading.structure import is_name

ASKED = r"""
m+n;13
N \bmod 1000;9
[ABC];7
\frac{a}{b};\frac12
a+b+c;13
a^2+b^2;25
AB \cdot CD;12
AB^2;13
|AB|^2;13
|AB|+|CD|;13
|AB||CD|;13
\sin\theta;\frac35
\sin 2\theta;\frac{24}{25}
\tan\theta;2
\tan\frac{A}{2};2
\cos\angle ABC;1/2
\sin^2\theta;1
a_1+a_2;3
x+y;5
xy;6
10a+b;42
100m+10n+p;123
\lfloor 100x \rfloor;314
\lfloor x \rfloor;3
\left\lceil \log_2 N\right\rceil;3
\max f;5
\max_{x} f(x);5
\min\{a,b\};3
\text{lcm}(a,b);12
\operatorname{lcm}(a,b)+1x;12
\gcd(m,n);1
n!;120
r^2;13
\frac{m+n}{2};3
x+\frac1x;3
x^2+\frac{1}{x^2};7
\frac1a+\frac1b;2
f(1)+f(2);3
f(f(2));3
f^{-1}(3);5
f''(1)+f(0);5
f^{(10)}(0);5
\frac{AB}{CD};2
\frac{[ABC]}{[DEF]};2
\angle A + \angle B;90
m\angle ABC;60
\text{Area}(ABC);12
\text{area of }\triangle ABC;12
\mathbb{E}[X];3
\sqrt{a}+\sqrt{b};3
\sqrt{ab};3
\log_a b;3
\log_2 x;3
|z|^2;5
|a-b|;5
|z_1+z_2|;5
x_1x_2;5
m:n;3:5
a:b:c;1:2:3
P(A)+P(B);1
(a+b)^2;25
a^b;8
(m+n) \bmod 1000;9
m+n \bmod 1000;9
N mod 1000;9
\overline{ab}+\overline{ba};99
\vec{u}\cdot\vec{v};0
u\cdot v;0
\det A;5
\alpha\beta;5
\alpha^2+\beta^2;5
\cos\theta;\frac{a}{b}
v^2;2gh
f^{-1}(x);\frac{x-1}{2}
\|u+v\|;5
(a+b,ab);(3,2)
A^{-1};\begin{pmatrix}1&2\end{pmatrix}
A^T B;\begin{pmatrix}1&2\end{pmatrix}
a+bi;3+4i
a+b;0
\sin A+\sin B;0
\lfloor x\rfloor;0
N \bmod 7;0
\binom{n}{k};10
A B C;5
\text{rank } A;3
\arg z;\frac{\pi}{3}
|A \cap B|;7
AB \sin A;3
(f \circ g)(2);3
(f\circ g)(x);x^2
ab\sin C;12
\frac12 ab\sin C;12
\frac{dy}{dx};2x
\frac{dy}{dx};0
\frac{\partial f}{\partial x};2x
\frac{d^2y}{dx^2};2
\left|\vec{a}+\vec{b}\right|;\sqrt{7}
|\sin x|;1
\frac{d}{t};60
\frac{d^2 y}{d x^2};2x
\frac{d}{d_1};3
\frac{dm}{dn};x
max f(x);5
N % 1000;9
\frac{1}{x+y};5
\frac{1}{ab};5
\sin A : \sin B : \sin C;2:3:4
\overrightarrow{AB}\cdot\overrightarrow{AC};5
[\triangle ABC];7
∠A+∠B;90
x₁+x₂;5
½ab;6
m＋n;13
N \text{ mod } 1000;9
⌊100x⌋;314
√(ab);6
sin θ;\frac35
m(\angle ABC);60
\mathbb P(A)+\mathbb P(B);1
\sigma^2;5
\text{N mod 1000};9
-a-b;3
2a-b;3
\sin x+\cos x;\frac15
"""
EQUATIONS = r"""
2x+1;7
2x-7;7
x+1;4
3x;9
-x;3
x^2;9
x^2;4
x^2-5x+6;0
x^2+x;6
x^2+x;0
\frac{x}{2};3
\sqrt{x};3
\sqrt{x+1};3
\sqrt{x};1
|x-2|;5
|2x|;4
2^x;8
e^x;5
e^{2x};5
x+y-1;0
x+y;0
2x-y;0
ax^2+bx+c;0
x(x-1);0
x(x+1);6
n(n+1);6
r^2;1
r^2;0
n!;1
n!;2
\sin x;0
2\sin x;1
x+\frac6x;5
\frac{1}{x};2
\frac{1}{a};1
a^2+a;6
\binom{n}{2};10
1+1;3
12;13
\pi+1;4
\pi;3
e;3
i;3
e+i;3
5m;13
m+5;13
(x-1)(x+2);4
\log_2(x+1)+1;4
m \le (n);13
m+;13
+;13
;13
a+b;a+b
x+y;y
\text{not }m;13
\text{half of } N;13
不是;13
m = n;13
\cdot;13
\sin 30;1
\frac12 x;3
x \cdot 0;0
\begin{pmatrix}a\end{pmatrix};3
\sum a_i;5
(;3
|;3
[;3
{;3
x^{2}(y+1)-1;3
1 x;3
x+\sin x;3
x\lfloor x\rfloor;6
x+|x|;4
2^a \cdot 3^b;72
2^{k-n};2
e^{-at}-e^{-bt};2
xf(x);3
r^3;-1
\frac{d}{a;2
\frac{1}{a};-1
x+|x|;4
|x|+x;4
\frac{d a}{b};d
\frac{d}{d+1};3
\frac{d!}{2k(d-k)!};3
\theta+\sin\theta;2
\arcsin{1.3 \sin{\theta_w}};3
"""


@pytest.mark.parametrize("line", ASKED.strip().splitlines())
def test_what_names_a_quantity(line: str) -> None:
    left, _, value = line.partition(";")
    assert names_quantity(normalise(left), normalise(value))


@pytest.mark.parametrize("line", EQUATIONS.strip().splitlines())
def test_what_is_still_to_be_solved(line: str) -> None:
    left, _, value = line.partition(";")
    assert not names_quantity(normalise(left), normalise(value))


def test_names() -> None:
    for text in ("x", "f(n)", "P(A \\cap B)", "m_{\\max}", "(p,q,r)", "\\angle ABC", "area"):
        assert is_name(text)
    for text in ("x(x-1)", "n(n+1)", "\\sin(x)", "\\ln(x)", "2x", "x+y"):
        assert not is_name(text)
