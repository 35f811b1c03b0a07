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
a\sqrt{2}  ==  \sqrt{2a^2}
\sqrt{2a^2}  !=  -a\sqrt{2}
\sqrt{4x^2}  !=  2x
\sqrt{2}(x-1)  !=  \sqrt{2(x-1)^2}
\frac{\sqrt{3}}{2}\sin x  !=  \sqrt{\frac{3}{4}\sin^2 x}
\sqrt{a}\cos x  !=  \sqrt{a \cos^2 x}
\sqrt{3}|x|  !=  x\sqrt{3}
\sqrt{3}|x|  ==  \sqrt{3x^2}
a+b  !=  \sqrt{(a+b)^2}
a+b  !=  |a+b|
|a+b|  ==  \sqrt{(a+b)^2}
\sqrt{\frac{2 G M}{R}}  ==  \frac{1}{R}\sqrt{2 G M R}
\sqrt{\frac{3\pi}{G\rho}}  ==  \frac{\sqrt{3\pi G \rho}}{G\rho}
r_0 \sqrt{4\pi G\rho_0}  !=  4\sqrt{\pi G \rho_0 r_0^2}
\sqrt{xy}  ==  \sqrt{x}\sqrt{y}
\frac{1}{\sqrt{a^2 b}}  ==  \frac{1}{a\sqrt{b}}
-\sqrt{a^2b}  !=  a\sqrt{b}
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
\begin{bmatrix}1&2\\3&4\end{bmatrix}  !=  \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{pmatrix}a&b\\c&d\end{pmatrix}  !=  \begin{vmatrix}a&b\\c&d\end{vmatrix}
\begin{pmatrix}5\end{pmatrix}  !=  \begin{vmatrix}5\end{vmatrix}
5  ==  \begin{vmatrix}5\end{vmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \lvert\begin{matrix}1&2\\3&4\end{matrix}\rvert
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \left\lVert\begin{matrix}1&2\\3&4\end{matrix}\right\rVert
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \text{det}\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  \det A = \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  !=  A=\begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}  !=  2
\begin{vmatrix}1&0&0&0\\0&1&0&0\end{vmatrix}  !=  \begin{pmatrix}1&0&0&0\\0&1&0&0\end{pmatrix}
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
(1,2)  !=  x+y=3, xy=2
(3,-1)  ==  x=3,\,y=-1
(3,-1)  ==  x=3, \text{and } y=-1
(3,-1)  ==  x = 3 \ \text{and}\ y = -1
(3,-1)  ==  \left\{ \begin{matrix} x=3 \\ y=-1 \end{matrix} \right.
(3,-1)  ==  \begin{dcases} x=3 \\ y=-1 \end{dcases}
(3,-1)  ==  \begin{cases}x=3,\\y=-1,\end{cases}
(3,-1)  ==  \begin{cases}x=3\\[4pt]y=-1\end{cases}
(3,-1)  ==  \begin{cases}x=\frac{6}{2}\\y=-1\end{cases}
(3,-1)  ==  \begin{cases}x=3\\y=-1\\\end{cases}
(3,-1)  ==  (x,y) = \begin{cases}x=3\\y=-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\y\ne-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\y=-1\end{cases} \text{ or } x=0
(3,-1)  !=  \begin{cases}x=3\\y>-1\end{cases}
(3,-1)  !=  \begin{cases}2x=6\\y=-1\end{cases}
(3,-1)  !=  \begin{cases}x=3\\y=-1\\x=4\end{cases}
(3,-1)  !=  \begin{cases}x=3 & y=2\\y=-1\end{cases}
(3,-1),(0,0)  !=  \begin{cases}x=3\\y=-1\end{cases}
(2,2,2)  ==  a=b=c=\frac{4}{2}
(2,2,2)  ==  a = b = c = 2
(2,2,2)  !=  a=b=c
(0,0)  ==  x=y=0
(0,0)  !=  x=0
(1,1,1)  !=  xyz=1
(1,1,1)  !=  x+y=z=1
(1,2)  !=  x=y=1,2
x=1  !=  x=y=z=1
x=y=z  !=  1
(a^2 b)^{1/2}  ==  a b^{1/2}
"""
# A left side that names the asked quantity, and equations that are still to be solved.
NAMED = r"""
13  ==  m+n=13
13  ==  13=m+n
13  ==  m+n = 5+8 = 13
13  !=  m+n = 5+9 = 13
13  !=  m+n = 14
9  ==  N \bmod 1000 = 9
9  ==  9 = N \bmod 1000
7  ==  [ABC]=7
7  ==  S = [ABC] = 7
1/2  ==  \frac{a}{b}=\frac12
\frac{1}{2}  ==  \dfrac{AB}{CD} = 0.5
13  ==  a+b+c=13
25  ==  a^2+b^2 = 25
25  ==  a² + b² = 25
5  ==  |AB| = 5
12  ==  AB \cdot CD = 12
12  ==  AB \times CD = 12
\frac13  ==  P(A \cap B) = \frac13
5  ==  f(3)=5
5  ==  f'(2)=5
60  ==  \angle ABC = 60^\circ
\frac35  ==  \sin\theta = \frac{3}{5}
\frac35  ==  \sin \angle ABC = 0.6
55  ==  S_{10} = 55
3  ==  a_1+a_2 = 3
6  ==  xy = 6
42  ==  10a+b = 42
314  ==  \lfloor 100\pi \rfloor = 314
314  !=  \lfloor 100\pi \rfloor = 315
3  ==  \left\lfloor x \right\rfloor = 3
5  ==  \max f = 5
12  ==  \text{lcm}(a,b) = 12
12  ==  \operatorname{lcm}(a, b) = 12
120  ==  n! = 120
7  ==  |A \cup B| = 7
7  ==  |A \cap B| = 7
2\sqrt{3}  ==  x+y = \sqrt{12}
2\sqrt{3}  !=  x+y = \sqrt{13}
\frac{a}{b}  ==  \cos\theta = \frac{a}{b}
2gh  ==  v^2 = 2gh
\frac{x-1}{2}  ==  f^{-1}(x) = \frac{x-1}{2}
3:5  ==  AB:CD = 3:5
7  !=  2x+1=7
3  !=  2x+1=7
x=3  !=  2x+1=7
x=3  !=  7=2x+1
x=3  !=  2x=6
x=3  !=  x-3=0
x=3  !=  x=2
x=3  ==  3=x
x=3  ==  x=\frac{6}{2}=3
x=3  !=  x=\frac{6}{2}=4
x=4  !=  2x-4=4
4  !=  2x-4=4
7  !=  2x-7=7
3  !=  x+1=4
4  !=  x+1=4
x=3  !=  x=4
m=13  !=  m+n=13
x=5  !=  x+y=5
(2,3)  !=  x+y=5
1  !=  x^2=1
x=1  !=  x^2=1
0  !=  x^2-5x+6=0
0  !=  x(x-1)=0
0  !=  \sin x=0
0  !=  \sin(x)=0
3  !=  1+1=3
3  !=  1+1=2=3
13  !=  12=13
13  !=  13=12
13  ==  13=13
x=\frac{b-c}{2}  !=  2x+c=b
x=\frac{b-c}{2}  ==  x=\frac{b}{2}-\frac{c}{2}
y=2x+1  ==  y-2x=1
n=k+4  ==  n-k=4
9  !=  x^2=9
9  !=  3x=9
9  !=  y=9, z=9
13  !=  m=5, n=8, m+n=13
13  !=  m+n=13, 14
13  !=  m+n \le 13
13  !=  m+n \approx 13.2
13  !=  \text{not } m+n = 13
a+b  ==  c=a+b
a+b  !=  a+b=3
x^2+y^2=4  !=  4
m+n=13  !=  12
m+n=13  ==  13=m+n
m+n=13  ==  n+m=13
m+n=13  !=  m+n=12
7  ==  |A \cup B \cup C| = 7
7  !=  |A \cup B| = 8
(0,1)\cup(2,3)  ==  (0,1) \cup (2,3)
x=3  !=  y=3
x=\sqrt{2}  !=  x-\sqrt2=0
M=\frac{9}{32}\sqrt{2}  ==  M=\frac{9\sqrt{2}}{32}
k=5  ==  n=5
5  ==  a^2+b^2+c^2 = 5
5  ==  \frac{x+y}{2} = 5
5  ==  \frac{1}{a}+\frac{1}{b}+\frac{1}{c} = 5
\frac{25}{4}  ==  R^2 = \frac{25}{4}
5  ==  OA^2 + OB^2 = 5
5  ==  \overline{AB} + \overline{CD} = 5
5  ==  5 = x_1 + x_2
5  ==  \log_2 a + \log_2 b = 5
204  ==  p+q = 204
\frac{3}{4}  ==  \cos A \cos B = \frac{3}{4}
100  ==  m^2+n^2 = 100 \text{ units}
\sqrt{2}  ==  \tan\alpha = \sqrt{2}
1+\sqrt{2}  !=  \tan\alpha = 1-\sqrt{2}
\pi  ==  \theta + \phi = \pi
2\pi  !=  \theta + \phi = \pi
3+4i  ==  a+bi=3+4i
i  ==  z = i
2  ==  \max\{a,b\} = 2
2  ==  \gcd(m,n)=2
6  ==  \phi(n) = 6
16  ==  f(1)+f(3) = 16
x^2  ==  (f \circ g)(x) = x^2
-1  ==  \frac{f(2)}{g(2)} = -1
13  ==  m+n = \boxed{13}
\frac{1}{2}  ==  P(X > 2) = \frac{1}{2}
0  ==  f(3)=0
0  ==  a+b=0
0  !=  x+y=0
0  !=  ax+by+c=0
1  ==  \tan 45^\circ = 1
2  !=  x+2=4
6  !=  2n=6
6  !=  n-1=6
6  !=  \frac{n}{2}=6
6  !=  \sqrt{x+1}=6
6  !=  |x-3|=6
6  !=  2^x=6
6  !=  e^x=6
6  !=  x^2-x=6
6  !=  (x-1)(x+2)=6
6  !=  x(x+1)=6
n=6  !=  n^2=36
n=6  !=  2n=12
n=6  !=  12=2n
n=6  !=  n-6=0
k=6  !=  k+1=7
a=2,b=3  !=  a+b=5
x=2  !=  x^2=4
x=-2  !=  x^2=4
x=2, x=-2  !=  x^2=4
2,-2  !=  x^2=4
f(x)=x+1  ==  y=x+1
x^2+y^2=4  ==  x^2+y^2-4=0
2  !=  x=y
4  !=  2+2=x=5
4  ==  x=2+2=4
4  ==  m+n=x=4
4  !=  m+n=x=4=5
\begin{pmatrix}1&0\\0&1\end{pmatrix}  ==  A^{-1} = \begin{pmatrix}1&0\\0&1\end{pmatrix}
13  ==  \begin{aligned} m+n &= 13 \end{aligned}
P=13  ==  P = m+n = 13
P=13  !=  P = m+n = 14
[ABC]=7  ==  7
N \bmod 1000 = 9  ==  9
\sin\theta=\frac35  ==  \frac35
\sin(\theta)=\frac35  ==  0.6
\sin\theta=\frac35  !=  \frac45
2x-y=5  !=  5
p+q=7  !=  7
\frac{dx}{dt}=0  !=  0
\begin{pmatrix}3\\-1\end{pmatrix}  ==  \begin{pmatrix}x\\y\end{pmatrix}=\begin{pmatrix}3\\-1\end{pmatrix}
\begin{pmatrix}3\\-1\end{pmatrix}  !=  \begin{pmatrix}x\\y\end{pmatrix}=\begin{pmatrix}-1\\3\end{pmatrix}
2x  ==  \frac{dy}{dx} = 2x
2x  !=  \frac{dy}{dx} = 3x
x=3  !=  x = m+n = p+q
x=3  !=  x = x = m+n
x=3  !=  x = m+n
3  !=  m+n = p+q
3  !=  m+n
3  !=  x = y = m+n
13  ==  m+n=13.
13  ==  \text{So } m+n = 13
13  ==  \mathbf{m+n = 13}
13  ==  \displaystyle m+n=13
13  ==  (m+n) = 13
13  ==  {m+n} = 13
13  ==  m+n = 13\text{ cm}
13  ==  m+n=\mathbf{13}
9  ==  N \pmod{1000} = 9
9  ==  N \text{ mod } 1000 = 9
9  ==  N \% 1000 = 9
7  ==  \text{Area}(ABC) = 7
7  ==  \text{Area of } \triangle ABC = 7
7  ==  [\triangle ABC] = 7
7  ==  S_{\triangle ABC} = 7
7  ==  \operatorname{Area}(ABC) = 7
\frac12  ==  \frac ab = \frac12
\frac12  ==  a/b = 1/2
\frac12  ==  \frac{AE}{EC} = 0.5
1,2  ==  a+b=1, ab=2
42  ==  \lfloor 100 \cdot x \rfloor = 42
42  ==  \left\lfloor 1000\pi r \right\rfloor = 42
3  ==  \log_{2} x = 3
3  !=  \log_{2}(x+1) + 1 = 3
2  !=  \sqrt{2x} = 2
2  !=  x^x = 4
4  !=  x^x = 4
5  !=  5 = 2x - 5
5  !=  2x - 5 = 5
5  !=  10 - x = 5
5  !=  x - y + 1 = 5
x=5  !=  x+5=10
x=5  !=  10=x+5
x=5  !=  5x=25
x=5  !=  x^2=25
x=5  !=  \frac{x}{5}=1
x=5  !=  \sqrt{x-1}=2
x=5  !=  y=5
x=5  ==  x=5.0
x=5  ==  x = 10/2
y=5  !=  2y=10
n=5  !=  3n-15=0
"""
CASES = [
    tuple(re.split("  (==|!=)  ", line))
    for table in (ROOTS, DETERMINANTS, SYSTEMS, NAMED)
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
    "many terms": "a+" * 1900 + "b=13",
    "short terms": "=".join(["a+b"] * 900) + "=1",
    "deep functions": r"\sin" * 700 + "x=1",
    "deep brackets": "(" * 90 + "m+n" + ")" * 90 + "=1",
    "deep fractions": r"\frac{1}{" * 18 + "m" + "}" * 18 + "=1",
    "bars": "|" * 150 + "m+n=1",
    "primes": "m" + "'" * 180 + "=1",
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


def test_towers_of_roots_cost_no_worker(verifier: Verifier) -> None:
    before = verifier.counts["killed"]
    for gold in ("42", r"\sqrt{2x^2}"):
        assert not verifier.grade(r"\boxed{x\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{10^{9}}}}}}", gold)
    assert verifier.counts["killed"] == before


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
