"""The exact value of a rational expression: integers, decimals, fractions, powers, roots, factorials, binomials.

A recursive descent over normalised LaTeX (see `latex.py`) that computes with `fractions.Fraction` while it parses.
Every size is bounded before the operation is done, so no input takes more than a few milliseconds.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NoReturn

MAX_BITS = 1 << 15  # of a numerator or denominator: about 10,000 decimal digits
MAX_DIGITS = 4000  # of a literal; Python itself refuses beyond 4300
MAX_DEPTH = 40  # of nested groups; each level costs about eight Python frames

_TOKEN = re.compile(
    r"\s*(?:(?P<repeat>(?P<whole>\d*)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*\{(?P<cycle>\d+)\}|\((?P<paren>\d+)\)))"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+(?![a-zA-Z]))?)"
    r"|(?P<command>\\(?:[a-zA-Z]+|.))|(?P<other>\S))"
)
_CLOSE = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\{": r"\}"}
_PRIMARY = {
    "number",
    "(",
    "[",
    "{",
    "\\frac",
    "\\sqrt",
    "\\binom",
    "\\lfloor",
    "\\lceil",
    "\\max",
    "\\min",
    "\\gcd",
    "\\lcm",
}


class NotRationalError(ValueError):
    """The text is not an expression that this module evaluates."""


class TooLargeError(NotRationalError):
    """Some intermediate value, or the expression itself, is beyond the bounds."""


def evaluate(text: str) -> Fraction:
    """The exact value of normalised LaTeX. Raises `NotRationalError`, `TooLargeError`; nothing else."""
    parser = _Parser(text)
    value = parser.sum()
    if parser.peek():
        parser.fail()
    return value


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, Fraction | None]] = []  # (kind, text, value of a number)
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            if match["repeat"]:
                value = _repeating(match["whole"], match["fixed"], match["cycle"] or match["paren"])
                self.tokens.append(("number", match["repeat"], value))
            elif match["number"]:
                self.tokens.append(("number", match["number"], _literal(match["number"])))
            else:
                self.tokens.append((kind, match[kind] if kind else "", None))
        self.position = 0
        self.depth = 0

    def fail(self) -> NoReturn:
        raise NotRationalError("not a rational expression")

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        if index >= len(self.tokens):
            return ""
        kind, text, _ = self.tokens[index]
        return "number" if kind == "number" else text

    def take(self, *expected: str) -> bool:
        if self.peek() in expected and self.peek():
            self.position += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            self.fail()

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLargeError("nested too deeply")

    def sum(self) -> Fraction:
        self.deeper()
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.peek() == "+" else -1
            self.position += 1
            value = _bounded(value + sign * self.product())
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if self.take("\\cdot"):
                value = _bounded(value * self.signed())
            elif self.take("/"):
                value = _divide(value, self.signed())
            elif self.take("\\bmod"):
                divisor = self.signed()
                if divisor == 0:
                    self.fail()
                value = value % divisor
            elif self.peek() in _PRIMARY and not (self.peek() == "number" and self.previous_is_number()):
                value = _bounded(value * self.power())
            else:
                return value

    def previous_is_number(self) -> bool:
        return self.position > 0 and self.tokens[self.position - 1][0] == "number"

    def signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.peek() == "-" else sign
            self.position += 1
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.factor()
        while self.take("!"):
            base = _factorial(base)
        if self.take("^"):
            exponent = self.argument()
            while self.take("!"):
                exponent = _factorial(exponent)
            base = _power(base, exponent)
        return base

    def argument(self) -> Fraction:
        """A braced group, or whatever stands there: `normalise` has put braces around all but exponents."""
        self.deeper()
        if self.take("{"):
            value = self.sum()
            self.expect("}")
        elif self.peek() == "number":
            value = self.number()
        else:
            value = self.factor()
        self.depth -= 1
        return value

    def number(self) -> Fraction:
        value = self.tokens[self.position][2]
        self.position += 1
        return value if value is not None else self.fail()

    def factor(self) -> Fraction:
        token = self.peek()
        if token == "number":  # noqa: S105
            return self.mixed(self.number())
        if not self.take(*_CLOSE, *_PRIMARY):
            self.fail()
        if token == "\\frac":  # noqa: S105
            return _divide(self.argument(), self.argument())
        if token == "\\binom":  # noqa: S105
            return _binomial(self.argument(), self.argument())
        if token == "\\sqrt":  # noqa: S105
            degree = Fraction(2)
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            if degree == 0:
                self.fail()
            return _power(self.argument(), 1 / degree)
        if token in ("\\max", "\\min", "\\gcd", "\\lcm"):
            return self.of_several(token)
        value = self.sum()
        self.expect(_CLOSE[token])
        if token == "|":  # noqa: S105
            return abs(value)
        if token == "\\lfloor":  # noqa: S105
            return Fraction(math.floor(value))
        return Fraction(math.ceil(value)) if token == "\\lceil" else value  # noqa: S105

    def mixed(self, whole: Fraction) -> Fraction:
        """`1\\frac{4}{5}` is 9/5; so is `1 4/5`."""
        texts = [self.peek(k) for k in range(7)]
        if whole.denominator != 1:
            return whole
        if texts[0] == "\\frac":
            start = self.position
            self.position += 1
            try:
                top, bottom = self.argument(), self.argument()
            except TooLargeError:
                raise
            except NotRationalError:
                top, bottom = Fraction(1), Fraction(0)
            if 0 < top < bottom and top.denominator == bottom.denominator == 1:
                return whole + top / bottom
            self.position = start
        elif texts[:3] == ["number", "/", "number"]:
            top_token, bottom_token = self.tokens[self.position], self.tokens[self.position + 2]
            if top_token[1].isdigit() and bottom_token[1].isdigit() and top_token[2] and bottom_token[2]:
                self.position += 3
                return whole + top_token[2] / bottom_token[2]
        return whole

    def of_several(self, name: str) -> Fraction:
        close = _CLOSE["("] if self.take("(") else "}" if self.take("{") else "\\}" if self.take("\\{") else self.fail()
        values = [self.sum()]
        while self.take(","):
            values.append(self.sum())
        self.expect(close)
        if name in ("\\max", "\\min"):
            return max(values) if name == "\\max" else min(values)
        if any(v.denominator != 1 for v in values):
            self.fail()
        whole = [int(v) for v in values]
        result = whole[0]
        for other in whole[1:]:
            result = math.gcd(result, other) if name == "\\gcd" else int(_bounded(Fraction(math.lcm(result, other))))
        return Fraction(abs(result))


def _literal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise TooLargeError("too many digits")
    whole, _, decimals = mantissa.partition(".")
    return Fraction(int((whole + decimals) or 0)) * Fraction(10) ** (int(exponent or 0) - len(decimals))


def _repeating(whole: str, fixed: str, cycle: str) -> Fraction:
    if len(whole) + len(fixed) + len(cycle) > MAX_DIGITS:
        raise TooLargeError("too many digits")
    scale = 10 ** len(fixed)
    return Fraction(int((whole + fixed) or 0), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise TooLargeError("too large a number")
    return value


def _divide(top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise NotRationalError("division by zero")
    return _bounded(top / bottom)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise NotRationalError("not a factorial of a whole number")
    if value > 2000:  # 2000! has 19053 bits
        raise TooLargeError("too large a factorial")
    return Fraction(math.factorial(int(value)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0 or bottom < 0:
        raise NotRationalError("not a binomial of whole numbers")
    if top > 10_000:
        raise TooLargeError("too large a binomial")
    return Fraction(math.comb(int(top), int(bottom)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent where that is rational. Odd roots of negative numbers are the real ones."""
    if base in (0, 1):
        if base == 0 and exponent <= 0:
            raise NotRationalError("a power of zero")
        return base
    degree = exponent.denominator
    if degree > 1:
        if degree > 64:
            raise NotRationalError("not a rational root")
        base = Fraction(_root(base.numerator, degree), _root(base.denominator, degree))
    whole = exponent.numerator
    if base == -1:
        return Fraction(1 if whole % 2 == 0 else -1)
    if base != 1 and abs(whole) * max(1, _bits(base) - 1) > MAX_BITS:
        raise TooLargeError("too large a power")
    return base**whole


def _root(value: int, degree: int) -> int:
    if value < 0 and degree % 2 == 0:
        raise NotRationalError("an even root of a negative number")
    size = abs(value)
    low, high = 0, 1 << (size.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < size:
            low = middle + 1
        else:
            high = middle
    if low**degree != size:
        raise NotRationalError("not a perfect power")
    return -low if value < 0 else low
