"""Left sides that only name what was asked: `m+n` in `m+n = 13`, `N \\bmod 1000`, `[ABC]`, `\\frac{a}{b}`.

An equation with letters on its left may as well be the problem itself, still to be solved. This is the line between
the two:

* Two or more letters or function values name a quantity: `10a+b`, `\\frac{AB}{CD}`, `\\sin A + \\sin B`,
  `x + \\frac{1}{x}`. A number as a term belongs to the other side: `2x+1`, `x+y-1`, `|x-2|` are sides of equations.
* One function value does: `f(3)`, `\\sin 2\\theta`, `\\lfloor 100x \\rfloor`, `N \\bmod 1000`. A power of one letter
  does (`r^2`, `n!`), but not of x, y or z, which stand for unknowns. One letter with a factor (`3x`, `-x`,
  `\\frac{x}{2}`) or used twice (`x^2+x`) does not.
* A letter both bare and inside of a function (`x + \\sin x`, `x \\lfloor x \\rfloor`), or in the exponent of a number
  (`2^x`, `e^{-kt}`), makes an equation again.
* Nothing names a quantity whose equation the value itself may solve, as 0 solves `\\sin x = 0` and 1 solves `r^2 = 1`,
  or that shares letters with the value.

Linear time, and no more than `MAX_CHARS`.
"""

# ruff: noqa: SIM905 - a line of words reads better than a list

from __future__ import annotations

import re
from typing import NoReturn

from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate
from dynamo_jax.tasks.grading.structure import LETTERS, variables

MAX_CHARS, MAX_DEPTH = 200, 8
_PLAIN = {"mod": "\\bmod", "%": "\\bmod"} | {name: f"\\{name}" for name in ("max", "min", "gcd", "lcm", "det")}
_TOKEN = re.compile(r'\\[a-zA-Z]+|\\.|"[^"]*"|\d+(?:\.\d+)?|(?<![a-zA-Z])(?:mod|max|min|gcd|lcm|det)(?![a-zA-Z])|\S')
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_ELEMENTARY = {f"\\{name}" for name in "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log".split()}
_FUNCTIONS = {
    f"\\{name}"
    for name in "max min gcd lcm hcf det dim deg arg Pr ker inf sup Re Im tr rank Var Cov card ord Area area".split()
}
_MARKS = {
    f"\\{name}"
    for name in "angle measuredangle triangle overline underline vec hat bar tilde widehat widetilde overrightarrow "
    "mathbb mathscr mathfrak odot square dot ddot".split()
}
_NAMED = re.compile(
    r'"(?:the )?(?:area|perimeter|volume|length|distance|measure|slope|lcm|gcd|hcf|gcf|rank|trace|tr|det|dim|deg|var'
    r'|cov|sum|product|mean|average|median|probability)(?: of)?"',
    re.IGNORECASE,
)
_DERIVATIVE = re.compile(  # dy/dx, with a space between tokens
    r"\\frac \{ (d|\\partial)(?: \^ (?:\{ )?\w(?: \})?)?(?: (?:[a-zA-Z]|\\[a-zA-Z]+)){0,3} \}"
    r" \{ (?:\1 (?:[a-zA-Z]|\\[a-zA-Z]+)(?: \^ (?:\{ )?\w(?: \})?)? )+\}"
)
_ARGUMENT = _MARKS | {"\\frac", "\\sqrt", "\\pi"}  # besides numbers and letters, of a function without brackets
_UNKNOWN = {"x", "y", "z"}
_CONSTANTS = {"e", "i"}


class _EquationError(ValueError):
    """The text names no quantity."""


def names_quantity(text: str, value: str, strictly: bool = False) -> bool:
    """Does the side `text` of an equation name what was asked, so that its other side `value` is the answer?

    Both are normalised; see the module's docstring for what names a quantity. `strictly`, for references: what could be
    a relation (`a+b = 5`, `\\cos t = \\frac{a}{b}`) does not.
    """
    try:
        quantity = _Quantity(text)
        atoms = quantity.sum() - _CONSTANTS
        quantity.expect("")
    except _EquationError:
        return False
    if not atoms or quantity.letters & variables(value) or quantity.bare & quantity.inner:
        return False
    try:
        number = evaluate(value)
    except NotRationalError:
        number = None
    if strictly and (quantity.bare or number == 0 or variables(value)):
        return False
    if len(atoms) > 1:
        return number != 0 or not quantity.unknown  # x + y = 0 may be a line
    return not quantity.counted and not quantity.unknown and number not in quantity.solutions


class _Quantity:
    """A recursive descent. Each method returns the letters and function values of what it reads."""

    def __init__(self, text: str) -> None:
        self.tokens = (
            [_PLAIN.get(t.strip('" '), t) for t in _TOKEN.findall(text)] if len(text) <= MAX_CHARS else self.fail()
        )
        self.position = self.depth = self.bars = 0
        self.letters: set[str] = set()  # all but the arguments of f(x)
        self.bare: set[str] = set()  # small letters outside and
        self.inner: set[str] = set()  # inside of function values
        self.counted = False  # is there a factor, or a sum?
        self.unknown = False  # is x, y or z computed with?
        self.solutions: frozenset[int] = frozenset()  # which values solve their own equation: 1 does r^2 = 1

    def fail(self) -> NoReturn:
        raise _EquationError

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> bool:
        found = self.peek() in expected and self.peek() != ""
        self.position += found
        return found

    def expect(self, token: str) -> None:
        if self.peek() != token:
            self.fail()
        self.position += 1

    def since(self, start: int) -> str:
        return " ".join(self.tokens[start : self.position])

    def notes(self) -> tuple[bool, bool, frozenset[int]]:
        return self.counted, self.unknown, self.solutions

    def sum(self) -> set[str]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail()
        self.counted |= self.take("+", "-")
        terms = [self.product()]
        while self.take("+", "-"):
            terms.append(self.product())
        if len(terms) > 1:
            self.counted = True
            if not all(terms):
                self.fail()
        self.depth -= 1
        return set().union(*terms)

    def product(self) -> set[str]:
        start, before = self.position, self.notes()
        found = self.factor()
        while self.peek() and self.peek() not in ("+", "-", ",", *_CLOSING.values()):
            if self.bars and self.peek() in ("|", "\\|"):
                break
            if self.take("\\bmod"):
                self.argument()
                self.counted, self.unknown, self.solutions = before
                found = {self.since(start)} if found else set()
            else:
                self.take("\\cdot", "/", ":", "\\cap", "\\cup", "\\vee", "\\circ")
                found = found | self.factor()
        return found

    def factor(self) -> set[str]:
        found = self.base()
        while True:
            if self.peek() == "!" and _is_letter(self.tokens[self.position - 1]):
                self.position += 1
                self.solutions |= {1, 2}
            elif self.take("^"):
                counted = self.counted
                exponent = self.argument()
                if exponent and not found - _CONSTANTS:
                    self.fail()
                self.counted = counted or bool(exponent)
                self.solutions |= {-1, 0, 1}
                found = found | exponent
            else:
                return found

    def argument(self) -> set[str]:
        if self.take("{"):
            found = self.sum()
            self.expect("}")
            return found
        return self.base()

    def base(self) -> set[str]:
        start, head = self.position, self.peek()
        self.position += 1
        if head[:1].isdigit() or head == "\\pi":
            self.counted = True
            return set()
        if _is_letter(head):
            return self.letter(head)
        if head == "\\frac":
            return self.fraction(start)
        if head == "\\binom":
            return self.argument() | self.argument()
        if head == "\\sqrt":
            if self.peek() == "[":
                self.skip()
            self.solutions |= {0, 1}
            return self.argument()
        if head in ("(", "[", "{"):
            found = self.sum()
            while self.take(","):
                found |= self.sum()
            self.expect(_CLOSING[head])
            if self.peek() == "(" and "\\circ" in self.tokens[start : self.position]:  # (f \\circ g)(x)
                self.skip()
                return {self.since(start)}
            return found
        if head in ("|", "\\|"):
            return self.size(head, start)
        if head in ("\\lfloor", "\\lceil"):
            self.position = start
            return self.value(start)
        if head in _ELEMENTARY or head in _FUNCTIONS:
            return self.function(head, start)
        if head in _MARKS or _NAMED.fullmatch(head):
            return self.value(start)
        return self.fail()

    def size(self, bar: str, start: int) -> set[str]:
        """Of one letter or function value it is a value of its own, `|z|^2`; of more it is like brackets."""
        unknown, bare = self.unknown, self.bare
        self.bare = set()
        self.bars += 1
        found = self.sum()
        self.bars -= 1
        self.expect(bar)
        if len(found) > 1:
            self.bare |= bare
            return found
        self.inner |= self.bare
        self.unknown, self.bare = unknown, bare
        return {self.since(start)} if found else set()

    def letter(self, token: str) -> set[str]:
        start = self.position - 1
        while self.peek() in ("_", "'"):
            self.position += 1
            if self.tokens[self.position - 1] == "_":
                self.skip()
        name = self.since(start)
        end = self.position
        if self.tokens[end : end + 2] == ["^", "{"] and self.tokens[end + 2 : end + 3] in (["-"], ["("]):
            self.position += 1
            self.skip()  # f^{-1}(2), f^{(10)}(0)
        if self.peek() in ("(", "["):
            opening = self.position
            self.skip()
            arguments = self.tokens[opening : self.position]
            if token not in arguments:  # not x(x-1)
                self.letters.add(token)
                self.inner |= {t for t in arguments if _is_letter(t)}
                return {self.since(start)}
        self.position = end
        self.letters.add(token)
        if not token.isupper():
            self.bare.add(token)
        self.unknown |= name in _UNKNOWN
        return {name}

    def fraction(self, start: int) -> set[str]:
        """A reciprocal is a value of its own: `x + \\frac{1}{x}` is asked, `x + \\frac{6}{x} = 5` is to be solved."""
        if derivative := _DERIVATIVE.match(" ".join(self.tokens[start : start + 40])):
            self.position = start + len(derivative.group(0).split())
            return {self.since(start)}
        counted = self.counted
        top = self.argument()
        if self.tokens[start + 1 : self.position] != ["{", "1", "}"]:
            return top | self.argument()
        self.counted = counted
        bottom = self.argument()
        if len(bottom) == 1:
            self.solutions |= {-1, 1}
            return {self.since(start)}
        self.counted |= not bottom
        return bottom

    def function(self, token: str, start: int) -> set[str]:
        if token in _ELEMENTARY:
            self.solutions |= {0}
        while self.take("^", "_"):
            self.skip()
        begin = self.position
        found = self.value(start)
        if token in _ELEMENTARY and any("." in t or t in _ELEMENTARY for t in self.tokens[begin : self.position]):
            self.fail()
        return found

    def value(self, start: int) -> set[str]:
        """A function's value or a mark's letters: its argument may hold anything, but not numbers alone."""
        begin = self.position
        if self.peek() in _CLOSING:
            self.skip()
            while self.peek() in ("(", "["):
                self.skip()
        else:
            before, bare = self.notes(), set(self.bare)
            while self.peek()[:1].isdigit() or _is_letter(self.peek()) or self.peek() in _ARGUMENT:
                self.factor()
            (self.counted, self.unknown, self.solutions), self.bare = before, bare
        inside = {token for token in self.tokens[begin : self.position] if _is_letter(token)}
        self.letters |= inside
        self.inner |= inside
        self.counted |= not inside
        return {self.since(start)} if inside else set()

    def skip(self) -> None:
        """Past one token, or all between two brackets."""
        depth = 0
        while self.position < len(self.tokens):
            token = self.peek()
            depth += (token in _CLOSING) - (token in _CLOSING.values())
            self.position += 1
            if depth <= 0:
                return
        self.fail()


def _is_letter(token: str) -> bool:
    return (len(token) == 1 and token.isascii() and token.isalpha()) or token.removeprefix("\\") in LETTERS
