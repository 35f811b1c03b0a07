"""math-verify as the paper's released code calls it: 3 decimals, both texts parsed by its own rules.

Runs only inside a killable worker. math-verify hands plain arithmetic to sympy's `parse_expr`, which evaluates text as
Python; here such text is read exactly, as a rational number, or not at all.
"""

from __future__ import annotations

from typing import Any

import sympy
import sympy.parsing.sympy_parser

from dynamo_jax.tasks.grading.exact import evaluate
from dynamo_jax.tasks.grading.latex import normalise

DECIMALS = 3


def _read_expression(text: str, *_: Any, **__: Any) -> Any:
    value = evaluate(normalise(text.strip()))
    exact = sympy.Rational(value.numerator, value.denominator)
    return sympy.Float(exact, 15) if "." in text else exact  # only Floats are rounded


def math_verify_equal(gold: str, output: str) -> bool:
    """Does math-verify find the response right? Its own time limits are off: the worker's are the kernel's.

    Raises `ImportError` without math-verify, and whatever math-verify raises.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, parser, verify

    parser.parse_expr = sympy.parsing.sympy_parser.parse_expr = _read_expression
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    expected = parse(f"\\boxed{{{gold}}}", targets, parsing_timeout=None)
    found = parse(output, targets, parsing_timeout=None)
    return bool(verify(expected, found, float_rounding=DECIMALS, timeout_seconds=None))
