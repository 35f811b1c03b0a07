"""Matrices and determinants of a normalised answer: their entries, and the value of a small determinant."""

from __future__ import annotations

import re

from dynamo_jax.tasks.grading.structure import Bracketed, split

_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(.*)\\end\{\1\}(.*)", re.DOTALL)
_BARS = re.compile(r'(?P<factor>.*?)\s*(?:(?P<bars>\\?\|)|(?:\\det|"det")\s*[(\[]?)\s*', re.DOTALL)
MAX_SIZE = 3  # of a determinant that is written out: 6 products


def matrix(text: str) -> Bracketed | None:
    """A matrix's entries row by row, multiplied by the factor before it. Its brackets are its shape.

    A determinant's and a norm's begin with their bars and the factor: they are other values than the matrix.
    """
    found = _read(text)
    if found is None:
        return None
    bars, factor, rows = found
    shape = "x".join(str(len(row)) for row in rows)
    if bars:
        return Bracketed(f"{bars}{factor}{shape}", tuple(entry for row in rows for entry in row))
    return Bracketed(shape, tuple(f"({factor})({entry})" if factor else entry for row in rows for entry in row))


def determinant(text: str) -> str | None:
    """The value of a square determinant, written out as a sum of products; None for anything else, a large one too."""
    found = _read(text) if "\\begin" in text else None
    if found is None or found[0] != "|":
        return None
    _, factor, rows = found
    if len(rows) > MAX_SIZE or any(len(row) != len(rows) for row in rows):
        return None
    return f"({factor or 1})({_expanded(rows)})"


def _read(text: str) -> tuple[str, str, list[list[str]]] | None:
    """Bars, `|` for a determinant or `||` for a norm; the factor before it; the rows."""
    text = text.strip("()[] ")
    start = text.find("\\begin{")
    match = _MATRIX.match(text, start) if start >= 0 else None
    if match is None:
        return None
    kind, body, after = match.group(1), match.group(2), match.group(3).strip()
    factor, bars = text[:start].strip(), {"v": "|", "V": "||"}.get(kind[0], "")
    outer = _BARS.fullmatch(factor)
    if outer is not None and after == (outer["bars"] or ""):
        if bars:
            return None  # the size of a determinant
        factor, after, bars = outer["factor"], "", "||" if outer["bars"] == "\\|" else "|"
    if after:
        return None
    body = re.sub(r"^\s*\{[lcr| ]*\}", "", body) if kind == "array" else body
    factor = factor.removesuffix("\\cdot").strip()
    return bars, f"{factor}1" if factor in ("-", "+") else factor, [split(r, "&") for r in split(body, "\\cr") if r]


def _expanded(rows: list[list[str]]) -> str:
    """Laplace's expansion by the first row."""
    if len(rows) == 1:
        return rows[0][0]
    return "".join(
        f"{'-' if column % 2 else '+'}({entry})({_expanded([row[:column] + row[column + 1 :] for row in rows[1:]])})"
        for column, entry in enumerate(rows[0])
    )
