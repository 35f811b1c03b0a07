"""Are two formulas equal? Parsed by latex2sympy2_extended, compared at random points with 300 digits.

Runs only inside a killable worker (`verifier_worker.py`): the parser has no time bound. Two formulas are equal where
they agree to 80 digits at every one of several random points; analytic expressions that do so and yet differ are not
found by chance. Letters take either sign, but two formulas that keep roots may also be equal for positive letters
alone, as physics writes them (`_for_positive_letters`). This never simplifies, solves or
expands, whose time nothing bounds. The values are computed by `_Evaluator`, node by node, with bounds on every
argument; no text is evaluated as code.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy
import sympy.parsing.sympy_parser
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy

MAX_NODES = 600  # of a parsed formula
MAX_CHARS = 1500  # of a formula: the parser takes about a millisecond a character on bad ones
MAX_DEPTH, MAX_POWERS = 30, 60  # of brackets, of `^`: the parser's time is not linear in them
DIGITS = 300  # of the arithmetic
AGREEMENT = mpmath.mpf(10) ** -80  # relative; the values themselves are below MAX_SIZE
MAX_SIZE = mpmath.mpf(10) ** 150  # of an intermediate value, so that 150 digits survive cancellation
POINTS = 4
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_NORMALISATION = NormalizationConfig(
    basic_latex=False, units=False, malformed_operators=False, nits=False, boxed="none", equations=False
)
_BARE_LOG = re.compile(r"\\log(?![a-zA-Z])(?!\s*_)")
MAX_TERMS = 400  # of all sums and products together that are written out at a point
_STEPS = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product)
_BOUND = (sympy.Sum, sympy.Product, sympy.Integral)
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.exp: mpmath.exp, sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan,
    sympy.cot: mpmath.cot, sympy.sec: mpmath.sec, sympy.csc: mpmath.csc, sympy.asin: mpmath.asin,
    sympy.acos: mpmath.acos, sympy.atan: mpmath.atan, sympy.acot: mpmath.acot, sympy.asec: mpmath.asec,
    sympy.acsc: mpmath.acsc, sympy.sinh: mpmath.sinh, sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh,
    sympy.coth: mpmath.coth, sympy.asinh: mpmath.asinh, sympy.acosh: mpmath.acosh, sympy.atanh: mpmath.atanh,
    sympy.floor: mpmath.floor, sympy.ceiling: mpmath.ceil, sympy.Abs: abs, sympy.factorial: mpmath.factorial,
    sympy.gamma: mpmath.gamma, sympy.binomial: mpmath.binomial, sympy.re: mpmath.re, sympy.im: mpmath.im,
    sympy.conjugate: mpmath.conj, sympy.arg: mpmath.arg, sympy.Max: max, sympy.Min: min, sympy.sign: mpmath.sign,
    sympy.Mod: mpmath.fmod,
}  # fmt: skip


class NoValueError(ValueError):
    """A formula that has no value at a point, or none within the bounds."""


class Symbolic:
    """The `Algebra` of `answers.compare`. Raises whatever the parser raises."""

    def equal(self, gold: str, answer: str) -> bool:
        """Do two expressions have the same value wherever both have one?"""
        # `\\log` without a base is the natural one for some authors and base 10 for others; both sides mean the same.
        bases = ("\\ln ", "\\log_{10} ") if _BARE_LOG.search(gold + " " + answer) else ("\\ln ",)
        return any(self._equal(_parse(gold, base), _parse(answer, base)) for base in bases)

    @classmethod
    def _equal(cls, left: Any, right: Any) -> bool:
        if cls._agree(left, right):
            return True
        return _for_positive_letters(left, right) and cls._agree(left, right, positive=True)

    @staticmethod
    def _agree(left: Any, right: Any, positive: bool = False) -> bool:
        agreed = 0
        for point in _points(left, right, positive=positive):
            try:
                a, b = point.value(left), point.value(right)
            except NoValueError:
                continue
            real = _is_real(a) and _is_real(b)
            if point.negative and not real:
                continue  # ln(ab) and ln a + ln b differ by the branch only
            if _close(a, b):
                agreed += 1
            elif real or not positive:  # sqrt(c / (a - b)) and sqrt(c) / sqrt(a - b): by the branch too, for a < b
                return False
        return agreed >= 2

    def has_value(self, text: str) -> bool:
        """Can the formula be read, and has it a value at some point?"""
        formula = _parse(text)
        for point in _points(formula):
            try:
                point.value(formula)
            except NoValueError:
                continue
            return True
        return False

    def same_equation(self, gold: tuple[str, str], answer: tuple[str, str]) -> bool:
        """Are the differences of their two sides proportional?"""
        left, right = (sympy.Add(_parse(a), -_parse(b), evaluate=False) for a, b in (gold, answer))
        ratio = None
        agreed = 0
        for point in _points(left, right):
            try:
                a, b = point.value(left), point.value(right)
            except NoValueError:
                continue
            if a == 0 or b == 0:
                return False
            if ratio is not None and not _close(a / b, ratio):
                return False
            ratio = a / b
            agreed += 1
        return agreed >= 3


def forbid_evaluation() -> None:
    """Make this process refuse to evaluate text as Python.

    The LaTeX parser hands its number tokens to `sympy.Number(text)`, which evaluates them with `eval`. From here on
    decimal numbers are read as such, exactly, and any other text that reaches sympy is an error.
    """

    def read_number(text: str, *_: Any, **__: Any) -> Any:
        if not re.fullmatch(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", text.strip()):
            raise NoValueError("text is not evaluated here")
        fraction = Fraction(text)
        return sympy.Rational(fraction.numerator, fraction.denominator)

    sympy.parsing.sympy_parser.parse_expr = read_number  # sympify looks it up there at every call


def warm_up() -> None:
    """Build the parser's tables; the first formula takes a tenth of a second longer."""
    Symbolic().equal(r"\frac{\sqrt{2}}{2} + \sin x", r"\sin x + \frac{1}{\sqrt{2}}")


@lru_cache(maxsize=512)
def _parse(text: str, log: str = "\\ln ") -> Any:
    """The unevaluated sympy expression of a normalised formula, `log` in place of `\\log` without a base."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{}\])]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    if len(text) > MAX_CHARS or deepest > MAX_DEPTH or text.count("^") > MAX_POWERS:
        raise NoValueError("too long or too deep a formula")
    if re.search(r"\\(?:bmod|gcd|lcm|Leftrightarrow)(?![a-zA-Z])", text):
        raise NoValueError("the parser misreads this command")
    text = re.sub(r"(\d\.?)[eE]([+-]?\d+)", r"\1 \\cdot 10^{\2}", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda m: f"\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = _BARE_LOG.sub(lambda _: log, text)
    text = re.sub(r"\\exp\s*(?=\{)", "e^", text)
    # Symbols that the parser takes for something else: Euler's constant, the exponent of a number, nothing at all.
    text = re.sub(r"\\gamma(?![a-zA-Z])", r"\\varrho ", text)
    text = re.sub(r"\\[a-zA-Z]+|E", lambda m: "\\varpi " if m[0] == "E" else m[0], text)
    text = re.sub(r"'+", lambda m: "^{" + "\\prime" * len(m[0]) + "}", text)
    parsed = latex2sympy(text, conversion_config=_CONVERSION, normalization_config=_NORMALISATION)
    if not isinstance(parsed, sympy.Expr):
        raise NoValueError("not a single expression")
    count = sum(1 for _ in zip(sympy.preorder_traversal(parsed), range(MAX_NODES + 1), strict=False))
    if count > MAX_NODES:
        raise NoValueError("too large a formula")
    return parsed


def _for_positive_letters(left: Any, right: Any) -> bool:
    """Do both formulas keep a root, and one of them a root of letters: `2 r \\sqrt{G}` and `\\sqrt{4 G r^2}`?

    Physics takes its letters as positive and pulls them out of roots freely. Not where an absolute value says that
    signs matter; and of `\\sqrt{x^2}` and `x` only one keeps a root: that is the textbook's question about signs.
    """
    formulas = (left, right)
    if any(formula.has(sympy.Abs, sympy.sign) for formula in formulas):
        return False
    roots = [
        [p.base for p in formula.atoms(sympy.Pow) if isinstance(p.exp, sympy.Rational) and p.exp.q > 1]
        for formula in formulas
    ]
    return all(roots) and any(base.free_symbols for bases in roots for base in bases)


def _points(*expressions: Any, positive: bool = False) -> Iterator[_Evaluator]:
    """Random points, the same ones each time; whole numbers where there are steps.

    First positive ones, then mixed signs, last all negative, where |a + b| is not a + b. `positive`: no negative ones,
    but further out, where a sine or cosine is negative.
    """
    rng = random.Random(2602)  # noqa: S311
    stepped = any(e.has(*_STEPS) for e in expressions)
    for index in range(3 * POINTS if stepped or positive else 2 * POINTS):
        negative = 0.0 if stepped or positive or index < POINTS else 0.6 if index < 2 * POINTS - 1 else 1.0
        yield _Evaluator(rng, whole=stepped, negative=negative, reach=3 if positive else 1)


class _Evaluator:
    """The values of formulas at one random point. `negative`: the share of negative letters."""

    def __init__(self, rng: random.Random, whole: bool, negative: float, reach: int) -> None:
        self.rng, self.whole, self.negative, self.reach = rng, whole, negative, reach
        self.symbols: dict[str, Any] = {}
        self.terms = 0  # of sums and products so far

    def value(self, expression: Any) -> Any:
        with mpmath.workdps(DIGITS):
            return self._value(expression)

    def _value(self, node: Any) -> Any:
        if isinstance(node, sympy.Rational):
            result = mpmath.mpf(int(node.p)) / int(node.q)
        elif isinstance(node, sympy.Float):
            result = mpmath.mpf(str(node))
        elif node is sympy.pi:
            result = +mpmath.pi
        elif node is sympy.E:
            result = +mpmath.e
        elif node is sympy.I or (isinstance(node, sympy.Symbol) and node.name == "i"):
            result = mpmath.mpc(0, 1)
        elif isinstance(node, sympy.Symbol | sympy.core.function.AppliedUndef | sympy.Derivative):
            result = self._symbol(str(node))
        elif node.func in (sympy.Add, sympy.Mul):
            values = [self._value(a) for a in node.args]
            result = mpmath.fsum(values) if node.func is sympy.Add else mpmath.fprod(values)
        elif node.func is sympy.Pow:
            result = self._power(*node.args)
        elif node.func is sympy.log:
            values = [self._value(a) for a in node.args]
            if any(v == 0 for v in values) or (len(values) == 2 and values[1] == 1):
                raise NoValueError("logarithm of zero")
            result = mpmath.log(values[0]) / (mpmath.log(values[1]) if len(values) == 2 else 1)
        elif isinstance(node, _BOUND) and all(len(limit) == 3 for limit in node.limits):
            result = self._bound(node)
        elif isinstance(node, sympy.UnevaluatedExpr):
            result = self._value(node.args[0])
        elif node.func in _FUNCTIONS:
            result = self._function(node)
        else:
            raise NoValueError(f"no value for {node.func}")
        if not mpmath.isfinite(result) or abs(result) > MAX_SIZE:
            raise NoValueError("beyond the bounds")
        return result

    def _symbol(self, name: str) -> Any:
        if name not in self.symbols:
            if self.whole:
                drawn = mpmath.mpf(self.rng.randint(4, 25))
            else:
                drawn = mpmath.mpf(self.rng.randint(10**20, 4 * 10**20)) / 10**20
                drawn = drawn / 3 if self.rng.random() < 0.5 else drawn * self.reach
                if self.negative and self.rng.random() < self.negative:
                    drawn = -drawn
            self.symbols[name] = drawn
        return self.symbols[name]

    def _bound(self, node: Any) -> Any:
        """A finite sum or product term by term; anything else as some value that its parts alone decide.

        The latter is linear in the summand, so that constants may stand before or behind the sign.
        """
        body, (variable, low, high) = node.args[0], node.limits[-1]
        if len(node.limits) > 1:
            body = node.func(node.args[0], *node.limits[:-1])
        first, last = (mpmath.mpf(0) if abs(v) == sympy.oo else self._value(v) for v in (low, high))
        before = self.symbols.get(variable.name)
        indexed = any(variable.name in s.name and s != variable for s in body.free_symbols)  # a_k is a symbol to sympy
        whole = all(_is_real(v) and mpmath.isint(mpmath.re(v)) for v in (first, last))
        try:
            if not isinstance(node, sympy.Integral) and whole and not indexed and sympy.oo not in (abs(low), abs(high)):
                self.terms += max(0, int(mpmath.re(last - first)) + 1)
                if self.terms > MAX_TERMS:
                    raise NoValueError("too many terms")
                terms = []
                for k in range(int(mpmath.re(first)), int(mpmath.re(last)) + 1):
                    self.symbols[variable.name] = mpmath.mpf(k)
                    terms.append(self._value(body))
                return mpmath.fsum(terms) if isinstance(node, sympy.Sum) else mpmath.fprod(terms)
            self.symbols[variable.name] = mpmath.mpf(7) / 3
            ends = [repr(v) if abs(v) == sympy.oo else mpmath.nstr(e, 60) for v, e in ((low, first), (high, last))]
            weight = self._symbol(f"{node.func.__name__} {ends}")
            value = self._value(body)
            return weight * value if not isinstance(node, sympy.Product) else mpmath.power(abs(value) + 2, weight)
        finally:
            self.symbols.pop(variable.name, None)
            if before is not None:
                self.symbols[variable.name] = before

    def _power(self, base_node: Any, exponent_node: Any) -> Any:
        base, exponent = self._value(base_node), self._value(exponent_node)
        if base == 0:
            if mpmath.re(exponent) <= 0:
                raise NoValueError("a power of zero")
            return mpmath.mpf(0)
        if abs(exponent) * (abs(mpmath.log(abs(base))) + 4) > 2000:
            raise NoValueError("too large a power")
        return mpmath.power(base, exponent)

    def _function(self, node: Any) -> Any:
        values = [self._value(a) for a in node.args]
        # mpmath's time grows with the size of these arguments: 500 digits at most, 10,000 as a factorial
        limit = 10_000 if node.func in (sympy.factorial, sympy.binomial, sympy.gamma) else 500 if node.func in (
            sympy.exp, sympy.sinh, sympy.cosh) else MAX_SIZE  # fmt: skip
        if any(abs(v) > limit for v in values):
            raise NoValueError("too large an argument")
        if node.func in (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.Mod) and not all(
            map(_is_real, values)
        ):
            raise NoValueError("not real")
        try:
            return _FUNCTIONS[node.func](*values)
        except (ValueError, ZeroDivisionError) as error:  # a pole
            raise NoValueError(str(error)) from error


def _is_real(value: Any) -> bool:
    return bool(abs(mpmath.im(value)) <= AGREEMENT * (1 + abs(value)))


def _close(a: Any, b: Any) -> bool:
    with mpmath.workdps(DIGITS):
        return bool(abs(a - b) <= AGREEMENT * max(abs(a), abs(b)) or a == b or max(abs(a), abs(b)) < AGREEMENT)
