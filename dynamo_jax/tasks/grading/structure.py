"""The parts of a normalised answer: members of lists and sets, tuples, intervals, systems, names before `=`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate
from dynamo_jax.tasks.grading.latex import GREEK, closing_brace, key
from dynamo_jax.tasks.grading.words import without_remark

_TOKEN = re.compile(r"\\begin\{[a-zA-Z*]+\}|\\end\{[a-zA-Z*]+\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"}
_CLOSING = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"}
_RELATIONS = ("\\le", "\\ge", "<", ">")
_LETTER = r"(?:[a-zA-Z]|\\(?!infty|pi(?![a-zA-Z]))[a-zA-Z]+)"
_INDEX = r"(?:\s*(?:_\s*(?:\{[^{}]*\}|\w|\\[a-zA-Z]+)|'|\^\s*(?:\{\s*\\prime\s*\}|\\prime|\*|\{\*\})))*"
_NAME = re.compile(
    rf"(?:{_LETTER}{_INDEX}(?:\s*\([^()=]*\))?|[A-Z]{{2,4}}|\"[^\"]*\"|[A-Za-z][A-Za-z ]*[A-Za-z]{{2,}}[A-Za-z ]*"
    rf"|\\(?:angle|triangle|overline|vec|hat|bar|widehat)\s*\{{?[A-Za-z0-9_{{}} ]+\}}?|\|\s*[A-Za-z]+\s*\|"
    rf"|[A-Z][\w{{}}]{{0,9}}\s*:\s*[A-Z][\w{{}}]{{0,9}}"  # a ratio of lengths, areas, volumes
    rf"|\\frac\{{\s*[A-Z]{{2}}\s*\}}\{{\s*[A-Z]{{2}}\s*\}}"
    r"|\\begin\{[pb]matrix\}(?:\s*[a-zA-Z](?:_\{?\w\}?)?\s*(?:&|\\cr|(?=\\end)))+\\end\{[pb]matrix\}"
    rf"|\(\s*{_LETTER}{_INDEX}(?:\s*,\s*{_LETTER}{_INDEX})*\s*\)|[A-Za-z]\s*\([^()]*\))"
)
_FUNCTION = re.compile(r"([a-zA-Z])\s*\(\s*([a-zA-Z])\s*\)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MAX_SIGNS = 3  # independent plus-minus signs that are written out: 8 values
_MAX_NAMES = 8  # of a labelled tuple
_SHORT_NAME = re.compile(_LETTER + _INDEX)
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_EXCLUSION = re.compile(r"(?P<base>.+?)\s*\\setminus\s*(?P<points>\\\{.*\\\})", re.DOTALL)
_NO_NAME = re.compile(  # sin(x) and x(x-1)
    r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|ln|log|exp)(?![a-zA-Z])"
    r"|([a-zA-Z])\s*\(.*(?<![\\a-zA-Z])\1(?![a-zA-Z])"
)
_SYSTEM = re.compile(
    r"(?P<left>\\\{\s*)?\\begin\{(?P<kind>[dr]?cases|array|matrix|align(?:ed|\\cdot )?|gathered|split)\}"
    r"\s*(?:\[[bct]\]|\{[lcr| ]*\})?"
    r"(?P<rows>(?:(?!\\begin\{|\\end\{).)*)\\end\{(?P=kind)\}(?P<right>\s*\\\})?",
    re.DOTALL,
)
_ROW_GAP = re.compile(r"\s*\[[\d.]+ ?[a-z]{2}\]")
_VARIABLE = re.compile(r"\\([a-zA-Z]+)|[a-zA-Z]")
_CONSTANTS = {"i", "e", "\\pi", "\\infty"}
LETTERS = {*GREEK, *(name.capitalize() for name in GREEK), "ell", "hbar"} - {"pi"}
COORDINATES = {"x", "y", "z"}
_SIZE = re.compile(r"\|[A-Z\s]*(?:\\c[au]p\s*[A-Z]\s*)+\|")  # of a union of sets
_REALS = {"\\mathbb{R}", '"all real numbers"', '"real numbers"', '"all reals"'}


@dataclass(frozen=True)
class Bracketed:
    """A tuple or interval `( , ]`, or a matrix (brackets: its shape)."""

    brackets: str
    items: tuple[str, ...]


def split(text: str, *separators: str) -> list[str]:
    """The parts of `text` between separators that stand outside every bracket and environment."""
    if not any(separator in text for separator in separators):
        return [text.strip()]
    parts: list[str] = []
    depth = start = 0
    for match in _TOKEN.finditer(text):
        token = match.group(0)
        if token in _OPENING or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSING or token.startswith("\\end{"):
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def members(text: str, thousands: bool, independent: bool = False) -> list[str]:
    """The members of a list, a set or a union; one for anything else.

    `thousands`: 1,625 is a number. `independent`: several plus-minus signs in one member go through all combinations;
    otherwise they change together.
    """
    text = text.strip()
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return []
    if thousands and "," in text:
        text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m.group(0).replace(",", ""), text)
    if "\\cup" in text and "|" in text:  # |A \\cup B| = 7 is no union
        text = _SIZE.sub(lambda m: m.group(0).replace("\\cup", "\\vee"), text)
    found: list[str] = []
    for part in map(_without_membership, map(without_remark, split(text, ",", ";", "\\cup"))):
        inside = _inside(part, "\\{", "\\}")
        if inside is not None:
            found += members(inside, thousands=False, independent=independent) if inside else []
        elif part.startswith("{") and closing_brace(part, 0) == len(part) - 1 and "," in part:
            found += members(part[1:-1], thousands=False, independent=independent)  # {1,2}: a set without backslashes
        elif _SIGN.search(part):
            found += _signs(part, independent)
        elif "\\setminus" in part or "\\ne" in part:
            found += _without_points(part)
        else:
            found.append(part)
    return found


def _signs(text: str, independent: bool) -> list[str]:
    """Every value of a text with plus-minus signs."""
    count = len(_SIGN.findall(text))
    if not independent or count > _MAX_SIGNS or "\\mp" in text:
        return [
            text.replace("\\pm", upper).replace("\\mp", lower) for upper, lower in (("+", "-"), ("-", "+"))
        ]  # fmt: skip
    values = [text]
    for _ in range(count):
        values = [value.replace("\\pm", sign, 1) for value in values for sign in "+-"]
    return values


def _without_points(text: str) -> list[str]:
    """The intervals of `\\mathbb{R} \\setminus \\{1, 2\\}` or `x \\ne 1`; the text itself where that is not clear."""
    name, _, point = text.partition("\\ne ")
    match = _EXCLUSION.fullmatch(text)
    if point and is_name(name):
        low, high, points = "(-\\infty", "\\infty)", [point.strip()]
    elif match:
        base = bracketed(match["base"].strip())
        if base is None or len(base.items) != 2 or base.brackets[0] not in "([" or base.brackets[1] not in ")]":
            return [text]
        low, high = base.brackets[0] + base.items[0], base.items[1] + base.brackets[1]
        points = members(match["points"], thousands=False)
    else:
        return [text]
    try:
        points.sort(key=evaluate)
    except NotRationalError:
        if len(points) != 1:
            return [text]
    edges = [low, *(edge for point in points for edge in (f"{point})", f"({point}")), high]
    return [f"{left},{right}" for left, right in zip(edges[::2], edges[1::2], strict=True)]


def bracketed(text: str) -> Bracketed | None:
    """A tuple, an interval or an inequality that is one; None for anything else, `(5)` too."""
    if text in _REALS:
        return Bracketed("()", ("-\\infty", "\\infty"))
    if text.startswith("]") or (text.endswith("[") and text[0] in "[("):  # ]0, 1[ is (0, 1)
        left = "(" if text[0] == "]" else text[0]
        text = left + text[1:-1] + (")" if text[-1] == "[" else text[-1])
    for left in ("(", "[", "\\langle"):
        for right in (")", "]", "\\rangle"):
            inside = _inside(text, left, right)
            if inside is not None:
                items = split(inside, ",", ";")
                brackets = "()" if left == "\\langle" else left + right
                return Bracketed(brackets, tuple(i.removeprefix("+") for i in items)) if len(items) > 1 else None
    return _inequality(text)


def is_name(text: str) -> bool:
    """Could it be a label before an equals sign: `x`, `f(n)`, `m_{\\max}`, `(p,q,r)`, `\\angle ABC`, words."""
    text = re.sub(r"^\{([a-zA-Z])\}$", r"\1", text.strip())
    return len(text) <= 80 and _NAME.fullmatch(text) is not None and not _NO_NAME.match(text)


def variables(text: str) -> set[str]:
    """Its letters but for constants and names of functions."""
    found = set()
    for match in _VARIABLE.finditer(text):
        name = match.group(0)
        if name not in _CONSTANTS and (match.group(1) is None or match.group(1) in LETTERS):
            found.add(name)
    return found


def is_solution(name: str, value: str) -> bool:
    """Does `name = value` tell an unknown's value? The equation of a curve or a relation (`y = 2x`) doesn't."""
    letters = variables(value)
    return not letters or (name.strip() in COORDINATES and not letters & COORDINATES)


def same_argument(gold: str, answer: list[str]) -> list[str]:
    """The answer `f(x) = ...` written with the gold's variable, for a gold that begins with `f(n)`."""
    expected, found = _FUNCTION.fullmatch(gold.strip()), _FUNCTION.fullmatch(answer[0].strip())
    if not (expected and found and expected.group(1) == found.group(1)):
        return answer
    new, old = expected.group(2), found.group(2)
    if new == old or new in re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", " ".join(answer)):
        return answer
    return [re.sub(r"\\[a-zA-Z]+|[a-zA-Z]", lambda m: new if m[0] == old else m[0], part) for part in answer]


def _inside(text: str, left: str, right: str) -> str | None:
    """The text between brackets that enclose all of it."""
    if not (text.startswith(left) and text.endswith(right)):
        return None
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group(0)
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return text[len(left) : -len(right)].strip() if match.end() == len(text) else None
    return None


def _inequality(text: str) -> Bracketed | None:
    parts = split(text, *_RELATIONS)
    relations = [m.group(0) for m in _TOKEN.finditer(text) if m.group(0) in _RELATIONS]
    if len(parts) not in (2, 3) or len(relations) != len(parts) - 1 or not all(parts):
        return None
    if relations[0] in ("\\ge", ">"):
        parts.reverse()
        relations.reverse()
        relations = [{"\\ge": "\\le", ">": "<", "\\le": "\\ge", "<": ">"}[r] for r in relations]
    if not all(r in ("\\le", "<") for r in relations):
        return None
    if len(parts) == 3:
        if not is_name(parts[1]):
            return None
        left, right = relations
        return Bracketed(("[" if left == "\\le" else "(") + ("]" if right == "\\le" else ")"), (parts[0], parts[2]))
    if is_name(parts[0]) and not is_name(parts[1]):
        return Bracketed("(" + ("]" if relations[0] == "\\le" else ")"), ("-\\infty", parts[1]))
    if is_name(parts[1]) and not is_name(parts[0]):
        return Bracketed(("[" if relations[0] == "\\le" else "(") + ")", (parts[0], "\\infty"))
    return None


def _without_membership(text: str) -> str:
    """`x \\in [0, 1]` without its name."""
    parts = re.split(r"\\in(?![a-zA-Z])", text, maxsplit=1)
    return parts[1].strip() if len(parts) == 2 and is_name(parts[0]) else text


def ratio(text: str) -> list[str] | None:
    """The terms of `3:5`; None for anything else, and for a time of day such as 12:30."""
    terms = split(text, ":")
    clock = re.fullmatch(r"\s*\d{1,2}\s*:\s*\d\d(?:\s*:\s*\d\d)?\s*(?:[ap]\.?m\.?)?", text)
    return terms if 2 <= len(terms) <= 8 and all(terms) and not clock else None


def labelled_tuple(parts: list[str]) -> str | None:
    """`x = 1, y = 2` as the tuple `(1, 2)`, ordered by name, Greek letters last; None unless that is all of it.

    Every part gives a value to short names that no other part has: `x = y = 1` gives one to two of them. One part may
    be the list in parentheses.
    """
    if len(parts) == 1 and "=" in parts[0]:
        inside = _inside(parts[0], "(", ")")
        parts = [parts[0]] if inside is None else split(inside, ",", ";")
    values: dict[str, str] = {}
    for part in parts if len(parts) <= _MAX_NAMES else ():
        *names, value = split(part, "=")
        if names and _SHORT_NAME.fullmatch(value) and not _SHORT_NAME.fullmatch(names[0]):  # 1 = x = y
            names, value = [*names[1:], value], names[0]
        for name in names:
            if key(name) in values or not _SHORT_NAME.fullmatch(name):
                return None
            values[key(name)] = value
        if not names or not value:
            return None
    if not 2 <= len(values) <= _MAX_NAMES:
        return None
    return "(" + ",".join(values[name] for name in sorted(values, key=lambda n: (n.startswith("\\"), n))) + ")"


def without_systems(text: str) -> str:
    """Each solved system, `\\begin{cases} x=3 \\\\ y=-1 \\end{cases}`, as the tuple `(3,-1)`.

    A chain written over several rows (`x &= 1+2 \\\\ &= 3`) becomes one row. All else stays: functions in pieces,
    systems still to be solved, matrices.
    """
    if "\\cr" not in text and "\\begin" not in text:
        return text
    if "\\begin" in text:
        return _SYSTEM.sub(_solved, text)
    return _tuple_of_rows(text.removeprefix("\\{")) or text


def _solved(system: re.Match[str]) -> str:
    solution = _tuple_of_rows(system["rows"], single="cases" not in system["kind"])
    if solution is None:
        return system.group(0)
    # \\left\\{ ... \\right. leaves one brace, which is the system's own unless it opens a set of them.
    left, right = system["left"] or "", system["right"] or ""
    return solution if bool(left) == bool(right) or "cases" not in system["kind"] else left + solution + right


def _tuple_of_rows(text: str, single: bool = False) -> str | None:
    """The tuple that the rows of a system give; `single`: or the one equation that they are."""
    rows: list[str] = []
    for row in text.split("\\cr"):
        content = _ROW_GAP.sub("", row, count=1).replace("&", " ").strip(" ,;.")
        content = content.removeprefix('"and"').removesuffix('"and"').strip(" ,;.")
        if content.startswith("=") and rows:
            rows[-1] += content
        elif content:
            rows.append(content)
    parts = [part for row in rows for part in split(row, ",", ";")]
    if single and len(parts) == 1 and "=" in parts[0]:
        return parts[0]
    return labelled_tuple(parts)
