"""math-verify's own test suite, run as cases through `grade`: prints every difference and their number.

Get the suite first: `pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz`.
Then: `python benchmarks/math_verify_suite.py math_verify-0.9.0/tests`

The cases are read with `ast`, not imported: every list under `@pytest.mark.parametrize` with a `gold` and a `pred`.
Both are whole texts there, so of a long gold, or one with a box, the reference answer is what `extract` finds.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dynamo_jax.tasks import Verifier
from dynamo_jax.tasks.grading.extract import extract


class Case(NamedTuple):
    place: str
    gold: str
    pred: str
    expected: bool
    options: str  # settings of math-verify that the case changes


def cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("test_*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef):
                for decorator in function.decorator_list:
                    if isinstance(decorator, ast.Call) and "parametrize" in ast.unparse(decorator.func):
                        yield from _table(path.name, decorator)


def _table(name: str, decorator: ast.Call) -> Iterator[Case]:
    names = [n.strip() for n in ast.literal_eval(decorator.args[0]).split(",")]
    if "gold" not in names or not isinstance(decorator.args[1], ast.List):
        return
    for row in decorator.args[1].elts:
        try:
            values = dict(zip(names, ast.literal_eval(row), strict=True))
        except ValueError:  # an expression, such as a sympy object: not text, nothing to grade
            continue
        if isinstance(values["gold"], str) and isinstance(values["pred"], str):
            expected = bool(values.get("expected", values.get("result")))
            rest = {k: v for k, v in values.items() if k not in ("gold", "pred", "expected", "result")}
            options = ", ".join(f"{k}={v}" for k, v in rest.items())
            yield Case(f"{name}:{row.lineno}", values["gold"], values["pred"], expected, options)


def _reference(gold: str) -> str:
    """A gold is an answer between dollar signs, or a whole response."""
    return (extract(gold) if "boxed" in gold or len(gold) > 120 else None) or gold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tests", type=Path, help="the suite's folder")
    found = list(cases(parser.parse_args().tests))
    with Verifier() as verifier:
        grades = verifier.grade_batch([(case.pred, _reference(case.gold)) for case in found])
        killed = verifier.counts["killed"]
    different = [(case, grade) for case, grade in zip(found, grades, strict=True) if grade is not case.expected]
    for case, grade in different:
        print(f"{case.place}  expected {case.expected}, graded {grade}  {case.options}")
        print(f"    gold {case.gold!r}\n    pred {case.pred!r}")
    accepted = sum(grade for _, grade in different)
    print(
        f"{len(found)} cases, {len(different)} differences: {accepted} accepted that the suite rejects, "
        f"{len(different) - accepted} rejected that it accepts; {killed} workers killed"
    )


if __name__ == "__main__":
    main()
